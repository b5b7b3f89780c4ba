#!/usr/bin/env bash
# The tests that take longest (marker `nightly`), part by part; none takes more than 40 minutes on 2 cores.
#   bash tests/nightly.sh             all parts
#   bash tests/nightly.sh PART ...    some:
#     hosts      training over several hosts: network namespaces, ssh, cut links, lost hosts (needs root)
#     kills      trainings, conversions and predictions killed at many points, and resumed
#     launchers  mpirun, srun and torchrun in further combinations
#     training   settings, faults, large and compiled networks, benchmarks
#     files      200,000 files, MURA's own tree, disks that fill up at other points
#     scaling    tools/scaling
#     fuzz       broken radiographs
#     system     the wheel in an empty environment, further cases of the page in a browser and behind nginx, the script that measures a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
parts=(hosts kills launchers training files scaling fuzz system)
for part in "$@"; do
  if [[ " ${parts[*]} " != *" $part "* ]]; then
    echo "tests/nightly.sh: no part '$part'; name some of: ${parts[*]}" >&2
    exit 2
  fi
done
[ $# -eq 0 ] || parts=("$@")
bash tests/debian.sh chromium:chromium ip:iproute2 sshd:openssh-server ssh:openssh-client pdsh:pdsh sshfs:sshfs mpirun:openmpi-bin nginx:nginx
bash launch/setup.sh train,dev,page
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE=
status=0
for part in "${parts[@]}"; do
  echo "tests/nightly.sh: $part"
  pytest -n 2 -m "nightly(part='$part')" || status=$?
done
exit "$status"
