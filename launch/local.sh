#!/usr/bin/env bash
# Train on this machine with N ranks: one a GPU, or as many as you like on a CPU.
#   bash launch/local.sh N RECIPE.toml [key=value ...]
# The same command again goes on. Exit status: 0 done; 3 stopped on request (as RUN/status.json says); else torchrun's.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:?how many ranks? bash launch/local.sh N RECIPE.toml}
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + ranks - 1) / ranks ))} # else torchrun gives each rank one thread
signals=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR2} # passed on: save and stop; torchrun overwrites the variable itself
source launch/outcome.sh
outcome .venv/bin/torchrun --standalone --nproc-per-node "$ranks" --signals-to-handle "$signals" -m mura_dist.train -- "$@"
