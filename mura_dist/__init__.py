"""mura_dist: from a folder of bone radiographs to a trained, honestly measured, deployable model.

Everything below is imported when it is first used, so that `import mura_dist` is fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mura_dist.core.errors import RunError, StopRequestedError, UserError
    from mura_dist.data.loaders.data_loader import DataLoader, data_loader
    from mura_dist.data.loaders.loader import Batch
    from mura_dist.data.radiograph import read_radiograph
    from mura_dist.evaluation.score import evaluate_predictions
    from mura_dist.inference.predict import PredictOptions
    from mura_dist.inference.prediction_tables import PredictionTables, predict_directory
    from mura_dist.inference.study_model import StudyModel, StudyResult, ViewResult, load
    from mura_dist.training.weights import load_network

__version__ = "0.1.0"

_HOMES = {
    "Batch": "data.loaders.loader",
    "DataLoader": "data.loaders.data_loader",
    "PredictOptions": "inference.predict",
    "PredictionTables": "inference.prediction_tables",
    "RunError": "core.errors",
    "StopRequestedError": "core.errors",
    "StudyModel": "inference.study_model",
    "StudyResult": "inference.study_model",
    "UserError": "core.errors",
    "ViewResult": "inference.study_model",
    "data_loader": "data.loaders.data_loader",
    "evaluate_predictions": "evaluation.score",
    "load": "inference.study_model",
    "load_network": "training.weights",
    "predict_directory": "inference.prediction_tables",
    "read_radiograph": "data.radiograph",
}

__all__ = [
    "Batch",
    "DataLoader",
    "PredictOptions",
    "PredictionTables",
    "RunError",
    "StopRequestedError",
    "StudyModel",
    "StudyResult",
    "UserError",
    "ViewResult",
    "__version__",
    "data_loader",
    "evaluate_predictions",
    "load",
    "load_network",
    "predict_directory",
    "read_radiograph",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mura_dist' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"mura_dist.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        from mura_dist.core.errors import install_remedy

        raise ModuleNotFoundError(
            f"mura_dist.{name} needs {error.name}, which is not installed. Run {install_remedy('train')}",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
