#!/usr/bin/env bash
# Train on several nodes with torchrun. Run the same command on each node. All see one disk: checkout, recipe, shards, run.
#   NNODES=2 NODE_RANK=0 MASTER=node0:29500 bash launch/torchrun.sh RECIPE.toml [key=value ...]    static: numbered nodes
#   NNODES=2:4 MASTER=node0:29500 bash launch/torchrun.sh RECIPE.toml [key=value ...]              elastic (c10d)
# RANKS=8         ranks on this node (default: its GPUs, or 1)
# ADDRESS=10.0.0.2, INTERFACE=eth1    address and network at which other nodes reach this one (default: by its host name)
# ID=NAME         name of the training that meets at MASTER (c10d; default: mura)
# RESTARTS=3      how often the ranks may restart (c10d)
# RDZV_CONF=...   more options for torchrun's --rdzv-conf, such as is_host=true if MASTER's node does not know that name
#
# c10d is elastic (NNODES=MIN:MAX). If a node is lost (noticed in 15 s) or joins, the ranks restart from the last checkpoint on
# the present nodes. global_batch has to be a multiple of micro_batch x ranks: with 128, 16 and 4 ranks per node, 1 or 2 nodes
# work and 3 are refused. MASTER's node has to stay, because the others meet on it. If it is lost, all nodes exit.
# PATIENCE=150    seconds without an answer of MASTER after which a node exits (c10d); more than the setting collective_timeout_s
# To stop a training, signal this script on every node. If one node alone is signaled, it saves and exits, and the others
# continue. With fewer than MIN nodes they wait 10 minutes for it.
# Exit status: 0 done; 2 invalid arguments; 3 stopped on request (RUN/status.json; the same command resumes); else torchrun's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ -z "${NNODES:-}" ] || [ -z "${MASTER:-}" ]; then
  echo "launch/torchrun.sh: missing arguments. Usage: NNODES=2 MASTER=HOST bash launch/torchrun.sh RECIPE.toml ..." >&2
  exit 2
fi
[[ $MASTER == *:* ]] || MASTER+=:29500
ranks=${RANKS:-$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)}
[ "$ranks" -gt 0 ] || ranks=1
source launch/env.sh
source launch/outcome.sh

# Seconds. A node waits for the others at most join_timeout (static: timeout). With MIN nodes present it waits last_call_timeout
# for more of them. It waits read_timeout for an answer of MASTER's node, which may be lost.
if [ -n "${NODE_RANK:-}" ]; then
  meeting=(--rdzv-backend static --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}" --node-rank "$NODE_RANK"
    --rdzv-conf "timeout=600${RDZV_CONF:+,$RDZV_CONF}")
else
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${ID:-mura}" --max-restarts "${RESTARTS:-3}"
    --rdzv-conf "join_timeout=600,last_call_timeout=15,read_timeout=30${RDZV_CONF:+,$RDZV_CONF}")
  # A node without power or link closes no connection. torchrun would wait for the kernel's timeout, 15 minutes or more.
  monitor_child() {
    local answered='' pause
    exec {pause}<> <(:) # for sleeping without a child process that outlives this one
    while kill -0 "$child" 2> /dev/null; do
      if timeout 5 bash -c ": < /dev/tcp/${MASTER%:*}/${MASTER##*:}" 2> /dev/null; then
        answered=$SECONDS
      elif [ -n "$answered" ] && [ $((SECONDS - answered)) -gt "${PATIENCE:-150}" ]; then
        echo "launch/torchrun.sh: no answer of $MASTER for ${PATIENCE:-150} s, exiting. Repeat the command on all nodes." >&2
        kill -TERM "$child"
        read -rt 15 -u "$pause" || true
        kill -KILL "$child" 2> /dev/null || true
      fi
      read -rt 5 -u "$pause" || true
    done
  }
fi
run_training .venv/bin/python launch/torchrun.py --nnodes "$NNODES" --nproc-per-node "$ranks" "${meeting[@]}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} --signals-to-handle "$TORCHELASTIC_SIGNALS_TO_HANDLE" -m mura_dist.train -- "$@"
