#!/usr/bin/env bash
# Train on this machine with N ranks: one per GPU, or any number on a CPU.
#   bash launch/local.sh N RECIPE.toml [key=value ...]
# Needs .venv (launch/setup.sh). The same command resumes.
# Exit status: 0 done; 2 invalid arguments; 3 stopped on request (RUN/status.json; the same command resumes); else torchrun's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "launch/local.sh: missing arguments. Usage: bash launch/local.sh N RECIPE.toml [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift
source launch/env.sh
source launch/outcome.sh
run_training .venv/bin/python launch/torchrun.py --standalone --nproc-per-node "$ranks" \
  --signals-to-handle "$TORCHELASTIC_SIGNALS_TO_HANDLE" -m mura_dist.train -- "$@"
