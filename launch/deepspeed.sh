#!/usr/bin/env bash
# Train over the hosts of a hostfile (a line each: "host1 slots=8", slots: its ranks), started from this one over ssh.
#   bash launch/deepspeed.sh HOSTFILE RECIPE.toml [key=value ...]
# Needs pdsh here (apt-get install pdsh), ssh without password to every host, and the same paths on all: checkout, shards, run.
# SSH_PORT=2222        where sshd listens, if not at 22 (else ~/.ssh/config says how a host is reached)
# MASTER=10.0.0.1      the first host as the others see it (default: what `hostname -I` says there first)
# INTERFACE=eth1       the network between them: env.sh, whose variables go along; more: .deepspeed_env, a NAME=value a line
# Exit status: 0 done; 2 wrong words; 3 stopped on request (as RUN/status.json says; the same words go on); else deepspeed's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "launch/deepspeed.sh: which hosts, and what? bash launch/deepspeed.sh HOSTFILE RECIPE.toml [key=value ...]" >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then
  echo "launch/deepspeed.sh: no hostfile $hostfile; write one, a line a host: host1 slots=8" >&2
  exit 2
fi
if [ "$(grep -cE '^[^#]*slots=' "$hostfile")" -gt 1 ] && ! command -v pdsh > /dev/null; then
  echo "launch/deepspeed.sh: several hosts want pdsh, which is not here; apt-get install pdsh, or give one host" >&2
  exit 2
fi
export PATH="$PWD/.venv/bin:$PATH"
ranks=$(grep -oE '^[^#]*slots=[0-9]+' "$hostfile" | head -n 1 | grep -oE '[0-9]+$' || echo 1) # a host's, for its threads
source launch/env.sh
source launch/outcome.sh

# What ranks on other hosts are to know; deepspeed looks for this file in the folder it starts in, and at home.
export DS_ENV_FILE
DS_ENV_FILE=$(mktemp)
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(OMP_NUM_THREADS|NCCL_[A-Z_]*|TORCH_NCCL_[A-Z_]*|GLOO_SOCKET_IFNAME|TORCH_HOME)=' > "$DS_ENV_FILE"
cat ~/.deepspeed_env .deepspeed_env >> "$DS_ENV_FILE" 2> /dev/null || true

# deepspeed hears INT and TERM: it has every host's ranks sent a TERM, which save and leave. Of USR2 it would die, and they go on.
pass() { kill -TERM "$child"; }
outcome deepspeed --hostfile "$hostfile" ${SSH_PORT:+--ssh_port "$SSH_PORT"} ${MASTER:+--master_addr "$MASTER"} \
  --module mura_dist.train -- "$@"
