"""Dynamic batching: requests that arrive together go through the network together.

A request that takes less than SHORT_S in the network is predicted in the event loop itself, together with others of the
same turn of the loop: to hand it to a thread takes longer than to do it. For all else a thread waits for the first
request, then at most `max_delay_us` for others, and predicts. While it does, the next ones gather, so that under load
batches form without any waiting. The event loop only hands over and takes back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue

import numpy as np

from serving import RequestError
from serving.model import ServedModel

SHORT_S = 0.001
"""A thread has to get the interpreter's lock for a batch, and the loop to get it back for the answers; beside other
programs each then waits for a core as well. Measured with the small CNN, 34 us an image, on two busy cores: 160 us of
processor time a request with the thread, 126 us without, and twice as many requests a second."""

Observer = Callable[[ServedModel, np.ndarray, float], None]
"""Told of every batch, where it was predicted and after the answers are on their way: model, logits_NK, seconds."""

Outcome = tuple[np.ndarray, np.ndarray]
"""logits_NK and embeddings_NE."""


@dataclass(eq=False, slots=True)  # a frozen one takes four times as long to make
class _Call:
    model: ServedModel
    images_NHWC: np.ndarray
    answer: asyncio.Future[Outcome]
    deadline: float
    """When the batch that this call opens has to start (time.perf_counter)."""


class Batcher:
    """Predicts for many callers of one event loop, in `threads` threads of its own."""

    def __init__(
        self, *, max_batch: int, max_delay_us: int, max_queue: int, threads: int, observe: Observer | None = None
    ) -> None:
        """`max_batch` and `max_queue` count images; a single larger request is taken when nothing else is there."""
        self.images = 0
        """Images that wait or are being predicted."""
        self._max_batch, self._max_delay_s, self._max_queue = max_batch, max_delay_us / 1e6, max_queue
        self._observe = observe
        self._pace: tuple[ServedModel | None, float] = (None, 0.0)
        """The model that predicted last, and how many seconds it takes for an image."""
        self._turn: list[_Call] = []
        """What the event loop predicts at the end of its present turn."""
        self._turn_images = 0
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"predict-{n}", daemon=True) for n in range(threads)]
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    async def predict(self, model: ServedModel, images_NHWC: np.ndarray) -> Outcome:
        """What the model says of the images; RequestError 503 where too many wait already."""
        count = len(images_NHWC)
        if self.images and self.images + count > self._max_queue:
            raise RequestError(
                f"the queue is full ({self.images} images wait, allowed: {self._max_queue}); try again",
                503,
                retry_after_s=1,
            )
        self.images += count
        answer: asyncio.Future[Outcome] = self._loop.create_future()
        call = _Call(model, images_NHWC, answer, time.perf_counter() + self._max_delay_s)
        pace_of, image_s = self._pace
        if pace_of is model and count * image_s <= SHORT_S and count <= self._max_batch:
            images = count + self._turn_images
            if self._turn and (
                self._turn[0].model is not model or images > self._max_batch or images * image_s > SHORT_S
            ):
                self._end_turn()
            if not self._turn:
                self._loop.call_soon(self._end_turn)
            self._turn.append(call)
            self._turn_images += count
        else:
            self._calls.put(call)
        return await answer

    def close(self) -> None:
        """Predict what waits, then end the threads."""
        self._end_turn()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _end_turn(self) -> None:
        batch, self._turn, self._turn_images = self._turn, [], 0
        if batch:
            self._predict(batch, self._answer)

    def _work(self) -> None:
        answer = partial(self._loop.call_soon_threadsafe, self._answer)  # type: ignore[arg-type]
        following: _Call | None = None
        while (first := following or self._calls.get()) is not None:
            batch, following = self._gather(first)
            self._predict(batch, answer)

    def _gather(self, first: _Call) -> tuple[list[_Call], _Call | None]:
        """The calls of a batch, and the one that did not go with it."""
        batch, images = [first], len(first.images_NHWC)
        while images < self._max_batch:
            wait_s = first.deadline - time.perf_counter()
            try:
                call = self._calls.get(timeout=wait_s) if wait_s > 0 else self._calls.get_nowait()
            except Empty:
                break
            if call is None:  # the end: nothing follows it, so it may be met again
                self._calls.put(None)
                break
            if call.model is not first.model or images + len(call.images_NHWC) > self._max_batch:
                return batch, call
            batch.append(call)
            images += len(call.images_NHWC)
        return batch, None

    def _predict(self, batch: list[_Call], answer: Callable[..., object]) -> None:
        calls = [call for call in batch if not call.answer.cancelled()]  # nobody waits for the others any more
        model, started = batch[0].model, time.perf_counter()
        outcome: Outcome | Exception = RuntimeError("nobody waits")
        try:
            if len(calls) == 1:
                outcome = model.predict(calls[0].images_NHWC)
            elif calls:
                outcome = model.predict(np.concatenate([call.images_NHWC for call in calls]))
        except Exception as error:  # the callers tell of it
            outcome = error
        seconds = time.perf_counter() - started
        answer(batch, calls, outcome)
        if calls and not isinstance(outcome, Exception):
            self._note_pace(model, seconds / len(outcome[0]))
            if self._observe:
                self._observe(model, outcome[0], seconds)

    def _note_pace(self, model: ServedModel, image_s: float) -> None:
        """Down at once and up slowly: a thread that had to wait for a core says little of the network."""
        before, usual_s = self._pace
        if model is before and image_s > usual_s:
            image_s = usual_s + (image_s - usual_s) / 32
        self._pace = model, image_s

    def _answer(self, batch: list[_Call], calls: list[_Call], outcome: Outcome | Exception) -> None:
        self.images -= sum(len(call.images_NHWC) for call in batch)
        start = 0
        for call in calls:
            rows = slice(start, start := start + len(call.images_NHWC))
            if call.answer.cancelled():
                continue
            if isinstance(outcome, Exception):
                call.answer.set_exception(outcome)
            else:
                call.answer.set_result((outcome[0][rows], outcome[1][rows]))
