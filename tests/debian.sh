#!/usr/bin/env bash
# Install the Debian packages of programs that tests start, where they are missing; tests skip without them, and say so.
#   bash tests/debian.sh PROGRAM:PACKAGE ...
set -euo pipefail
missing=()
for program in "$@"; do
  PATH=$PATH:/usr/sbin command -v "${program%:*}" > /dev/null || missing+=("${program#*:}")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
sudo=$([ "$(id -u)" = 0 ] || echo sudo)
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null ||
  echo "tests/debian.sh: not here, and not to be had: ${missing[*]}" >&2
