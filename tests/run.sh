#!/usr/bin/env bash
# From a fresh machine: install, format, lint, types, tests.
#   bash tests/run.sh          the quick tests; meant to take at most 8 minutes on 2 cores, after the install
#   bash tests/run.sh --all    also the slow ones (marker `slow`): what CI runs. The longest are in tests/nightly.sh
#   bash tests/run.sh [--all] WORDS ...    pytest with these words, nothing else
set -euo pipefail
cd "$(dirname "$0")/.."
select="not slow and not nightly"
if [ "${1:-}" = --all ]; then
  select="not nightly"
  shift
fi
bash launch/setup.sh train,dev,docs,page
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONDONTWRITEBYTECODE= # the suite starts hundreds of processes: our modules are compiled once, not in each
[ $# -eq 0 ] || exec pytest -m "$select" "$@"

# Format, lint, types and spelling beside the tests; what they found is printed only where they fail, so that pytest has the last word.
found=$(mktemp)
{ ruff format --check . && ruff check . && mypy && codespell; } > "$found" 2>&1 &
checks=$! status=0
trap 'kill "$checks" 2> /dev/null || true; rm -f "$found"' EXIT
# Three at a time on two cores: many tests wait. Each worker is handed the longest test or file that is left (helpers/scheduling.py).
pytest -n 3 -m "$select" || status=$?
if ! wait "$checks"; then
  cat "$found" >&2
  echo "tests/run.sh: ruff, mypy or codespell failed, as above" >&2
  status=1
fi
exit "$status"
