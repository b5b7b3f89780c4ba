"""How a run stands: running, stopped, done, failed; nothing where it has not begun.

python tools/run_state.py RECIPE.toml [key=value ...]    the words that train it
"""

import sys
from pathlib import Path

from mura_dist import config
from mura_dist.refusal import Refusal
from mura_dist.runs import Run


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]  # without --quiet
    recipe = next((Path(word) for word in words if "=" not in word), None)
    settings = config.load(recipe, [word for word in words if "=" in word])
    print(Run(Path(settings.run), settings).status().get("state", ""))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refusal as refusal:
        print(f"tools/run_state.py: {refusal}", file=sys.stderr)
        sys.exit(2)
