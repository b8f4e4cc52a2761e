"""`mlproject status | logs | cancel | list | compare`: what to do with runs that were sent to a backend."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus, ViewType
from mlflow.exceptions import ExecutionException, MlflowException

from mlproject_backends import ConfigError, NotSent, __version__
from mlproject_backends.compare import TIMINGS
from mlproject_backends.compare import compare as compare_runs
from mlproject_backends.job_run import TAG_BACKEND, TAG_REASON, JobRun, cancel_unsent, tell


class _Commands(click.Group):
    """Errors of a backend as one line: exit code 1, as for a run that failed."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ExecutionException, MlflowException) as error:
            raise click.ClickException(str(error).splitlines()[0]) from None


@click.group(cls=_Commands)
@click.version_option(__version__)
def main() -> None:
    """Runs that `mlflow run` sent to Docker or Kubernetes. The tracking server is that of MLFLOW_TRACKING_URI."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # for a log of some kilobytes


@main.command()
@click.argument("run_id")
def status(run_id: str) -> None:
    """Say how a run stands and why; end it where its job has ended and nobody noticed."""
    state = JobRun.find(run_id, MlflowClient()).state()
    click.echo(f"{state.status}: {state.reason}")


@main.command()
@click.argument("run_id")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended; exit 1 unless it went well.")
def logs(run_id: str, follow: bool) -> None:
    """Print a run's output, live or from its artifacts. Ctrl-C stops the printing, not the job."""
    found = JobRun.find(run_id, MlflowClient())
    if not follow or found.settled:
        found.logs()
        found.state()
        return
    state = found.follow(stop_on_interrupt=False)
    if state.status != "FINISHED":
        raise click.ClickException(f"run {run_id} {state.status.lower()}: {state.reason}")


@main.command()
@click.argument("run_id")
def cancel(run_id: str) -> None:
    """Stop a run's job and end the run as KILLED."""
    client = MlflowClient()
    try:
        found = JobRun.find(run_id, client)
    except NotSent:
        state = cancel_unsent(run_id, client)
    else:
        found.cancel()
        state = found.state()
    click.echo(f"{state.status}: {state.reason}")


@main.command("list")
@click.option("--experiment", "names", multiple=True, help="Only of this experiment; more than once for several.")
@click.option("--max", "limit", default=20, show_default=True, help="The newest so many.")
def list_runs(names: tuple[str, ...], limit: int) -> None:
    """List the runs that were sent to a backend, newest first."""
    client = MlflowClient()
    experiments = [client.get_experiment_by_name(name) for name in names] if names else client.search_experiments()
    if unknown := [name for name, found in zip(names, experiments, strict=False) if found is None]:
        known = ", ".join(experiment.name for experiment in client.search_experiments())
        raise ConfigError(f"no experiment '{unknown[0]}'; allowed: {known}")
    runs = client.search_runs(
        [experiment.experiment_id for experiment in experiments if experiment],
        f"tags.`{TAG_BACKEND}` != ''",
        ViewType.ACTIVE_ONLY,
        limit,
        ["attributes.start_time DESC"],
    )
    for run in runs:
        click.echo(_row(run))
    if not runs:
        tell("no run was sent to a backend yet")


@main.command()
@click.argument("left")
@click.argument("right")
@click.option("--ignore", multiple=True, default=TIMINGS, show_default=True, help="Metrics not to compare.")
@click.option("--all", "everything", is_flag=True, help="Print also what agrees.")
def compare(left: str, right: str, ignore: tuple[str, ...], everything: bool) -> None:
    """Say whether two runs agree in params, metrics, artifacts and weights; exit 1 if not."""
    client = MlflowClient()
    lines = compare_runs(client, client.get_run(left), client.get_run(right), ignore)
    different = [line for line in lines if not line.same]
    for line in lines if everything else different:
        click.echo(str(line))
    click.echo(f"{len(lines) - len(different)} of {len(lines)} agree")
    if different or not lines:
        sys.exit(1)


def _row(run: Run) -> str:
    tags, ended = run.data.tags, RunStatus.is_terminated(RunStatus.from_string(run.info.status))
    reason = tags.get(TAG_REASON, "" if ended else f"mlproject status {run.info.run_id} asks its backend")
    entry_point = tags.get("mlflow.project.entryPoint", "")
    return f"{run.info.run_id}  {run.info.status:9}  {tags[TAG_BACKEND]:20}  {entry_point:10}  {reason}".rstrip()


if __name__ == "__main__":
    main()
