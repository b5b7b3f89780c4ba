"""How a run stands: running, stopped, done, failed; nothing where it has not begun.

python tools/run_state.py RECIPE.toml [key=value ...]             the words that train it
python tools/run_state.py --whole RECIPE.toml [key=value ...]     all that status.json says, in one line
python tools/run_state.py --setting NAME RECIPE.toml [...]        a setting, such as run or shards
"""

import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the page that asks has a line for it

from mura_dist.core import config
from mura_dist.core.errors import UserError, nearest
from mura_dist.training.run import Run


def main(words: list[str]) -> int:
    what, name = words[0] if words else "", ""
    if what == "--setting":
        name, words = words[1], words[2:]
    words = [word for word in words if not word.startswith("-")]  # without --quiet
    recipe = next((Path(word) for word in words if "=" not in word), None)
    settings = config.load(recipe, [word for word in words if "=" in word])
    if name:
        if name not in type(settings).model_fields:
            raise UserError(f"no setting {name!r}{nearest(name, type(settings).model_fields)}")
        print(getattr(settings, name))
        return 0
    status = Run(Path(settings.run), settings).status()
    print(json.dumps(status) if what == "--whole" else status.get("state", ""))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as refusal:
        print(f"tools/run_state.py: {refusal}", file=sys.stderr)
        sys.exit(2)
