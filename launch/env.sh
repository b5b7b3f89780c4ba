# Sourced by the pages beside it: the environment of ranks, each variable with its reason. What is set already stays.
#   ranks=N; source launch/env.sh      ranks: how many run on this node

# torchrun gives each of several ranks one thread, where nothing is said; PyTorch alone would give each all of them.
: "${OMP_NUM_THREADS:=$((($(nproc) + ${ranks:-1} - 1) / ${ranks:-1}))}"
export OMP_NUM_THREADS

# What torchrun passes on to its ranks, which then save and leave; by itself it passes no SIGUSR2, a scheduler's warning. Not
# exported: torchrun sets the variable by its option, whatever was there, so pages give --signals-to-handle.
: "${TORCHELASTIC_SIGNALS_TO_HANDLE:=SIGTERM,SIGINT,SIGUSR2}"
