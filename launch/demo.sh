#!/usr/bin/env bash
# Everything mura_dist does, once, on this machine:
#   bash launch/demo.sh            on drawn bones (phantoms); about 5 minutes on 2 CPU cores after the install
#   bash launch/demo.sh FOLDER     on your own folder in MURA's layout
# The same command again goes on where it stopped: nothing is drawn, converted, trained or predicted twice.
set -euo pipefail
folder=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
source launch/outcome.sh
stopped() { # stopped STATUS: at its end; what was asked to stop says so itself and ends with 3, or the page does
  [ -n "$asked" ] || return 0
  [ "$1" -eq 3 ] || echo "launch/demo.sh: stopped; the same command goes on" >&2
  exit 3
}
trap 'stopped $?' EXIT
bash launch/setup.sh train,page
[ -z "$asked" ] || exit 1
export PATH="$PWD/.venv/bin:$PATH"

stage() { # stage NAME COMMAND ...: run the command, write down its seconds
  local stage=$1 started=$SECONDS
  shift
  printf '\n== %s: %s\n' "$stage" "$*"
  patiently "$@"
  [ -z "$asked" ] || exit 1
  echo "$stage $((SECONDS - started))" >> "$seconds"
}

# 1. Radiographs: drawn here, or yours.
name=demo${folder:+-$(basename "$folder")}
shards=shards/$name run=runs/$name seconds=runs/$name.seconds
mkdir -p runs
if [ -z "$folder" ]; then
  folder=data/phantoms
  stage phantoms mura-dist phantoms "$folder" --studies "${STUDIES:-1200}" --size 128 --seed "${SEED:-0}"
fi

# 2. Shards: decoded and resized once, for training and serving alike.
stage shards mura-dist shards "$folder" "$shards" --size 64

# 3. What fits this folder and this machine (ranks, batch, epochs, where the valid split lies).
plan=$(python tools/demo/plan.py "$shards" "$folder")
eval "$plan" # ranks=... settings=(...) valid=...
train=(bash launch/local.sh "$ranks" launch/recipes/demo.toml "shards=$shards" "run=$run" "seed=${SEED:-0}" "${settings[@]}")

# 4. The untrained model, measured as the trained one will be: zero epochs, a checkpoint all the same.
if [ ! -e "$run/untrained/metrics.json" ]; then
  stage untrained "${train[@]}" epochs=0
  stage evaluate_untrained mura-dist evaluate "$run" "$shards" --checkpoint step-0 --out "$run/untrained" --no-gallery
fi

# 5. Train DenseNet-169 on all ranks; it goes on from the checkpoint of step 0.
stage train "${train[@]}"

# 6. Measure on valid, which chose nothing; export; predict a directory as a hospital would.
stage evaluate mura-dist evaluate "$run" "$shards"
stage export mura-dist export "$run"
stage predict mura-dist predict "$run/model.onnx" "$valid" --out "$run/predictions"

# 7. The summary, where everything lies, and the command that opens the page.
python tools/demo/summary.py "$run" "$seconds" "$valid"
