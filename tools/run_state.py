"""Print the state of a run: running, stopped, done, failed, or an empty line before its first start.

python tools/run_state.py RECIPE.toml [key=value ...]             the arguments of `mura-dist train`
python tools/run_state.py --whole RECIPE.toml [key=value ...]     print status.json in one line
python tools/run_state.py --setting NAME RECIPE.toml [...]        print a setting, such as run or shards
"""

import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C: the launch script reports it

from mura_dist.core import config
from mura_dist.core.errors import UserError, nearest
from mura_dist.training.run import Run


def main(arguments: list[str]) -> int:
    """Print what the arguments ask for. Return the exit status."""
    option, name = arguments[0] if arguments else "", ""
    if option == "--setting":
        name, arguments = arguments[1], arguments[2:]
    arguments = [argument for argument in arguments if not argument.startswith("-")]  # without --quiet
    recipe = next((Path(argument) for argument in arguments if "=" not in argument), None)
    settings = config.load(recipe, [argument for argument in arguments if "=" in argument])
    if name:
        if name not in type(settings).model_fields:
            raise UserError(f"no setting {name!r}{nearest(name, type(settings).model_fields)}")
        print(getattr(settings, name))
        return 0
    status = Run(Path(settings.run), settings).status()
    print(json.dumps(status) if option == "--whole" else status.get("state", ""))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"tools/run_state.py: {error}", file=sys.stderr)
        sys.exit(2)
