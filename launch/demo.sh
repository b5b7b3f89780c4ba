#!/usr/bin/env bash
# Run every command of mura_dist once on this machine: draw, convert, train, evaluate, export, predict.
#   bash launch/demo.sh            on drawn bones (phantoms); about 6 minutes on 2 CPU cores after the install
#   bash launch/demo.sh FOLDER     on your own folder in MURA's layout
# The same command resumes. A finished step is skipped unless its files changed.
set -euo pipefail
folder=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
source launch/outcome.sh
report_stop() { # report_stop STATUS: at the end of this script; a command that exited with 3 has reported the stop itself
  [ -n "$received" ] || return 0
  [ "$1" -eq 3 ] || echo "launch/demo.sh: stopped. The same command resumes." >&2
  exit 3
}
trap 'report_stop $?' EXIT
bash launch/setup.sh train,page
[ -z "$received" ] || exit 1
export PATH="$PWD/.venv/bin:$PATH" MURA_DIST_TERMS=end # the terms of use are printed once, by the last command

name=demo${folder:+-$(basename "$folder")}
shards=shards/$name run=runs/$name seconds=runs/$name.seconds log=runs/$name.log stamps=runs/$name.steps
step=0 steps=8 drawings=data/phantoms drawn=(--studies "${STUDIES:-1400}" --size 192 --seed "${SEED:-0}")
if [ -n "$folder" ]; then
  steps=7 drawn=()
elif [ -e "$drawings" ] && [ "$(cat "$stamps/drawn" 2> /dev/null)" != "${drawn[*]}" ]; then
  # An older version of this script, another SEED or another STUDIES drew them. Two sets are never mixed.
  echo "launch/demo.sh: $drawings holds other drawings than those of ${drawn[*]}. To draw and train again: rm -r $drawings $shards $run*" >&2
  exit 2
fi
mkdir -p "$stamps"
[ -n "$folder" ] || echo "${drawn[*]}" > "$stamps/drawn"
code=(mura_dist launch/recipes/demo.toml)

digest() { # digest PATH ...: a hash of the names, sizes and times of all files below; a missing path counts as empty
  { find "$@" ! -type d ! -name '*.pyc' -printf '%p %s %T@\n' 2> /dev/null || true; } | sort | sha256sum | cut -d' ' -f1
}

begin() { # begin TEXT TIME: print the step; TIME is its duration with the drawings
  step=$((step + 1))
  printf '%d of %d: %s%s\n' "$step" "$steps" "$1" "${drawn[0]:+, about $2}"
}

# stage NAME INPUT ... -- OUTPUT ... -- COMMAND ...: run the command unless its inputs and outputs are unchanged, and record its
# seconds. Its stdout goes to the log, progress and errors to the terminal.
stage() {
  local name=$1 inputs=() outputs=() before command status=0 started=$SECONDS
  shift
  while [ "$1" != -- ]; do inputs+=("$1"); shift; done
  shift
  while [ "$1" != -- ]; do outputs+=("$1"); shift; done
  shift
  command=$(printf '%s\n' "$@" | sha256sum | cut -d' ' -f1)
  before="$command $(digest "${inputs[@]}")"
  if [ "$(cat "$stamps/$name" 2> /dev/null)" = "$before $(digest "${outputs[@]}")" ]; then
    echo "  already done"
    return
  fi
  [ -z "$received" ] || exit 1
  printf '\n== %s: %s\n' "$name" "$*" >> "$log"
  if [ "$name" = train ]; then run_to_end "$@" || status=$?; else run_to_end "$@" >> "$log" || status=$?; fi
  echo "$name $((SECONDS - started))" >> "$seconds"
  [ "$status" -eq 0 ] || exit "$status"
  [ -z "$received" ] || exit 1
  echo "$before $(digest "${outputs[@]}")" > "$stamps/$name"
}

# Radiographs: drawn, or those of FOLDER.
if [ -z "$folder" ]; then
  folder=$drawings
  begin "drawing phantom radiographs" "20 s"
  stage phantoms "${code[@]}" -- "$folder" -- mura-dist phantoms "$folder" "${drawn[@]}"
fi

# Shards. At 128 px the activation map has 4 x 4 cells.
begin "converting the radiographs to shards" "5 s"
stage shards "${code[@]}" "$folder" -- "$shards" -- mura-dist shards "$folder" "$shards" --size 128 --tune 0.2

# Choose ranks, batch and epochs for this folder and this machine, and find the valid split.
plan=$stamps/plan.sh
planned=$(digest "${code[@]}" tools/demo "$shards" "$folder" /dev/nvidia[0-9]*)
if ! grep -qsx "# $planned" "$plan"; then
  [ -z "$received" ] || exit 1
  text=$(python tools/demo/plan.py "$shards" "$folder") || exit
  printf '%s\n# %s\n' "$text" "$planned" > "$plan"
fi
eval "$(cat "$plan")" # ranks=... settings=(...) valid=...
train=(bash launch/local.sh "$ranks" launch/recipes/demo.toml "shards=$shards" "run=$run" "seed=${SEED:-0}" "${settings[@]}")

# Evaluate the untrained model like the trained one. Zero epochs write a checkpoint, which training deletes later.
once() { # once NAME ...: a stage, unless the untrained model was evaluated
  if [ -e "$run/untrained/metrics.json" ]; then echo "  already done"; else stage "$@"; fi
}
begin "creating an untrained network as the baseline" "15 s"
once untrained "${code[@]}" "$shards" -- "$run/checkpoints" -- "${train[@]}" epochs=0
begin "evaluating the untrained network" "25 s"
once evaluate_untrained "${code[@]}" "$shards" -- "$run/untrained" -- \
  mura-dist evaluate "$run" "$shards" --checkpoint step-0 --out "$run/untrained" --no-gallery

# Train on all ranks from the checkpoint of step 0.
begin "training" "4 minutes"
stage train "${code[@]}" "$shards" -- "$run/checkpoints" "$run/metrics.jsonl" -- "${train[@]}"

# Evaluate on valid, which is only reported. Export. Predict a directory from the exported file.
begin "evaluating the trained network and writing the report" "35 s"
stage evaluate "${code[@]}" "$shards" "$run/checkpoints" -- "$run/metrics.json" "$run/report.html" "$run/gallery.html" -- \
  mura-dist evaluate "$run" "$shards"
begin "exporting to ONNX and comparing with torch" "20 s"
stage export "${code[@]}" "$run/checkpoints" "$run/metrics.json" -- "$run/model.onnx" -- mura-dist export "$run"
begin "predicting the valid folder with the ONNX file" "15 s"
stage predict "${code[@]}" "$run/model.onnx" "$valid" -- "$run/predictions" -- \
  mura-dist predict "$run/model.onnx" "$valid" --out "$run/predictions"

# Print five lines: AUROC, kappa, report, page, time.
python tools/demo/summary.py "$run" "$seconds" "$valid"
