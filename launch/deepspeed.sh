#!/usr/bin/env bash
# Train on the hosts of a hostfile, started from this host over ssh. A line of the hostfile: host1 slots=8 (its ranks).
#   bash launch/deepspeed.sh HOSTFILE RECIPE.toml [key=value ...]
# Needs pdsh on this host (apt-get install pdsh), ssh without a password to every host, and the same paths on all of them:
# checkout, shards, run.
# SSH_PORT=2222        sshd's port (default: 22, or as ~/.ssh/config says)
# MASTER=10.0.0.1      address of the first host as the others see it (default: the first that `hostname -I` prints there)
# INTERFACE=eth1       network between the hosts. The variables of env.sh reach all ranks; .deepspeed_env adds more, one
#                      NAME=value per line
# Exit status: 0 done; 2 invalid arguments; 3 stopped on request (RUN/status.json; the same command resumes); else deepspeed's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "launch/deepspeed.sh: missing arguments. Usage: bash launch/deepspeed.sh HOSTFILE RECIPE.toml [key=value ...]" >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then
  echo "launch/deepspeed.sh: no hostfile: $hostfile. Write one with a line per host: host1 slots=8" >&2
  exit 2
fi
if [ "$(grep -cE '^[^#]*slots=' "$hostfile")" -gt 1 ] && ! command -v pdsh > /dev/null; then
  echo "launch/deepspeed.sh: pdsh is missing. Run apt-get install pdsh, or name one host only." >&2
  exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"
ranks=$(grep -oE '^[^#]*slots=[0-9]+' "$hostfile" | head -n 1 | grep -oE '[0-9]+$' || echo 1) # of one host, for env.sh
source launch/env.sh
source launch/outcome.sh

# The environment of ranks on other hosts. deepspeed itself reads .deepspeed_env in the current folder and in $HOME.
export DS_ENV_FILE
DS_ENV_FILE=$(mktemp)
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(OMP_NUM_THREADS|NCCL_[A-Z_]*|TORCH_NCCL_[A-Z_]*|GLOO_SOCKET_IFNAME|TORCH_HOME)=' > "$DS_ENV_FILE"
cat ~/.deepspeed_env .deepspeed_env >> "$DS_ENV_FILE" 2> /dev/null || true

# On INT and TERM deepspeed sends TERM to every host's ranks, which save and exit. USR2 would kill deepspeed alone.
forward_signal() { kill -TERM "$child"; }
run_training deepspeed --hostfile "$hostfile" ${SSH_PORT:+--ssh_port "$SSH_PORT"} ${MASTER:+--master_addr "$MASTER"} \
  --module mura_dist.train -- "$@"
