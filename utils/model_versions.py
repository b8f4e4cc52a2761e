"""The versions behind a `model_uri`, for a program that follows them: which one is it now, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils import RunFailed, UsageError
from utils.artifacts import fetch_model, fetch_run_file
from utils.outbox import FINAL_CODES

UNREGISTERED_NAME, ONLY_VERSION = "classifier", "1"
"""What a model that is in no registry is called."""


@dataclass(frozen=True)
class Fetched:
    """A version's files on this machine."""

    model: Path
    """The ONNX file."""
    beside: Path | None
    """The file of its run that was asked for, where there is one."""


class ModelVersions:
    """The versions behind a `model_uri`: one, or what an alias points to at the time."""

    def __init__(self, model_uri: str, *, beside: str = "", without: str = "") -> None:
        """beside: an artifact of the run that made the model, to have with it; without: what is said if it has none."""
        self.model_uri, self._beside, self._without = model_uri, beside, without
        self.name, self.alias, self._version = UNREGISTERED_NAME, "", ONLY_VERSION
        registered = model_uri.removeprefix("models:/")
        if registered != model_uri and "@" in registered:
            self.name, _, self.alias = registered.rpartition("@")
        elif registered != model_uri and "/" in registered:
            self.name, _, self._version = registered.rpartition("/")

    def latest(self) -> str:
        """The version that it is now. UsageError where there is none; RunFailed where the server does not tell."""
        if not self.alias:
            return self._version
        from mlflow import MlflowClient

        try:
            return str(MlflowClient().get_model_version_by_alias(self.name, self.alias).version)
        except Exception as error:  # of MLflow, requests, the database
            kind = UsageError if getattr(error, "error_code", "") in FINAL_CODES else RunFailed
            raise kind(f"cannot look up '{self.model_uri}': {str(error).splitlines()[0]}") from error

    def fetch(self, version: str, folder: Path) -> Fetched:
        """The files of a version, in `folder` if they had to be downloaded."""
        model = fetch_model(f"models:/{self.name}/{version}" if self.alias else self.model_uri, folder)
        return Fetched(model.path, self._fetch_beside(model.run_id, folder) if self._beside else None)

    def _fetch_beside(self, run_id: str, folder: Path) -> Path | None:
        """The file of the model's run; None, and a line that says why, where there is none."""
        reason: object = "the model comes from no run"
        try:
            if run_id:
                return fetch_run_file(run_id, self._beside, folder)
        except (UsageError, RunFailed) as error:
            reason = error
        print(f"{self._without}: {reason}", flush=True)
        return None
