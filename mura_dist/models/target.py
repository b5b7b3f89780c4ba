"""Recognize what a command takes as a model: the folder of a run, a model list, or an ONNX file.

    path -> Target.parse -> kind, from the path alone -> evaluate, export, predict
                         -> the default output paths of evaluate and export

The code that opens it checks the content.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mura_dist.core.errors import UserError
from mura_dist.models.model_list import SUFFIX


@dataclass(frozen=True)
class Target:
    """A path and the kind of model it names. A missing path counts as a missing run."""

    path: Path
    kind: Literal["run", "list", "onnx"]

    @classmethod
    def parse(cls, path: Path) -> "Target":
        """Recognize a list by its suffix and an ONNX file by being a file."""
        if path.suffix.lower() == SUFFIX and not path.is_dir():
            return cls(path, "list")
        return cls(path, "onnx" if path.is_file() else "run")

    def check_checkpoint(self, which: str) -> None:
        """Refuse --checkpoint for a list and an ONNX file.

        Raises:
            UserError: the target is no run, and `which` is not `best`.
        """
        kinds = {"list": "a list of checkpoints", "onnx": "one exported checkpoint"}
        if self.kind in kinds and which != "best":
            raise UserError(
                f"--checkpoint {which}: {self.path} is {kinds[self.kind]}. Omit --checkpoint, or pass the run."
            )

    @property
    def name(self) -> str:
        """The name of the run or the file, of a list without its suffix."""
        return self.path.stem if self.kind == "list" else self.path.name

    @property
    def report_folder(self) -> Path:
        """The default folder of the evaluation of a run or a list."""
        return self.path.with_suffix("") if self.kind == "list" else self.path

    @property
    def onnx_file(self) -> Path:
        """The default path of the ONNX file of a run or a list."""
        return self.path.with_suffix(".onnx") if self.kind == "list" else self.path / "model.onnx"
