"""Batches, the queue and its end, with a network that waits until the test lets it go."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import RequestError
from serving.batching import SHORT_S, Batcher
from serving.model import ServedModel

SHAPE = (1, 1, 1)


class Gate:
    """A network whose logits are the pixels, and which predicts only while it is open."""

    def __init__(self, opened: bool = False) -> None:
        self.batches: list[int] = []
        self.entered, self.open = threading.Semaphore(0), threading.Event()
        if opened:
            self.open.set()
        self.model = ServedModel("gate", "1", ("a",), SHAPE, self.logits)
        self.detailed = replace(self.model, outputs=self.outputs)

    def outputs(self, images_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings are the pixels twice, with a minus."""
        logits_NK = self.logits(images_NHWC)
        return logits_NK, -logits_NK.repeat(2, axis=1)

    def logits(self, images_NHWC: np.ndarray) -> np.ndarray:
        self.batches.append(len(images_NHWC))
        self.entered.release()
        assert self.open.wait(30)
        if (images_NHWC == 255).any():
            raise RuntimeError("no logits for these")
        return images_NHWC.reshape(-1, 1).astype(np.float32)


def image(*pixels: int) -> np.ndarray:
    return np.array(pixels, np.uint8).reshape(-1, *SHAPE)


def run(
    use: Callable[[Batcher], Awaitable[None]], *, max_batch: int = 8, max_queue: int = 100, threads: int = 1
) -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=max_batch, max_delay_us=100, max_queue=max_queue, threads=threads)
        try:
            await asyncio.wait_for(use(batcher), 30)
        finally:
            batcher.close()

    asyncio.run(main())


async def logits(batcher: Batcher, model: ServedModel, images_NHWC: np.ndarray) -> np.ndarray:
    """The logits of a call."""
    return (await batcher.predict(model, images_NHWC))[0]


async def occupied(batcher: Batcher, gate: Gate) -> asyncio.Task[np.ndarray]:
    """A call that is being predicted."""
    task = asyncio.create_task(logits(batcher, gate.model, image(1)))
    await asyncio.to_thread(gate.entered.acquire)
    return task


def test_what_arrives_during_a_prediction_goes_together_and_no_batch_is_too_large() -> None:
    gate = Gate()

    async def use(batcher: Batcher) -> None:
        first = await occupied(batcher, gate)
        others = [asyncio.create_task(logits(batcher, gate.model, image(n, n))) for n in range(7)]
        await asyncio.sleep(0)
        assert batcher.images == 15
        gate.open.set()
        answers = await asyncio.gather(first, *others)
        assert [answer.ravel().tolist() for answer in answers[1:]] == [[n, n] for n in range(7)]
        assert gate.batches == [1, 8, 6]
        assert batcher.images == 0

    run(use)


def test_a_request_larger_than_a_batch_is_predicted_alone() -> None:
    gate = Gate()

    async def use(batcher: Batcher) -> None:
        first = await occupied(batcher, gate)
        calls = [asyncio.create_task(logits(batcher, gate.model, image(*range(n)))) for n in (3, 30, 3)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = await asyncio.gather(first, *calls)
        assert [len(answer) for answer in answers] == [1, 3, 30, 3]
        assert gate.batches == [1, 3, 30, 3]

    run(use)


def test_two_models_share_no_batch() -> None:
    gate, other = Gate(), Gate(opened=True)

    async def use(batcher: Batcher) -> None:
        first = await occupied(batcher, gate)
        calls = [asyncio.create_task(logits(batcher, model, image(5))) for model in (gate.model, other.model) * 2]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *calls)
        assert (gate.batches, other.batches) == ([1, 1, 1], [1, 1])

    run(use)


def test_a_full_queue_refuses_at_once_and_takes_again_later() -> None:
    gate = Gate()

    async def use(batcher: Batcher) -> None:
        first = await occupied(batcher, gate)
        second = asyncio.create_task(logits(batcher, gate.model, image(2, 3)))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="3 images wait, allowed: 3") as refusal:
            await logits(batcher, gate.model, image(4))
        assert (refusal.value.status, refusal.value.retry_after_s) == (503, 1)
        gate.open.set()
        await asyncio.gather(first, second)
        assert (await logits(batcher, gate.model, image(4))).tolist() == [[4]]

    run(use, max_queue=3)


def test_an_error_reaches_its_callers_and_nobody_else() -> None:
    gate = Gate(opened=True)

    async def use(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="no logits"):
            await logits(batcher, gate.model, image(255))
        assert (await logits(batcher, gate.model, image(7))).tolist() == [[7]]
        assert batcher.images == 0

    run(use)


def test_nobody_predicts_for_a_caller_that_left() -> None:
    gate = Gate()

    async def use(batcher: Batcher) -> None:
        first = await occupied(batcher, gate)
        left = asyncio.create_task(logits(batcher, gate.model, image(2, 2)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await first
        await logits(batcher, gate.model, image(3))
        while batcher.images:  # the call that was left is put away by the thread
            await asyncio.sleep(0.001)
        assert gate.batches == [1, 1]

    run(use)


def test_what_is_quick_is_predicted_in_the_loop_all_of_a_turn_together_and_what_is_not_in_threads() -> None:
    places: list[tuple[int, int]] = []

    def model(name: str, image_s: float) -> ServedModel:
        def logits(images_NHWC: np.ndarray) -> np.ndarray:
            places.append((threading.get_ident(), len(images_NHWC)))
            time.sleep(image_s * len(images_NHWC))
            return images_NHWC.reshape(-1, 1).astype(np.float32)

        return ServedModel(name, "1", ("a",), SHAPE, logits)

    quick, slow, here = model("quick", 0), model("slow", SHORT_S), threading.get_ident()

    async def use(batcher: Batcher) -> None:
        while True:  # a thread that had to wait for a core makes the model seem slow, for a while
            places.clear()
            answers = await asyncio.gather(*[logits(batcher, quick, image(n, n)) for n in range(7)])
            assert [answer.ravel().tolist() for answer in answers] == [[n, n] for n in range(7)]
            assert sum(images for _, images in places) == 14
            if places == [(here, 8), (here, 6)]:  # as many as max_batch allows, then the others
                break
        places.clear()
        for _ in range(3):
            await asyncio.gather(*[logits(batcher, slow, image(n)) for n in range(3)])
        assert here not in {thread for thread, _ in places}

    run(use)


def test_closing_answers_what_waits() -> None:
    gate = Gate()

    async def main() -> None:
        batcher = Batcher(max_batch=2, max_delay_us=100, max_queue=100, threads=2)
        calls = [asyncio.create_task(logits(batcher, gate.model, image(n))) for n in range(9)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.to_thread(batcher.close)
        assert [answer.item() for answer in await asyncio.gather(*calls)] == list(range(9))

    asyncio.run(main())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 254), min_size=1, max_size=5), max_size=30), st.integers(1, 6), st.integers(1, 3)
)
def test_everyone_gets_their_own_answer(requests: list[list[int]], max_batch: int, threads: int) -> None:
    gate = Gate(opened=True)

    async def use(batcher: Batcher) -> None:
        answers = await asyncio.gather(*[batcher.predict(gate.detailed, image(*pixels)) for pixels in requests])
        assert [logits_NK.ravel().tolist() for logits_NK, _ in answers] == requests
        assert [(-embeddings_NE[:, 1]).tolist() for _, embeddings_NE in answers] == requests
        assert sum(gate.batches) == sum(map(len, requests))
        assert all(size <= max(max_batch, 5) for size in gate.batches)

    run(use, max_batch=max_batch, max_queue=1000, threads=threads)
