"""Runs any MLproject in Docker and on Kubernetes: an MLflow project-backend plugin.

Exceptions, all of them for people (one line: what was wrong, what was received, what is allowed, what to do):

    click.ClickException
     `- ConfigError          bad input: nothing was started; exit code 2
    mlflow.exceptions.ExecutionException
     `- JobError             the job could not be made, sent or found; exit code 1
         |- NotSent          the run has no job (yet)
         `- Unreachable      the engine or the cluster does not answer now; trying again may help
"""

import click
from mlflow.exceptions import ExecutionException

__version__ = "0.1.0"


class ConfigError(click.ClickException):
    """A configuration or a parameter that cannot work, found before anything was started."""

    exit_code = 2


class JobError(ExecutionException):
    """The job could not be made, sent or found."""


class NotSent(JobError):
    """The run has no job: none yet, or its launcher was stopped before it sent one."""


class Unreachable(JobError):
    """The Docker engine or the Kubernetes API server does not answer now."""
