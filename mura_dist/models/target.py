"""What a command takes as a model: the folder of a run, a model list, or an ONNX file.

    path -> Target.parse -> kind, told by the path alone -> evaluate, export, predict
                         -> where evaluate and export write if --out says nothing

Whether it holds what its kind promises, the one that opens it finds out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mura_dist.core.errors import UserError
from mura_dist.models.model_list import SUFFIX


@dataclass(frozen=True)
class Target:
    """A path and what it stands for. A path to nothing is a run that is not there."""

    path: Path
    kind: Literal["run", "list", "onnx"]

    @classmethod
    def parse(cls, path: Path) -> "Target":
        """Tell what `path` stands for: a list by its name, an ONNX file by being a file."""
        if path.suffix.lower() == SUFFIX and not path.is_dir():
            return cls(path, "list")
        return cls(path, "onnx" if path.is_file() else "run")

    def check_checkpoint(self, which: str) -> None:
        """Refuse --checkpoint for a list and an ONNX file, which have theirs."""
        kinds = {"list": "a list of chosen checkpoints", "onnx": "one exported checkpoint"}
        if self.kind in kinds and which != "best":
            raise UserError(
                f"--checkpoint {which}: {self.path} is {kinds[self.kind]}; leave --checkpoint out, or give the run"
            )

    @property
    def name(self) -> str:
        """The run's or the file's, of a list without its suffix."""
        return self.path.stem if self.kind == "list" else self.path.name

    @property
    def report_folder(self) -> Path:
        """Where the evaluation of a run or a list goes."""
        return self.path.with_suffix("") if self.kind == "list" else self.path

    @property
    def onnx_file(self) -> Path:
        """Where the ONNX file of a run or a list goes."""
        return self.path.with_suffix(".onnx") if self.kind == "list" else self.path / "model.onnx"
