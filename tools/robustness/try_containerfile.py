"""Run the steps of launch/Containerfile without a container engine, as root in a folder with an unpacked system.

    debootstrap --variant=minbase --include=python3,python3-venv bookworm ROOT
    python tools/robustness/try_containerfile.py ROOT [--bind PATH ...] [--env NAME=VALUE ...] [-- WORDS ...]

ROOT contains the system of FROM. RUN, COPY, WORKDIR, USER and ENV run in it by chroot, in new namespaces of processes and mounts.
Then ENTRYPOINT runs with each of the WORDS, one command line per word, or with CMD if there is none. --bind mounts a file of this
machine, such as /etc/pip.conf, at the same path. --env sets a variable for RUN. The tool changes ROOT and does not delete it.
"""

import argparse
import json
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "launch" / "Containerfile"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INSIDE = """
root=$1; owner=$2; shift 2
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do mount --rbind "$1" "$root$1"; shift; done
shift
exec chroot --userspec="$owner" "$root" "$@"
"""  # in a new mount namespace, which disappears with the process


@dataclass
class Container:
    """The state of the container after the steps so far."""

    root: Path
    binds: list[Path]
    build_env: dict[str, str]
    user: str = "root"
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)

    def execute(self, word: str, rest: str) -> None:
        """Run an instruction.

        Raises:
            ValueError: launch/Containerfile does not use this instruction.
        """
        if word == "RUN":
            self.run(["/bin/sh", "-c", rest], self.build_env)
        elif word == "COPY":
            self.copy(shlex.split(rest))
        elif word == "WORKDIR":
            self.workdir = rest
            self.host_path(rest).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            self.user = rest
        elif word == "ENV":
            name, _, value = rest.partition("=")
            self.env[name] = string.Template(value).safe_substitute(self.env)
        elif word == "ENTRYPOINT":
            self.entrypoint = json.loads(rest)
        elif word == "CMD":
            self.cmd = json.loads(rest)
        elif word != "FROM":
            raise ValueError(f"unknown instruction: {word}. Add it to Container.execute.")

    def host_path(self, path: str) -> Path:
        """Return the path on the host of a path in the container."""
        return self.root / (Path(self.workdir) / path).relative_to("/")

    def account(self) -> tuple[str, str, str]:
        """Return (user id, group id, home) of the user."""
        lines = (self.root / "etc/passwd").read_text().splitlines()
        fields = next(line.split(":") for line in lines if line.split(":")[0] == self.user)
        return fields[2], fields[3], fields[5]

    def run(self, command: list[str], extra: dict[str, str]) -> None:
        """Run a command in the container with additional environment variables."""
        number, group, home = self.account()
        for bind in self.binds:
            target = self.root / bind.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.mkdir(exist_ok=True) if bind.is_dir() else target.touch()
        env = [f"{name}={value}" for name, value in ({"HOME": home} | self.env | extra).items()]
        shell = ["env", "-i", *env, "sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *command]
        namespace_command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", _INSIDE, "sh"]
        subprocess.run(
            [*namespace_command, str(self.root), f"{number}:{group}", *map(str, self.binds), "--", *shell], check=True
        )

    def copy(self, arguments: list[str]) -> None:
        """Run COPY [--chown=...] SOURCE ... TARGET, for the files that the ignore file allows."""
        *sources, target = [word for word in arguments if not word.startswith("--")]
        for source in sources:
            if source != "." and (ROOT / source).is_dir():
                raise ValueError(f"cannot copy a folder other than `.`: COPY {source}")
            for path in sorted(files_of(source)):
                name = path.relative_to(ROOT if source == "." else (ROOT / source).parent)
                destination = self.host_path(target) / name
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, destination)
        if owner := next((word.partition("=")[2] for word in arguments if word.startswith("--chown=")), ""):
            subprocess.run(["chroot", self.root, "chown", "-R", owner, Path(self.workdir) / target], check=True)


def files_of(source: str) -> set[Path]:
    """Return the files of a source below the paths that launch/Containerfile.dockerignore allows with a `!`."""
    lines = FILE.with_name(FILE.name + ".dockerignore").read_text().splitlines()
    allowed = [ROOT / line[1:] for line in lines if line.startswith("!")]
    results = {
        path
        for destination in allowed
        for path in ([destination] if destination.is_file() else destination.rglob("*"))
        if path.is_file()
    }
    below = ROOT / source
    return {path for path in results if (path == below or below in path.parents) and "__pycache__" not in path.parts}


def steps(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each step, without comments, with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    container_env = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in container_env.splitlines())
    ]


def main(arguments: list[str]) -> int:
    """Run the steps, then the entry point with each command line."""
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--bind", type=Path, action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    options = parser.parse_args(arguments[:separator])
    binds = [Path("/etc/resolv.conf"), Path("/etc/hosts"), *options.bind]  # an engine provides both
    container = Container(options.root.resolve(), binds, dict(each.split("=", 1) for each in options.env))
    for word, rest in steps(FILE.read_text()):
        print(f"== {word} {rest}", flush=True)
        container.execute(word, rest)
    for line in arguments[separator + 1 :] or [shlex.join(container.cmd)]:
        print(f"== {shlex.join(container.entrypoint)} {line}", flush=True)
        container.run([*container.entrypoint, *shlex.split(line)], {})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"tools/robustness/try_containerfile.py: {error}", file=sys.stderr)
        sys.exit(1)
