"""Define the options that mlflow_process.py passes to mlflow_reader.py. No pandas and torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

READY = "ready"  # the first line of the process: MLflow's client is loaded


class MlflowOptions(BaseModel):
    """What the MLflow process sends, and where.

    Attributes:
        server: URL of the server, with a password if it needs one.
        folder: The run's folder.
        name: The name of the MLflow run.
        settings: The settings that may leave this machine.
        recipe: The same settings as TOML.
        is_training: The run is being trained, so missing lines may be sent later.
        command: The command that sends missing lines after the training.
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
        """The sentence that tells the user how to send missing lines."""
        return f"Run `{self.command}` to send what is missing"
