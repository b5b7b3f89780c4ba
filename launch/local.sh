#!/usr/bin/env bash
# Train on this machine with N ranks: one a GPU, or as many as you like on a CPU.
#   bash launch/local.sh N RECIPE.toml [key=value ...]
# The same command again goes on; RUN/status.json says how the run stands.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:?how many ranks? bash launch/local.sh N RECIPE.toml}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + ranks - 1) / ranks ))} # else torchrun gives each rank one thread
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR2} # passed on: save and stop
exec .venv/bin/torchrun --standalone --nproc-per-node "$ranks" -m mura_dist.train "$@"
