"""Versions of registered models and their aliases: `challenger` is the newest one, `champion` the one to use.

`champion` moves only by `promote`, after an evaluation; what moved it is in the version's tags.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils import RunFailed, UsageError
from utils.artifacts import mlflow_errors

CHAMPION, CHALLENGER = "champion", "challenger"
ABOUT = f"""Image classifier.

- `{CHALLENGER}`: the version that was registered last
- `{CHAMPION}`: the version to use; `evaluate -P promote=true` and `retrain` move it, which the version's tags tell"""


def register(client: Any, name: str, *, run_id: str, model_uri: str, description: str, tags: Mapping[str, str]) -> str:
    """Make a logged model (`models:/m-...`) the newest version of `name`, with the alias challenger; gives its number.

    Doing it again, after a failure half-way, makes no second version.
    """
    import mlflow

    found = client.search_model_versions(f"run_id = '{run_id}'")
    version = next((each for each in found if each.name == name and each.source == model_uri), None)
    if version is None:
        version = mlflow.register_model(model_uri, name, tags=dict(tags))
    client.update_model_version(name, version.version, description)
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    if not client.get_registered_model(name).description:
        client.update_registered_model(name, ABOUT)
    return str(version.version)


@dataclass(frozen=True)
class Candidate:
    """A registered version that may become champion."""

    name: str
    version: str
    champion: str
    """The champion's version when this was asked; empty if there is none."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def champion_uri(self) -> str:
        return f"models:/{self.name}/{self.champion}" if self.champion else ""


def candidate(model_uri: str) -> Candidate:
    """The registered version that `model_uri` names; UsageError if it names none."""
    scheme, _, rest = model_uri.partition(":/")
    alias, number = rest.rpartition("@"), rest.rpartition("/")
    if scheme != "models" or not (alias[0] or number[0]):
        raise UsageError(
            f"promote: '{model_uri}' is no registered version; give models:/NAME/VERSION or models:/NAME@ALIAS "
            "(register_as=NAME registers the model of a training)"
        )
    with mlflow_errors(model_uri):
        import mlflow

        client = mlflow.MlflowClient()
        if alias[0]:
            version = client.get_model_version_by_alias(alias[0], alias[2])
        else:
            version = client.get_model_version(number[0], number[2])
        aliases = client.get_registered_model(version.name).aliases
    return Candidate(version.name, str(version.version), str(aliases.get(CHAMPION, "")))


def age_days(version: Candidate) -> float:
    """Days since a version was registered."""
    with mlflow_errors(version.uri):
        import mlflow

        registered_ms = mlflow.MlflowClient().get_model_version(version.name, version.version).creation_timestamp
    return float(time.time() - registered_ms / 1000) / 86_400


def challenger(champion: Candidate, trained_by: str, tags: Mapping[str, str]) -> Candidate:
    """The version that a training registered, to be compared with `champion`; both it and the run get tags."""
    with mlflow_errors(f"runs:/{trained_by}"):
        import mlflow

        client = mlflow.MlflowClient()
        found = client.search_model_versions(f"run_id = '{trained_by}'")
        version = next((str(each.version) for each in found if each.name == champion.name), "")
        if not version:
            raise RunFailed(f"run {trained_by} registered no version of {champion.name}")
        for key, value in tags.items():
            client.set_tag(trained_by, key, value)
            client.set_model_version_tag(champion.name, version, key, value)
    return Candidate(champion.name, version, champion.champion)


def promote(candidate: Candidate, run_id: str, evidence: Mapping[str, float]) -> None:
    """Move champion to the candidate and say on its version which evaluation did it.

    `evidence` are the metrics it did it for. RunFailed if the evaluation's run does not have them on the server, or if
    champion is no longer the version that the candidate was compared with.
    """
    with mlflow_errors(candidate.uri):
        import mlflow

        client = mlflow.MlflowClient()
        run = client.get_run(run_id)
        if any(run.data.metrics.get(name) != value for name, value in evidence.items()):
            raise RunFailed(f"run {run_id} is not on the tracking server as a whole; {CHAMPION} was not moved")
        now = str(client.get_registered_model(candidate.name).aliases.get(CHAMPION, ""))
        if now != candidate.champion:
            raise RunFailed(
                f"{CHAMPION} of {candidate.name} moved from version {candidate.champion or '(none)'} to "
                f"{now or '(none)'} during the evaluation; evaluate again"
            )
        tags = {
            "promoted_by_run": run_id,
            "promoted_by": os.environ.get("MLFLOW_TRACKING_USERNAME") or run.data.tags.get("mlflow.user", ""),
            "promoted_over": candidate.champion or "(none)",
            **{f"promoted_for_{name}": f"{value:.4f}" for name, value in evidence.items() if "accuracy" in name},
        }
        for key, value in tags.items():
            client.set_model_version_tag(candidate.name, candidate.version, key, value)
        client.set_registered_model_alias(candidate.name, CHAMPION, candidate.version)
