#!/usr/bin/env bash
# Train on this machine with N ranks: one a GPU, or as many as you like on a CPU.
#   bash launch/local.sh N RECIPE.toml [key=value ...]
# Needs .venv (launch/setup.sh). The same command again goes on.
# Exit status: 0 done; 2 wrong words; 3 stopped on request (as RUN/status.json says); else torchrun's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "launch/local.sh: how many ranks, and what? bash launch/local.sh N RECIPE.toml [key=value ...]" >&2
  exit 2
fi
ranks=$1
shift
source launch/env.sh
source launch/outcome.sh
outcome .venv/bin/python launch/torchrun.py --standalone --nproc-per-node "$ranks" \
  --signals-to-handle "$TORCHELASTIC_SIGNALS_TO_HANDLE" -m mura_dist.train -- "$@"
