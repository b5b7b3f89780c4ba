#!/usr/bin/env bash
# From a fresh machine: install, format, lint, types, tests.
#   bash tests/run.sh          what is quick; meant to take under 15 minutes on 2 cores
#   bash tests/run.sh --all    also the slow ones (marker `slow`): what CI runs
set -euo pipefail
cd "$(dirname "$0")/.."
select=(-m "not slow")
[ "${1:-}" = "--all" ] && { select=(); shift; }
bash launch/setup.sh train,dev,page
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # the suite starts hundreds of processes: our modules are compiled once, not in each

ruff format --check .
ruff check .
mypy
[ $# -eq 0 ] || exec pytest "${select[@]}" "$@" # some of them, as asked for
# What measures, or counts the seconds after a signal, one after the other; the rest three at a time, a file to each: many wait. The
# longest begin, so that at the end nobody waits for one file.
alone=(tests/test_{bench,chaos,page,runs,scaling,threads}.py)
together=(tests/test_{resume,hosts,train,faults,predict}.py)
for file in tests/test_*.py; do
  [[ " ${alone[*]} ${together[*]} " == *" $file "* ]] || together+=("$file")
done
pytest -n 3 --dist loadfile --no-loadscope-reorder "${select[@]}" "${together[@]}"
exec pytest "${select[@]}" "${alone[@]}"
