"""Choose the loading backend of a run from `pipeline` and what is installed.

auto -> dali on CUDA, where it can be imported; else cpu
"""

import torch

from mura_dist.core.errors import UserError, install_remedy
from mura_dist.data.loaders.warp import triton_error


def choose_backend(pipeline: str, device: torch.device) -> tuple[str, str]:
    """Return the backend's name and why it is not what it should be, empty where it is. Nothing on the device is touched.

    Raises:
        UserError: pipeline=dali where DALI cannot be imported.
    """
    if pipeline == "resident" and device.type == "cuda" and triton_error():
        return pipeline, f"by torch operations in place of its Triton kernel: {triton_error()}"
    wanted = pipeline if pipeline != "auto" else "dali" if device.type == "cuda" else "cpu"
    reason = _dali_import_error() if wanted == "dali" else ""
    if not reason:
        return wanted, ""
    if pipeline == "auto":
        return "cpu", f"pipeline=auto would be dali on CUDA, which cannot be imported: {reason}"
    raise UserError(
        f"pipeline=dali: NVIDIA DALI cannot be imported: {reason}; {install_remedy('train')}, or give pipeline=cpu"
    )


def _dali_import_error() -> str:
    """Why DALI cannot be imported, empty where it can: a package that is there may lack a library it opens."""
    try:
        from mura_dist.data.loaders import dali  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""
