"""Which rows of the log are compared: a span of time, one model, one version, enough images."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from monitoring import MonitoringError
from monitoring.prediction_log import Feedback, Store, Window, contents, read_feedback, read_window, told_ids

MOST_ROWS = 100_000
"""Of a longer window so many rows at most are held in memory: with embeddings of 256 numbers, 600 MB."""
TIME = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True)
class Span:
    """From `since` on, up to and without `until`."""

    since: datetime
    until: datetime

    @property
    def words(self) -> tuple[str, str]:
        """Both ends, for people."""
        return self.since.strftime(TIME), self.until.strftime(TIME)


def span(hours: float, since: str = "", until: str = "") -> Span:
    """The `hours` before `until` (ISO 8601, UTC where no zone is given), "" being now; `since` takes their place."""
    end = _time("until", until) if until else datetime.now(UTC)
    try:
        begin = _time("since", since) if since else end - timedelta(hours=hours)
    except OverflowError:
        raise MonitoringError(f"hours: received {hours}, which is before the year 1; give less") from None
    if begin >= end:
        raise MonitoringError(f"the window ends at {end.isoformat()}, before it begins at {begin.isoformat()}")
    return Span(begin, end)


def choose(store: Store, place: str, span: Span, *, model: str, version: str, least: int) -> Window:
    """The rows of one model and version, "" being whichever is alone there; refuses fewer than `least` of them.

    `place` is the log's address, for the message.
    """
    window = read_window(store, span.since, span.until, model=model, version=version, most=MOST_ROWS)
    if len(window) >= least and len(window.models) == len(window.versions) == 1:
        return window
    held = [
        f"{rows:,} of {name} version {number}"
        for (name, number), rows in contents(store, span.since, span.until).items()
    ]
    found = f"{place} from {' to '.join(span.words)} holds {', '.join(held) or 'no predictions'}"
    if len(window) >= least:
        raise MonitoringError(f"{found}; give version= or model_uri=models:/NAME/VERSION to look at one of them")
    wanted = " ".join(filter(None, [model, version and f"version {version}"]))
    counted = f"; that is {len(window):,} of {wanted}" if wanted and held else ""
    raise MonitoringError(
        f"{found}{counted}, allowed: at least min_images={least}; give a longer window (hours=, since=)"
    )


def recent(store: Store, hours: float, *, model: str, version: str) -> tuple[Window, Window, Feedback]:
    """The rows of a version of the last `hours`; those alone with a kept image or feedback; and that feedback.

    Of either kind of rows an even choice, where there are more than MOST_ROWS.
    """
    when = span(hours)
    read = partial(read_window, store, when.since, when.until, model=model, version=version, most=MOST_ROWS)
    known = read(with_image=True, or_ids=told_ids(store, when.since))
    return read(), known, read_feedback(store, known)


def with_images(store: Store, place: str, hours: float, *, model: str = "", version: str = "") -> Window:
    """The rows of the last `hours`, 0 being ever, whose image was kept; refuses those of several models or versions.

    `place` is the log's address, for the message.
    """
    until = datetime.now(UTC) + timedelta(hours=1)  # the service's clock may be ahead of ours
    since = until - timedelta(hours=hours + 1) if hours else datetime(1970, 1, 2, tzinfo=UTC)
    window = read_window(store, since, until, model=model, version=version, with_image=True)
    if len(window.models) > 1 or len(window.versions) > 1:
        raise MonitoringError(
            f"{place} has images of the models {', '.join(window.models)} and the versions "
            f"{', '.join(window.versions)}, which cannot be compared; give model_uri=models:/NAME/VERSION"
        )
    return window


def _time(name: str, text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise MonitoringError(f"{name}: received '{text}', allowed: a time such as 2026-03-14T12:00") from None
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
