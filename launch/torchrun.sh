#!/usr/bin/env bash
# Train over several nodes with torchrun: the same words on each node. All see one disk: checkout, recipe, shards, run.
#   NNODES=2 NODE_RANK=0 MASTER=node0:29500 bash launch/torchrun.sh RECIPE.toml [key=value ...]    static: nodes are numbered
#   NNODES=2:4 MASTER=node0:29500 bash launch/torchrun.sh RECIPE.toml [key=value ...]              c10d: they meet at MASTER
# RANKS=8         ranks on this node (default: its GPUs, or 1)
# ADDRESS=10.0.0.2, INTERFACE=eth1    where other nodes reach this one, by which network, if its own name does not say so
# ID=NAME         which training it is that meets at MASTER (c10d)
# RESTARTS=3      how often ranks may start again (c10d)
# RDZV_CONF=...   torchrun's --rdzv-conf, after the page's own: is_host=true where MASTER's node does not know itself by that name
#
# c10d is elastic: with MIN:MAX nodes, when one is lost (noticed in 15 s) or comes, the ranks begin again from the last checkpoint
# on as many as there are. A size works where global_batch is a multiple of micro_batch x ranks: of 128 and 16, with 4 ranks a
# node, 1 node and 2; with 3 the ranks refuse. MASTER's own node has to stay: the others meet on it; without it all end.
# PATIENCE=150    seconds without an answer of MASTER after which a node ends (c10d): more than the setting collective_timeout_s
# To stop a training, signal the page on every node: one that is asked alone saves and leaves, and the others go on (or, fewer
# than MIN, wait 10 minutes for it).
# Exit status: 0 done; 2 wrong words; 3 stopped on request (as RUN/status.json says; the same words go on); else torchrun's.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 1 ] || [ -z "${NNODES:-}" ] || [ -z "${MASTER:-}" ]; then
  echo "launch/torchrun.sh: what, how many, where? NNODES=2 NODE_RANK=0 MASTER=HOST bash launch/torchrun.sh RECIPE.toml ..." >&2
  exit 2
fi
[[ $MASTER == *:* ]] || MASTER+=:29500
ranks=${RANKS:-$(nvidia-smi -L 2> /dev/null | grep -c ^GPU || true)}
[ "$ranks" -gt 0 ] || ranks=1
source launch/env.sh
source launch/outcome.sh

# Seconds: nobody waits for the others longer than join_timeout (static: timeout); with MIN nodes there, last_call_timeout for
# more of them; read_timeout for an answer of MASTER's node, which may be gone.
if [ -n "${NODE_RANK:-}" ]; then
  meeting=(--rdzv-backend static --master-addr "${MASTER%:*}" --master-port "${MASTER##*:}" --node-rank "$NODE_RANK"
    --rdzv-conf "timeout=600${RDZV_CONF:+,$RDZV_CONF}")
else
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "${ID:-mura}" --max-restarts "${RESTARTS:-3}"
    --rdzv-conf "join_timeout=600,last_call_timeout=15,read_timeout=30${RDZV_CONF:+,$RDZV_CONF}")
  # A node that lost its power, or its link, says no farewell: torchrun would wait for the kernel to give up, 15 minutes or more.
  beside() {
    local answered='' pause
    exec {pause}<> <(:) # to sleep without a process that outlives this one
    while kill -0 "$child" 2> /dev/null; do
      if timeout 5 bash -c ": < /dev/tcp/${MASTER%:*}/${MASTER##*:}" 2> /dev/null; then
        answered=$SECONDS
      elif [ -n "$answered" ] && [ $((SECONDS - answered)) -gt "${PATIENCE:-150}" ]; then
        echo "launch/torchrun.sh: no answer of $MASTER for ${PATIENCE:-150} s: this node ends; the same words on all go on" >&2
        kill -TERM "$child"
        read -rt 15 -u "$pause" || true
        kill -KILL "$child" 2> /dev/null || true
      fi
      read -rt 5 -u "$pause" || true
    done
  }
fi
outcome .venv/bin/python launch/torchrun.py --nnodes "$NNODES" --nproc-per-node "$ranks" "${meeting[@]}" \
  ${ADDRESS:+--local-addr "$ADDRESS"} --signals-to-handle "$TORCHELASTIC_SIGNALS_TO_HANDLE" -m mura_dist.train -- "$@"
