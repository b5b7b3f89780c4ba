# shellcheck shell=bash disable=SC2034 # the launch scripts use these variables
# Sourced by the launch scripts: the environment of ranks, each variable with its reason. A variable that is set already stays.
#   ranks=N; source launch/env.sh      ranks: number of ranks on this node
#   INTERFACE=eth1 bash launch/...     network between nodes, if a node has several

# Threads. By default torchrun gives each of several ranks one, and PyTorch alone gives each as many as there are cores.
: "${OMP_NUM_THREADS:=$((($(nproc) + ${ranks:-1} - 1) / ${ranks:-1}))}"

# The network. gloo uses that of the host name (on Debian often 127.0.1.1, which no other node reaches). NCCL uses InfiniBand if
# there is any, else the first that is neither loopback nor docker's. NCCL's "=" means exactly this name.
if [ -n "${INTERFACE:-}" ]; then
  : "${GLOO_SOCKET_IFNAME:=$INTERFACE}" "${NCCL_SOCKET_IFNAME:==$INTERFACE}"
  export GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME
fi

# NCCL then logs why it failed (which node, which card), a line each. By default it logs nothing. INFO logs more.
: "${NCCL_DEBUG:=WARN}"

# The signals that torchrun passes on to its ranks, which then save and exit. By default it passes no SIGUSR2, a scheduler's
# warning. Not exported: torchrun overwrites the variable, so the launch scripts pass --signals-to-handle.
: "${TORCHELASTIC_SIGNALS_TO_HANDLE:=SIGTERM,SIGINT,SIGUSR2}"

# After a restart (c10d) the ranks meet at a new store on the node that is now the first. By default torchrun reuses the store of
# the previous start. That store names ranks that have exited, and its node may be the lost one.
: "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:=1}"

export OMP_NUM_THREADS NCCL_DEBUG TORCH_DISABLE_SHARE_RDZV_TCP_STORE

# Not set here: TORCH_NCCL_ASYNC_ERROR_HANDLING, because mura_dist sets it (a lost peer fails a rank after collective_timeout_s).
# The defaults are right for TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC (a rank stuck in CUDA exits after some minutes), NCCL_IB_* (NCCL
# finds InfiniBand) and PYTORCH_ALLOC_CONF (every step has the same shapes, memory does not fragment).
