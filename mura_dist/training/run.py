"""Open, check and describe a run: a folder with one writer.

    runs/NAME/recipe.toml        every setting                      status.json     running, stopped, done, failed
              data.json          the shards it is trained on        environment.json   versions and machine
              metrics.jsonl, tensorboard/, curves.png   metrics_log.py  checkpoints/    checkpoint.py
              lock               lock.py: a second writer waits, then fails
              mlflow.json, mlflow.lock   mlflow_reader.py, if the run is sent to a server

Opening decides whether the folder is a new run, a run to resume, a finished run, or another run (a UserError that names the key).
"""

import contextlib
import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr

from mura_dist import __version__
from mura_dist.core import config, files
from mura_dist.core.config import Settings
from mura_dist.core.errors import StopRequestedError, UserError, mask_url
from mura_dist.data.folder_kind import RECIPE, find_output_kinds
from mura_dist.data.shards.codec import MAX_SIZE_PX
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import lock

_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "opencv-python-headless",
)


class _Data(BaseModel):
    """The fields of data.json."""

    manifest_sha256: StrictStr
    size: Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE_PX)]
    encoding: StrictStr
    holds: Literal["phantoms", "radiographs"]
    splits: dict[str, Annotated[int, Field(strict=True, ge=0)]]
    study_types: list[StrictStr]


@dataclass(frozen=True)
class Run:
    """The folder of a run and its settings."""

    folder: Path
    settings: Settings

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Return an existing run, to evaluate or export.

        Raises:
            UserError: `folder` is not a run.
        """
        path = folder / RECIPE
        if not path.is_file():
            raise UserError(f"{folder} is not a run (it has no {RECIPE}). Give the folder that run= named.")
        return cls(folder, config.load(path))

    def recipe_value(self, key: str, default: Any) -> Any:
        """Return a setting as the run's recipe has it, or `default` if the run has no recipe yet."""
        path = self.folder / RECIPE
        return config.read_recipe(path).get(key, default) if path.is_file() else default

    def data(self) -> dict[str, Any]:
        """Read data.json, which describes the shards that the run is trained on.

        Raises:
            UserError: the file is missing or corrupt.
        """
        return files.read_json(self.folder / "data.json", _Data, remedy="restore it, or train again with run=NEW")

    def status(self) -> dict[str, Any]:
        """Read status.json. The result is empty if there is no such file yet."""
        try:
            return files.parse_json((self.folder / "status.json").read_bytes(), dict[str, Any])
        except (OSError, ValueError):
            return {}

    def write_status(self, state: str, **facts: Any) -> None:
        """Write status.json. Passwords in URLs are masked."""
        facts = {key: mask_url(value) if isinstance(value, str) else value for key, value in facts.items()}
        files.write_json(self.folder / "status.json", {"state": state, "time": time.strftime("%FT%T%z"), **facts})

    def check_identity(self, shards: Shards) -> None:
        """Compare the folder with the settings and shards of this start.

        Raises:
            UserError: the folder is no run, was trained on other shards, or has another value for a setting that may not change.
        """
        if "run" not in find_output_kinds(self.folder):
            if self.folder.exists() and not _is_unstarted(self.folder):
                raise UserError(f"run={self.folder} exists and is not a run. Use a new run=NEW.")
            return
        recipe = config.read_recipe(self.folder / RECIPE)
        for key, value in config.identity(self.settings).items():
            if recipe.get(key, value) != value:
                raise UserError(
                    f"run={self.folder} was started with {key}={recipe[key]!r}, this command has {key}={value!r}. "
                    "Restore the value, or use run=NEW for another run."
                )
        data = self.data()
        for key, value in _describe_data(shards).items():
            if data[key] != value:
                raise UserError(
                    f"run={self.folder} is trained on shards with {key}={data[key]}, {shards.folder} has {key}={value}. "
                    "Give the former shards, or use run=NEW."
                )

    def check_deepspeed(self, user_config: dict[str, Any]) -> None:
        """Compare the values of a user's DeepSpeed file with those that the run started with.

        Raises:
            UserError: a value differs.
        """
        path = self.folder / "deepspeed.json"
        remedy = "restore it, or use a new run=NEW"
        recorded = files.read_json(path, dict[str, Any], remedy=remedy) if path.is_file() else {}
        if "run" not in find_output_kinds(self.folder) or recorded == user_config:
            return
        keys = sorted(recorded.keys() | user_config.keys())
        key = next(key for key in keys if recorded.get(key) != user_config.get(key))
        raise UserError(
            f"run={self.folder} was started with {key} = {json.dumps(recorded.get(key))} in the DeepSpeed file, deepspeed="
            f"{self.settings.deepspeed} has {json.dumps(user_config.get(key))}. Restore the value, or use a new run=NEW."
        )

    def write_description(self, shards: Shards, deepspeed: dict[str, Any], **facts: Any) -> None:
        """Write the files that describe the run, at its start and when it resumes.

        Args:
            shards: The shards it is trained on.
            deepspeed: The values of a user's DeepSpeed file.
            facts: More entries of environment.json.
        """
        if deepspeed:
            files.write_json(self.folder / "deepspeed.json", deepspeed)
        files.write_json(self.folder / "data.json", _describe_data(shards))
        files.write_json(self.folder / "environment.json", {**environment(), **facts})
        files.write_text(self.folder / RECIPE, config.to_toml(self.settings))  # last: a folder with a recipe is a run

    def _create_folder(self) -> None:
        """Create the folder. Raises UserError if that fails or the folder is not writable."""
        reason = "read-only, or owned by another user"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.access(self.folder, os.W_OK | os.X_OK):
                return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            reason = error.strerror or str(error)
        raise UserError(
            f"run={self.folder} cannot be written ({reason}). Make it writable, or give run= on another disk."
        )

    @contextlib.contextmanager
    def writing(self, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the run's lock, and write the outcome of the block to status.json.

        A living writer is waited for, up to the setting `lock_wait_s`. A writer on another host whose heartbeat has expired is
        waited for until it counts as dead.

        Args:
            stop: Ends the wait when it is set.

        Raises:
            UserError: another process still writes the run.
            StopRequestedError: `stop` was set during the wait.
        """
        self._create_folder()
        lock_options = lock.LockOptions(
            f"run={self.folder}", "use a new run=NEW", self.settings.lock_wait_s, lock.UNVERIFIED_WAIT_S
        )
        with lock.acquire(self.folder / "lock", lock_options, stop or threading.Event()):
            try:
                yield
            except UserError:  # nothing was done, so status.json stays as it is
                raise
            except (StopRequestedError, KeyboardInterrupt) as stopped:
                self.write_status("stopped", reason=str(stopped) or "interrupted. The same command resumes.")
                raise
            except BaseException as error:
                with contextlib.suppress(OSError):  # the disk may have failed
                    self.write_status("failed", reason=f"{type(error).__name__}: {error}")
                raise


def _is_unstarted(folder: Path) -> bool:
    """Return whether a folder is empty, or holds a run that was killed before its recipe was written."""
    early_files = {"lock", "status.json", "data.json", "environment.json", "deepspeed.json"}
    return folder.is_dir() and all(path.name in early_files or path.name.startswith(".") for path in folder.iterdir())


def _describe_data(shards: Shards) -> dict[str, Any]:
    index = shards.index
    return {
        "manifest_sha256": index["manifest"]["sha256"],
        "size": index["size"],
        "encoding": index["encoding"],
        "holds": index["holds"],
        "splits": {name: split["num_radiographs"] for name, split in index["splits"].items()},
        "study_types": sorted(shards.manifest.frame.loc[shards.rows("train"), "study_type"].unique().tolist()),
    }


def environment() -> dict[str, Any]:
    """Return the versions of packages and the machine, so that a measurement can be reproduced."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "mura_dist": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "num_processors": os.cpu_count(),
    }
