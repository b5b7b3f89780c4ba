"""The options of an MLflow reader, without pandas and torch: mlflow_process.py writes them, mlflow_reader.py reads them."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

READY = "ready"  # the reader's first line: MLflow's client is loaded


class Options(BaseModel):
    """What to send where. `settings`: those that may leave this machine; `recipe`: the same as TOML.

    is_training: the run is being trained, so that what is missing may be sent later.
    command: sends what is missing in the end.
    """

    server: str
    folder: Path
    name: str
    settings: dict[str, Any]
    recipe: str
    is_training: bool
    command: str

    @property
    def remedy(self) -> str:
        """What to do in the end."""
        return f"{self.command} sends what is missing"
