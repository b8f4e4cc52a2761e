"""Training anew as a champion was trained: with the data there is now, and with what a file of rules changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils import RunFailed
from utils.artifacts import data_to_load, run_params
from utils.projects import entry_point_parameters, parameters_like, run_entry_point

GIVEN_HERE = ("dataset", "data_version", "data_repo", "data_dir", "on_error", "resume", "register_as")
"""Parameters of the training that retrain gives it; the others are those of the rules' file or else the champion's."""


def changeable_parameters() -> list[str]:
    """The parameters of the training that a file of rules may set: not the images' size, which the models share."""
    return [name for name in entry_point_parameters("main") if name not in (*GIVEN_HERE, "image_size")]


def train_like(
    trained_by: str, settings: Any, changes: Mapping[str, str], config: dict[str, Any], data_digest: str
) -> str:
    """Train as the run `trained_by` did, but for the data and `changes`; gives the run.

    settings: those of retrain, with the names of the parameters that it gives. config: of its backend. RunFailed if the
    training met other data than `data_digest` names.
    """
    data = data_to_load(settings, trained_by)
    given = {"data_dir": settings.data_dir, "on_error": settings.on_error, "register_as": settings.name}
    parameters = parameters_like(trained_by, "main", GIVEN_HERE) | dict(changes) | data | given
    run_id = run_entry_point("main", parameters, settings.backend, config)
    if run_params(run_id).get("data_digest") != data_digest:
        raise RunFailed(f"run {run_id} was trained on other data than there is here to compare on; did they change?")
    return run_id
