"""The house: who may import whom, how long scripts are, what has one name and one place."""

import ast
import collections
import re

from conftest import ROOT, run_python

SCRIPTS = ("train", "ebm_sandbox", "ebm_combine", "imagenet_demo", "sample", "eval_inception", "ais")
SHARED = ("models", "sampling", "data", "checkpoint", "utils")  # modules of the root that every reader looks for
FILES = [ROOT / f"{name}.py" for name in (*SCRIPTS, *SHARED)] + sorted((ROOT / "ebm").rglob("*.py"))
NAMES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in FILES if path.stem != "__init__"
}
TREES = {name: ast.parse(path.read_text()) for name, path in NAMES.items()}


def list_imports(node):
    """Return the modules of this project that the import statements below a node load."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found |= {child.module} | {f"{child.module}.{alias.name}" for alias in child.names}
    return found & set(NAMES)


IMPORTS = {name: list_imports(tree) for name, tree in TREES.items()}


def test_no_circle():
    """Breaks when modules import one another in a circle, or hide that in a function."""
    left = dict(IMPORTS)
    while free := [name for name, imported in left.items() if not imported & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"
    for name, tree in TREES.items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert not any(map(list_imports, functions)), f"{name} imports a module of this project inside a function"


def test_arrows_run_down():
    """Breaks when what is shared by all knows those that use it."""
    layers = [("ebm.support", "ebm.readers"), SHARED, ("ebm.presets", "ebm.settings"), ("ebm.measures",)]

    def find_layer(name):
        for number, prefixes in enumerate(layers):
            if name in prefixes or name.startswith(tuple(f"{prefix}." for prefix in prefixes)):
                return number
        return len(layers)

    exceptions = {("ebm.settings", "ebm.training.distributed")}  # the names of the backends
    for name, imported in IMPORTS.items():
        higher = {other for other in imported if find_layer(other) > find_layer(name)}
        assert {(name, other) for other in higher} <= exceptions, f"{name} imports {sorted(higher)}"


def test_data_alone():
    """Breaks when `import data` loads networks or the optimizer."""
    program = "import sys, data; print([name for name in ('models', 'utils', 'checkpoint') if name in sys.modules])"
    assert run_python("-c", program, cwd=ROOT).stdout.strip() == "[]"


def test_lengths():
    """Breaks when a script is no longer flags, a call and a report, or the algorithm no longer fits train.py."""
    lines = {name: len(NAMES[name].read_text().splitlines()) for name in SCRIPTS}
    assert lines.pop("train") <= 350 and max(lines.values()) <= 150, lines
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    step = next(node for node in TREES["train"].body if getattr(node, "name", "") == "train_step")
    assert step.end_lineno - step.lineno < 60


def test_names_are_unique():
    """Breaks when two things of the project share a name; only scripts all have a `main` and perhaps `Settings`."""
    places = collections.defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            is_script = name in SCRIPTS and getattr(node, "name", "") in ("main", "Settings")
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_script:
                places[node.name].append(name)
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_libraries_name_no_flags():
    """Breaks when a message or docstring below the scripts names a flag, where it should name the setting."""
    allowed = ("ebm.settings", "ebm.presets", "ebm.support.cli", "ebm.support.arguments")
    for name, tree in TREES.items():
        if name in SCRIPTS or name in allowed:
            continue
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        flags = [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z]\w+", text)]
        own = {"--logdir", "--exp", "--preset", "--device", "--dsprites_path", "--resume_iter"}  # commands it runs
        assert not set(flags) - (own if name == "ebm.tasks.concept_models" else {"--nproc_per_node", "--help"}), name


def test_start_is_quick():
    """Breaks when every start loads what is slow and few runs need; torch itself is half of what a start takes."""
    program = f"import sys, {', '.join(SCRIPTS)}; print(*sys.modules)"
    names = set(run_python("-c", program, cwd=ROOT, check=True).stdout.split())
    slow = {
        "sklearn",
        "scipy",
        "matplotlib",
        "arviz_stats",
        "torchvision",
        "torch_fidelity",
        "torch.utils.tensorboard",
        "torch._dynamo",
    }
    assert "torch" in names and not slow & names
