#!/usr/bin/env bash
# The whole suite on a fresh machine: install, format, lint, types, tests.
#   bash tests/run.sh          under 15 minutes on 2 cores
#   bash tests/run.sh --all    also the slow ones (marker `slow`): what CI runs
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-m "not slow")
[ "${1:-}" = "--all" ] && { select=(); shift; }
bash launch/setup.sh train,dev
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy
# Two at a time, a file to each: most tests are one process that computes, or several that wait.
exec pytest -n 2 --dist loadfile "${select[@]}" "$@"
