"""Recognize that an evaluation or an export was carried out before with the same inputs, so that its files can stay.

    request: options, digests of all inputs -> + code, versions, machine -> find: the stamp on disk has the same request, and
        each output has the digest that it records -> the outputs stay
    outputs -> write: the request, the digests of the outputs, a result to reuse; after all outputs

The stamp is one JSON file beside the outputs. It holds names and digests, and no absolute path. An invalid stamp counts as none.
"""

import functools
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mura_dist.core import files
from mura_dist.core.files import json_sha256
from mura_dist.core.storage import sha256
from mura_dist.training.run import environment

_PACKAGE = Path(__file__).parents[1]
# Environment variables that change bits of a result: instruction sets, numbers of threads, the visible GPUs.
_VARIABLES = ("ATEN_", "CUDA_", "CUDNN_", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_")


class _Content(BaseModel):
    """Content of a stamp: a request, its outputs and a result to reuse."""

    request: dict[str, Any]
    outputs: dict[str, str]  # SHA-256 of each output by its name
    result: dict[str, Any]


class _Record(BaseModel):
    """The file of a stamp: `sha256` is that of `content`, so that a change of the stamp itself is noticed."""

    content: _Content
    sha256: str


@dataclass(frozen=True)
class Stamp:
    """The record of a request and its outputs.

    Attributes:
        path: File of the stamp. The names of outputs are relative to its folder.
        request: JSON value with all that the outputs depend on, except for `describe_machine`.
        outside: Outputs in another folder, by name.
    """

    path: Path
    request: Mapping[str, Any]
    outside: Mapping[str, Path] = field(default_factory=dict)

    def find(self) -> dict[str, Any] | None:
        """Return the recorded result if the request and all outputs are the same, else None."""
        content = self._read()
        if content is None or content["request"] != self._full_request:
            return None
        try:
            current = {name: sha256(self._locate(name)) for name in content["outputs"]}
        except OSError:
            return None
        return content["result"] if current == content["outputs"] and self.outside.keys() <= current.keys() else None

    def find_result_of(self, key: str) -> dict[str, Any] | None:
        """Return the recorded result if the part `key` of the request is the same, whatever the outputs, else None."""
        content, request = self._read(), self._full_request
        if content is None or any(content["request"].get(name) != request[name] for name in (key, "machine")):
            return None
        return content["result"]

    def write(self, outputs: Iterable[Path], result: Mapping[str, Any]) -> None:
        """Write the stamp. Called after all outputs are written.

        Args:
            outputs: Files below the stamp's folder. Those of `outside` are added.
            result: JSON value that `find` returns.
        """
        names = [path.relative_to(self.path.parent).as_posix() for path in outputs]
        digests = {name: sha256(self._locate(name)) for name in (*names, *self.outside)}
        content = {"request": self._full_request, "outputs": digests, "result": dict(result)}
        files.write_json(self.path, {"content": content, "sha256": json_sha256(content)})

    @functools.cached_property
    def _full_request(self) -> dict[str, Any]:
        request: dict[str, Any] = json.loads(json.dumps({**self.request, "machine": describe_machine()}))
        return request

    def _locate(self, name: str) -> Path:
        return self.outside.get(name, self.path.parent / name)

    def _read(self) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = files.parse_json(self.path.read_bytes(), _Record)
        except (OSError, ValueError):
            return None
        content: dict[str, Any] = record["content"]
        return content if json_sha256(content) == record["sha256"] else None


def describe_machine() -> dict[str, Any]:
    """Describe the code, the versions and the machine that compute a result."""
    packages = sorted(f"{item.name} {item.version}" for item in metadata.distributions())
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        **environment(),
        "code_sha256": json_sha256({str(path.relative_to(_PACKAGE)): sha256(path) for path in _PACKAGE.rglob("*.py")}),
        "packages_sha256": json_sha256(packages),
        "variables_sha256": json_sha256(variables),
        "processor_sha256": json_sha256(_processor()),
        "num_usable_processors": len(affinity(0)) if affinity else os.cpu_count(),
        "gpus": sorted(
            _read_lines(path, ("Model",)) for path in Path("/proc/driver/nvidia/gpus").glob("*/information")
        ),
    }


def _processor() -> list[str]:
    """Return name and features of the processor: they choose the kernels of torch and ONNX Runtime."""
    return _read_lines(Path("/proc/cpuinfo"), ("model name", "flags", "Features")) or [platform.processor()]


def _read_lines(path: Path, keys: tuple[str, ...]) -> list[str]:
    """Return the distinct lines of a file that begin with one of `keys`."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return sorted({line for line in lines if line.startswith(keys)})
