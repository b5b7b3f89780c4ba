"""Find the extras of mura-dist that install a missing package, in the metadata of the installed mura-dist."""

import re
from importlib import metadata

# Distributions whose modules have another name. A missing package has no metadata, so this cannot be looked up.
_DISTRIBUTIONS = {
    "mlflow": ("mlflow-skinny",),
    "cv2": ("opencv-python-headless",),
    "nvidia": ("nvidia-dali-cuda130",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "starlette": ("streamlit",),
    "uvicorn": ("streamlit",),
}


def extras_of(module: str) -> list[str]:
    """Return the first extra of each distribution that installs `module`; empty if no extra does."""
    package = module.partition(".")[0]
    try:
        requirements = metadata.requires("mura-dist") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return []
    extras: dict[str, str] = {}  # by distribution
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        if match and match[1] in _DISTRIBUTIONS.get(package, (package,)):
            extras.setdefault(match[1], match[2])
    return list(extras.values())
