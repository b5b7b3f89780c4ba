"""Load a script of tools/ as a module."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

from helpers.commands import ROOT


def tool(name: str) -> Any:
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module
