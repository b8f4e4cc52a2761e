"""Whether two runs came to the same: their parameters, metrics, artifacts and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

# What measures the machine and the moment, not the result.
TIMINGS = ("system/*", "*_s", "*_per_s", "*seconds*", "*per_second*", "*time*", "*duration*")
# What a backend adds to a run.
OWN_ARTIFACTS = ("code", "logs")
WEIGHTS = "weights_sha256"


@dataclass(frozen=True)
class Line:
    """One thing that was compared: its name, both values, and whether they agree."""

    name: str
    left: str | None
    right: str | None
    same: bool

    def __str__(self) -> str:
        if self.same:
            return f"same    {self.name}: {self.left}"
        return f"DIFFERS {self.name}: {_shown(self.left)} | {_shown(self.right)}"


def compare(client: MlflowClient, left: Run, right: Run, ignore: tuple[str, ...] = TIMINGS) -> list[Line]:
    """Everything that two runs have, line by line; metrics over their whole history, by name matched with `ignore`."""
    return [
        *_lines("param", left.data.params, right.data.params),
        *_lines("metric", _histories(client, left, ignore), _histories(client, right, ignore)),
        *_lines("artifact", _artifacts(client, left), _artifacts(client, right)),
        *_lines("weights", _weights(left), _weights(right)),
    ]


def _lines(kind: str, left: Mapping[str, str], right: Mapping[str, str]) -> Iterator[Line]:
    for name in sorted({*left, *right}):
        pair = left.get(name), right.get(name)
        yield Line(f"{kind} {name}", *pair, same=pair[0] == pair[1])


def _histories(client: MlflowClient, run: Run, ignore: tuple[str, ...]) -> dict[str, str]:
    """Each metric's values in the order of their steps, as text that shows the last one first."""
    names = [name for name in run.data.metrics if not any(fnmatchcase(name, pattern) for pattern in ignore)]
    return {name: _history(client.get_metric_history(run.info.run_id, name)) for name in names}


def _history(points: list[Any]) -> str:
    values = [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)]
    last = values[-1][1]
    text = "nan" if math.isnan(last) else repr(last)
    return text if len(values) == 1 else f"{text} after {len(values)} points {_digest(values)}"


def _digest(values: list[tuple[int, float]]) -> str:
    """Eight digits that differ when any step or value does."""
    return sha256(repr(values).encode()).hexdigest()[:8]


def _artifacts(client: MlflowClient, run: Run) -> dict[str, str]:
    """Sizes are not compared: a picture or a log differs by its time stamps. Names say what was made."""
    run_id = run.info.run_id
    found = dict.fromkeys(_walk(partial(client.list_artifacts, run_id)), "there")
    for position, output in enumerate(run.outputs.model_outputs if run.outputs else []):
        listing = partial(client.list_logged_model_artifacts, output.model_id)
        found |= {f"model {position}: {path}": "there" for path in _walk(listing)}
    return found


def _walk(listing: Callable[[str | None], list[Any]], folder: str | None = None) -> Iterator[str]:
    for entry in listing(folder):
        if entry.path in OWN_ARTIFACTS:
            continue
        if entry.is_dir:
            yield from _walk(listing, entry.path)
        else:
            yield entry.path


def _weights(run: Run) -> dict[str, str]:
    return {WEIGHTS: run.data.tags[WEIGHTS]} if WEIGHTS in run.data.tags else {}


def _shown(value: str | None) -> str:
    return "(absent)" if value is None else value
