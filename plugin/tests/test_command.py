"""What becomes of parameters on the way to a job."""

from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.projects.utils import load_project

from mlproject_backends import ConfigError
from mlproject_backends.command import job_command
from venues import PROJECT, Venue


@pytest.mark.parametrize("end", ["", "/"])
def test_a_remote_folder_is_downloaded_under_its_name(end: str) -> None:
    read = load_project(str(PROJECT)).get_entry_point("read")
    command = job_command(read, {"file": f"runs:/0123/logs{end}"}, PROJECT, ())
    ((path, uri),) = command.downloads.items()
    assert (Path(path).name, uri) == ("logs", "runs:/0123/logs")
    assert command.line == f"cat {path}"


def test_a_parameter_that_cannot_be_logged_is_refused_before_there_is_a_run(in_process_venue: Venue) -> None:
    for name in ("a+b", "n" * 300):
        with pytest.raises(ConfigError, match=f"parameter '{name[:3].replace('+', '.')}"):
            in_process_venue.run(**{name: "1"})
    assert MlflowClient().search_runs(["0"]) == []
