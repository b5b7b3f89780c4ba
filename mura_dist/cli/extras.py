"""Find the extra of mura-dist that installs a missing package, in the metadata of the installed mura-dist."""

import re
from importlib import metadata

# Distributions whose modules have another name. This cannot be read anywhere: a package that is missing has no metadata.
_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "nvidia": "nvidia-dali-cuda130", "starlette": "streamlit"}


def extra_of(module: str) -> str | None:
    """Return the first extra that installs `module`, or None where none does."""
    package = module.partition(".")[0]
    distribution = _DISTRIBUTIONS.get(package, package)
    try:
        requirements = metadata.requires("mura-dist") or []
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return None
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*\bextra == ['\"](\w+)['\"]", requirement)
        if found and found[1] == distribution:
            return found[2]
    return None
