# shellcheck shell=bash disable=SC2034 # pages use what is set here
# Sourced by the pages beside it: the environment of ranks, each variable with its reason. What is set already stays.
#   ranks=N; source launch/env.sh      ranks: how many run on this node
#   INTERFACE=eth1 bash launch/...     the network between nodes, where a node has several

# Threads: torchrun gives each of several ranks one where nothing is said, PyTorch alone gives each as many as there are cores.
: "${OMP_NUM_THREADS:=$((($(nproc) + ${ranks:-1} - 1) / ${ranks:-1}))}"

# The network. gloo takes the one that the node's own name leads to (on Debian often 127.0.1.1, which no other node reaches);
# NCCL takes InfiniBand where it is, else the first that is neither loopback nor docker's. NCCL's "=" means this very name.
if [ -n "${INTERFACE:-}" ]; then
  : "${GLOO_SOCKET_IFNAME:=$INTERFACE}" "${NCCL_SOCKET_IFNAME:==$INTERFACE}"
  export GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
fi

# NCCL says why it failed (which node, which card), one line each; silent by itself. INFO where WARN is not enough.
: "${NCCL_DEBUG:=WARN}"

# The signals torchrun passes on to its ranks, which then save and leave; by itself it passes no SIGUSR2, a scheduler's warning.
# Not exported: torchrun sets the variable anew from its option, so pages give --signals-to-handle.
: "${TORCHELASTIC_SIGNALS_TO_HANDLE:=SIGTERM,SIGINT,SIGUSR2}"

# After a restart (c10d) ranks meet at a new place, of the node that is first now. By itself torchrun sends them to that of the
# start before: what is written there names ranks that have ended, and its node may be the one that was lost.
: "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:=1}"

export OMP_NUM_THREADS NCCL_DEBUG TORCH_DISABLE_SHARE_RDZV_TCP_STORE

# Not here: TORCH_NCCL_ASYNC_ERROR_HANDLING (mura_dist sets it: a rank whose peer is lost says so after collective_timeout_s). What PyTorch
# and NCCL do by themselves is right: TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC (a rank stuck in CUDA ends after some minutes), NCCL_IB_* (NCCL
# finds InfiniBand); PYTORCH_ALLOC_CONF (every step has the same shapes, memory does not fragment).
