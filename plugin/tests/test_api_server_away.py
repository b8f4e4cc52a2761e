"""A minute without an API server, as when its control plane is upgraded, costs a job that runs nothing."""

import threading
import time

import pytest

from api_server import ApiServer
from mlproject_backends.config import Config
from mlproject_backends.job import Job, State
from mlproject_backends.kubernetes import KubernetesTarget
from replay import Recording, Replay

AWAY_S = 60


@pytest.mark.slow
def test_an_api_server_away_for_a_minute_only_delays(api_server: ApiServer) -> None:
    api_server.controller = played = Replay(Recording("success"))
    told: list[str] = []
    output: list[str] = []
    seen: list[float] = []
    ended_meanwhile: list[bool] = []

    def back() -> None:
        seen.append(time.monotonic())
        ended_meanwhile.append(played.ended.is_set())
        api_server.start()

    def tell(sentence: str) -> None:
        told.append(sentence)
        if sentence.startswith("running on") and not seen:
            api_server.stop()
            seen.append(time.monotonic())
            threading.Timer(AWAY_S, back).start()

    job = Job("image-classifier-main-0a1b2c3d", "run", {}, "registry/image:tag", ("python",), {})
    submitted = KubernetesTarget(Config("kubernetes")).submit(job)
    state = submitted.watch(tell, output.append)
    submitted.clean_up()
    gone, back_again = seen
    assert back_again - gone >= AWAY_S and ended_meanwhile == [True]
    assert state == State("FINISHED", "the command ended with exit code 0", 0)
    assert output == [f"step {number}" for number in range(5)]
    outage = [sentence for sentence in told if "API server" in sentence]
    assert len(outage) == 2
    assert "does not answer" in outage[0] and outage[0].endswith("the job goes on meanwhile, trying again")
    assert outage[1] == "the API server answers again"
