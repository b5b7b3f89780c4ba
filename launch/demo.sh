#!/usr/bin/env bash
# Everything mura_dist does, once, on this machine:
#   bash launch/demo.sh            on drawn bones (phantoms); about 6 minutes on 2 CPU cores after the install
#   bash launch/demo.sh FOLDER     on your own folder in MURA's layout
# The same command again resumes: a step whose files are as they were when it ended is not started again.
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
export PATH="$PWD/.venv/bin:$PATH" MURA_DIST_TERMS=end # the commands leave the terms of use to the last line here

name=demo${folder:+-$(basename "$folder")}
shards=shards/$name run=runs/$name seconds=runs/$name.seconds log=runs/$name.log stamps=runs/$name.steps
step=0 steps=8 drawings=data/phantoms drawn=(--studies "${STUDIES:-1400}" --size 192 --seed "${SEED:-0}")
if [ -n "$folder" ]; then
  steps=7 drawn=()
elif [ -e "$drawings" ] && [ "$(cat "$stamps/drawn" 2> /dev/null)" != "${drawn[*]}" ]; then
  # An older version of this page left them, or another SEED or STUDIES: nothing of two sets is mixed.
  echo "launch/demo.sh: $drawings: not known to hold the drawings of ${drawn[*]}; to draw and train anew: rm -r $drawings $shards $run*" >&2
  exit 2
fi
mkdir -p "$stamps"
[ -n "$folder" ] || echo "${drawn[*]}" > "$stamps/drawn"
code=(mura_dist launch/recipes/demo.toml)

digest() { # digest PATH ...: of the names, sizes and times of all files below; a path that is not there has none
  { find "$@" ! -type d ! -name '*.pyc' -printf '%p %s %T@\n' 2> /dev/null || true; } | sort | sha256sum | cut -d' ' -f1
}

begin() { # begin TEXT TIME: say which step this is; TIME is that of the drawings
  step=$((step + 1))
  printf '%d of %d: %s%s\n' "$step" "$steps" "$1" "${drawn[0]:+, about $2}"
}

# stage NAME INPUT ... -- OUTPUT ... -- COMMAND ...: run the command, unless inputs and outputs are as it left them; write down its
# seconds. What it prints goes to the log, progress and errors to the terminal.
stage() {
  local name=$1 inputs=() outputs=() before words status=0 started=$SECONDS
  shift
  while [ "$1" != -- ]; do inputs+=("$1"); shift; done
  shift
  while [ "$1" != -- ]; do outputs+=("$1"); shift; done
  shift
  words=$(printf '%s\n' "$@" | sha256sum | cut -d' ' -f1)
  before="$words $(digest "${inputs[@]}")"
  if [ "$(cat "$stamps/$name" 2> /dev/null)" = "$before $(digest "${outputs[@]}")" ]; then
    echo "  done before"
    return
  fi
  [ -z "$asked" ] || exit 1
  printf '\n== %s: %s\n' "$name" "$*" >> "$log"
  if [ "$name" = train ]; then patiently "$@" || status=$?; else patiently "$@" >> "$log" || status=$?; fi
  echo "$name $((SECONDS - started))" >> "$seconds"
  [ "$status" -eq 0 ] || exit "$status"
  [ -z "$asked" ] || exit 1
  echo "$before $(digest "${outputs[@]}")" > "$stamps/$name"
}

# Radiographs: drawn here, or yours.
if [ -z "$folder" ]; then
  folder=$drawings
  begin "drawing bones, some of them broken" "20 s"
  stage phantoms "${code[@]}" -- "$folder" -- mura-dist phantoms "$folder" "${drawn[@]}"
fi

# Shards: decoded and resized once, for training and serving alike. 128 px are 4 x 4 cells of the activation map.
begin "shards, every radiograph decoded and resized once" "5 s"
stage shards "${code[@]}" "$folder" -- "$shards" -- mura-dist shards "$folder" "$shards" --size 128 --tune 0.2

# What fits this folder and this machine (ranks, batch, epochs, where the valid split lies).
plan=$stamps/plan.sh
planned=$(digest "${code[@]}" tools/demo "$shards" "$folder" /dev/nvidia[0-9]*)
if ! grep -qsx "# $planned" "$plan"; then
  [ -z "$asked" ] || exit 1
  text=$(python tools/demo/plan.py "$shards" "$folder") || exit
  printf '%s\n# %s\n' "$text" "$planned" > "$plan"
fi
eval "$(cat "$plan")" # ranks=... settings=(...) valid=...
train=(bash launch/local.sh "$ranks" launch/recipes/demo.toml "shards=$shards" "run=$run" "seed=${SEED:-0}" "${settings[@]}")

# The untrained model, measured as the trained one will be: zero epochs, a checkpoint all the same. Training deletes that one later.
once() { # once NAME ...: a stage, unless the untrained model was measured
  if [ -e "$run/untrained/metrics.json" ]; then echo "  done before"; else stage "$@"; fi
}
begin "an untrained network, to compare with" "15 s"
once untrained "${code[@]}" "$shards" -- "$run/checkpoints" -- "${train[@]}" epochs=0
begin "measuring the untrained network" "25 s"
once evaluate_untrained "${code[@]}" "$shards" -- "$run/untrained" -- \
  mura-dist evaluate "$run" "$shards" --checkpoint step-0 --out "$run/untrained" --no-gallery

# DenseNet on all ranks; it goes on from the checkpoint of step 0.
begin "training" "4 minutes"
stage train "${code[@]}" "$shards" -- "$run/checkpoints" "$run/metrics.jsonl" -- "${train[@]}"

# Measure on valid, which chose nothing; export; predict a directory as a hospital would.
begin "measuring the trained network, the report" "35 s"
stage evaluate "${code[@]}" "$shards" "$run/checkpoints" -- "$run/metrics.json" "$run/report.html" "$run/gallery.html" -- \
  mura-dist evaluate "$run" "$shards"
begin "exporting it as an ONNX file, compared with torch" "20 s"
stage export "${code[@]}" "$run/checkpoints" "$run/metrics.json" -- "$run/model.onnx" -- mura-dist export "$run"
begin "predicting the valid folder from that file alone" "15 s"
stage predict "${code[@]}" "$run/model.onnx" "$valid" -- "$run/predictions" -- \
  mura-dist predict "$run/model.onnx" "$valid" --out "$run/predictions"

# Five lines: what was reached, the report, the page, the time.
python tools/demo/summary.py "$run" "$seconds" "$valid"
