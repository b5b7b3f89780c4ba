#!/usr/bin/env bash
# Train over the hosts of a hostfile ("host1 slots=8" a line; passwordless ssh, the same paths everywhere).
#   bash launch/deepspeed.sh HOSTFILE RECIPE.toml [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
hostfile=${1:?which hostfile? bash launch/deepspeed.sh HOSTFILE RECIPE.toml}
shift
export PATH="$PWD/.venv/bin:$PATH"
source launch/outcome.sh # exit status: 0 done; 3 stopped on request (as RUN/status.json says); else deepspeed's
outcome deepspeed --hostfile "$hostfile" --module mura_dist.train -- "$@"
