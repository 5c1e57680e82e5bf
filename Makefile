# make concepts: combine the shipped concept models.   make demo: train on the digits of scikit-learn, show samples.
# make test: all tests.   All of them set up .venv first.
# make gpu: measure everything on one GPU, in twenty minutes; DEVICE=cpu rehearses it. It takes .venv where there is one,
# else PYTHON as it is: nothing is installed.
PYTHON ?= python3
BIN := .venv/bin
DEVICE ?= cuda
OUT ?= benchmarks/gpu

.PHONY: concepts demo test lint horovod gpu clean

concepts: .venv/installed
	$(BIN)/python ebm_combine.py --weights=pos=3,rot=1.5 --num_steps=200 --step_lr=50 --first_step_lr=400 \
		--first_noise=0.1 --limit=48

demo: .venv/installed
	$(BIN)/python train.py --preset=digits_cpu --save_interval=250 --test_interval=250 --quality --num_samples=200

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .

horovod: .venv/installed
	$(BIN)/pip install -q -e '.[mpi]' -c constraints.txt
	PYTHON=$(BIN)/python scripts/install_horovod.sh

gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/measure_gpu.py --device=$(DEVICE) --output=$(OUT)

.venv/installed: requirements.txt constraints.txt
	@echo "installing the requirements into .venv, one to five minutes"
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed pyproject.toml
	@echo "installing what the tests and checks need into .venv, about a minute"
	$(BIN)/pip install -q -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
