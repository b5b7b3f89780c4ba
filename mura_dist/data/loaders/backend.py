"""Choose the loading backend of a run by the setting `pipeline` and the installed packages.

auto -> dali on CUDA where it can be imported, else cpu
"""

import torch

from mura_dist.core.errors import UserError, install_remedy
from mura_dist.data.loaders.warp import triton_error

BACKENDS = ("dali", "cpu", "resident")


def choose_backend(pipeline: str, device: torch.device) -> tuple[str, str]:
    """Return the backend's name, and the reason for a fallback or "". Nothing runs on the device.

    Raises:
        UserError: pipeline=dali, but DALI cannot be imported.
    """
    if pipeline == "resident" and device.type == "cuda" and triton_error():
        return pipeline, f"torch operations replace its Triton kernel: {triton_error()}"
    backend = pipeline if pipeline != "auto" else "dali" if device.type == "cuda" else "cpu"
    reason = _dali_import_error() if backend == "dali" else ""
    if not reason:
        return backend, ""
    if pipeline == "auto":
        return "cpu", f"pipeline=auto selects dali on CUDA, but DALI cannot be imported: {reason}"
    raise UserError(
        f"pipeline=dali: NVIDIA DALI cannot be imported ({reason}). Run {install_remedy('train')}, or give pipeline=cpu."
    )


def _dali_import_error() -> str:
    """Return why DALI cannot be imported (an installed package may lack a library), or ""."""
    try:
        from mura_dist.data.loaders import dali  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""
