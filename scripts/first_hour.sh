#!/usr/bin/env bash
# The first hour with this project, in a quarter of it: ten steps, what each shows, and how long it takes.
#
#   scripts/first_hour.sh           # after the install; everything goes below a new temporary folder
#   scripts/first_hour.sh FOLDER    # below this folder, which must not exist yet
#
# It needs no GPU and no internet. docs/first_hour.md explains the steps.
set -euo pipefail

out=${1:-$(mktemp -d)/first_hour}
[[ ! -e $out ]] || { echo "error: $out exists; name a folder that does not exist yet" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
printf -v place %q "$out"  # as it is written in a command
runs=$place/runs results=$place/results
table=()

step() {  # step TITLE FIRST COMMAND [STOP]: run a command, and send it SIGTERM at the first line like STOP
    # FIRST describes the first line that is of use. The pictures that lines name become those to look at.
    local title=$1 first=$2 command=$3 stop=${4:-} start=$SECONDS seen=- pictures=() status=0 line
    printf '\n=== %s ===\n$ %s\n' "$title" "$command"
    while IFS= read -r line; do
        printf '%s\n' "$line"
        [[ $seen != - || ! $line =~ $first ]] || seen=$((SECONDS - start))
        [[ ! $line =~ "$out"/[^\ ,]+\.(png|gif) ]] || pictures+=("${BASH_REMATCH[0]#"$out"/}")
        [[ -z $stop || ! $line =~ $stop ]] || { kill -TERM $!; stop=; }
    done < <(exec bash -c "exec $command" 2>&1)
    wait $! || status=$?
    [[ $status == 0 || ($# == 4 && $status == 143) ]] || { echo "error: '$title' failed, status $status" >&2; exit 1; }
    echo "--- first output after $seen s, done after $((SECONDS - start)) s; look at: ${pictures[*]:-the text above}"
    table+=("$(printf '%-42s %6s %6s   %s' "$title" "$seen" "$((SECONDS - start))" "${pictures[0]-}")")
}

echo "everything goes to $out"

step "1 Help" "^Run:" "python train.py --help"

step "2 Combine shipped models of concepts" "[0-9]/[0-9]" \
    "python ebm_combine.py --weights=pos=3,rot=1.5 --num_steps=200 --step_lr=50 --first_step_lr=400 --first_noise=0.1 \
--limit=10 --logdir=$results"

step "3 Train on digits" "^iteration [0-9]" \
    "python train.py --preset=digits_cpu --exp=digits --logdir=$runs --max_iter=250"

cat > "$out/draw_shapes.py" <<'END'
"""Draw 300 small colour images of circles, squares and triangles, in a folder for each class."""
import pathlib, random, sys
from PIL import Image, ImageDraw

KINDS = {"circle": (24, (230, 80, 60)), "square": (4, (70, 200, 90)), "triangle": (3, (90, 120, 240))}  # sides, colour
random.seed(0)
for name, (sides, colour) in KINDS.items():
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir(parents=True)
    for number in range(100):
        image = Image.new("RGB", (32, 32), (random.randrange(60),) * 3)
        place = random.randint(12, 19), random.randint(12, 19), 9
        ImageDraw.Draw(image).regular_polygon(place, sides, fill=colour)
        image.save(folder / f"{number:03}.png")
    print(f"100 images of a {name}, such as {folder}/{number:03}.png")
END
step "4 Make images of one's own" "images" "python $place/draw_shapes.py $place/images"

step "5 Train on them, and interrupt the run" "^iteration [0-9]" \
    "python train.py --preset=colour_cpu --dataset=folder --data_path=$place/images --cclass --exp=shapes --logdir=$runs \
--max_iter=200" "^iteration [0-9]"

step "6 Resume the run" "^iteration [0-9]" \
    "python train.py --exp=shapes --logdir=$runs --resume_iter=latest"

step "7 Detect images of other kinds" "AUROC" \
    "python ebm_sandbox.py --task=mixenergy --exp=shapes --randommix --mixset=digits --modeldir=$runs --logdir=$results"

step "8 Combine concepts by an expression" "[0-9]/[0-9]" \
    "python ebm_combine.py --combine='shape & 3*pos & size' --labels=shape=ellipse,pos=0.5,0.5 --num_steps=100 \
--step_lr=50 --limit=10 --exp=expression --logdir=$results"

cat > "$out/five_lines.py" <<END
import torch, checkpoint, models, sampling
from ebm.support import pictures

model = checkpoint.load_energy("$out/runs/shapes")
labels = torch.eye(3).repeat_interleave(4, 0)
starts = models.draw_starts(model, len(labels), labels, torch.Generator().manual_seed(0))
energy = models.freeze_energy(model).under(labels)
images = sampling.langevin(
    energy, starts, num_steps=model.settings["sample_steps"], step_lr=model.settings["step_lr"]
)
path = pictures.save_grid(images, "$out/five_lines.png", columns=4)
print(f"four images of each of {', '.join(model.class_names)}: {path}")
END
step "9 Five lines of Python" "images" "python - < $place/five_lines.py"

step "10 A GIF of sampling" "frames" \
    "python imagenet_demo.py --exp=shapes --num_steps=auto --batch_size=9 --modeldir=$runs --logdir=$results"

printf '\n%-42s %6s %6s   %s\n' "step" "first" "all" "look at (seconds to the first output, and in all)"
printf '%s\n' "${table[@]}"
echo "everything: $SECONDS s"
echo "wrote $out/ ($(find "$out" -type f -not -name '.*' | wc -l) files)"
