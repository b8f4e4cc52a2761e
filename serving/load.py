"""Load on a server: requests over several connections at once, and how long each took."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from matplotlib.figure import Figure

PERCENTILES = (50, 90, 95, 99)
BLUE, ORANGE, GREY = "#2463a8", "#d9722e", "#b9bcc4"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Measured(Generic[Answer]):
    """What came back, request by request, and when."""

    answers: list[Answer]
    started_s: np.ndarray
    """Since the first request."""
    latencies_s: np.ndarray
    seconds: float
    """From the first request to the last answer."""

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.seconds

    def percentiles_ms(self) -> dict[str, float]:
        """Latencies that so many of a hundred requests stayed under, between two of them in proportion."""
        values = np.percentile(self.latencies_s * 1e3, PERCENTILES).tolist()
        return {f"p{rank}_ms": value for rank, value in zip(PERCENTILES, values, strict=True)}


def measure(
    connect: Callable[[], AbstractContextManager[Callable[[int], Answer]]],
    requests: int,
    concurrency: int,
    advance: Callable[[], object] = lambda: None,
) -> Measured[Answer]:
    """Ask `requests` times over `concurrency` connections, each of which asks again as soon as it is answered.

    What `connect` opens answers the request of a number. Each connection is opened and used once before the clock
    starts. The first error ends all and is raised. `advance` is called after each answer, by one thread at a time.
    """
    answers: list[Answer | None] = [None] * requests
    started_s, latencies_s = np.zeros(requests), np.zeros(requests)
    numbers, stop, counting = itertools.count(), threading.Event(), threading.Lock()
    concurrency = min(concurrency, requests)
    ready = threading.Barrier(concurrency + 1)

    def work() -> None:
        try:
            with connect() as ask:
                ask(0)
                ready.wait()
                while not stop.is_set() and (number := next(numbers)) < requests:
                    started_s[number] = time.perf_counter()
                    answers[number] = ask(number)
                    latencies_s[number] = time.perf_counter() - started_s[number]
                    with counting:
                        advance()
        except threading.BrokenBarrierError:  # another connection tells why
            pass
        except BaseException:
            stop.set()
            ready.abort()
            raise

    with ThreadPoolExecutor(concurrency, "connection") as pool:
        try:
            tasks = [pool.submit(work) for _ in range(concurrency)]
            with suppress(threading.BrokenBarrierError):  # the task that broke it tells why
                ready.wait()
            for task in tasks:
                task.result()
        finally:
            stop.set()
            ready.abort()
    ended_s = (started_s + latencies_s).max()
    done = [answer for answer in answers if answer is not None]
    return Measured(done, started_s - started_s.min(), latencies_s, float(ended_s - started_s.min()))


def latency_picture(measured: Measured[Answer]) -> Figure:
    """Above: how many requests stayed under which latency. Below: the latencies in the order of time."""
    latencies_ms = np.sort(measured.latencies_s * 1e3)
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    above.plot(latencies_ms, np.arange(1, len(latencies_ms) + 1) / len(latencies_ms) * 100, color=BLUE)
    for name, value in measured.percentiles_ms().items():
        above.axvline(value, color=ORANGE, linewidth=0.8)
        label = f" {name.removesuffix('_ms')}: {value:.2f} ms"
        above.annotate(label, (value, 3), rotation=90, fontsize=8, ha="right", va="bottom")
    above.set_xscale("log")
    above.set_xlabel("latency in ms")
    above.set_ylabel("% of requests")
    above.set_ylim(0, 101)
    above.set_title(f"{len(latencies_ms):,} requests, {measured.requests_per_s:,.0f} a second")
    below.plot(measured.started_s, measured.latencies_s * 1e3, ".", markersize=2, color=BLUE)
    below.set_xlabel("seconds since the first request")
    below.set_ylabel("latency in ms")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GREY, alpha=0.4)
    return figure
