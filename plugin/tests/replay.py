"""Plays a recording of a real API server: what its watches delivered for a Job, for the Job that is created here."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

from api_server import ApiServer
from object_store import Object, PodOutput

RECORDINGS = Path(__file__).parent / "recordings"
LONGEST_PAUSE_S = 0.5


class Recording:
    """One file of recordings/."""

    def __init__(self, name: str):
        lines = [json.loads(line) for line in (RECORDINGS / f"{name}.jsonl").read_text().splitlines()]
        self.note = lines[0]["note"]
        self.requests = [line for line in lines if line["kind"] == "request"]
        self.watched = [line for line in lines if line["kind"] == "watch"]
        posted = [one for one in self.requests if one["path"].endswith("/jobs") and one["status"] == 201]
        self.job: Object = next(one for one in posted if "dryRun" not in (one.get("params") or {}))["body"]

    @property
    def name(self) -> str:
        name: str = self.job["metadata"]["name"]
        return name

    def output(self, pod: str) -> list[str]:
        """What was read of a pod's log: with its times where it was asked for with them."""
        texts = [one["response"] for one in self.requests if f"/{pod}/log" in one["path"] and one["status"] == 200]
        stamped = [line for text in texts for line in text.splitlines() if re.match(r"\d{4}-\d\d-\d\dT", line)]
        known = [line.partition(" ")[2] for line in stamped]
        plain = [line for text in texts for line in text.splitlines() if line not in stamped]
        missing = [line for line in plain if line not in known]
        return stamped + [f"2026-11-21T01:23:3{4 + number}.0Z {line}" for number, line in enumerate(missing)]


class Replay:
    """A controller for ApiServer: at `pace`, a fraction of the time it took, once the Job is watched."""

    def __init__(self, recording: Recording, pace: float = 0.2, watched: bool = True):
        self.recording, self.pace, self.watched = recording, pace, watched
        self.ended = threading.Event()

    def __call__(self, server: ApiServer, job: Object) -> None:
        self._gone = threading.Event()
        server.on_delete.append(lambda thing, policy: self._stop(server))
        threading.Thread(target=self._play, args=(server, job), daemon=True).start()

    def _stop(self, server: ApiServer) -> None:
        """The Job was deleted here: its pods end and go, and the rest of the recording does not matter."""
        self._gone.set()
        for pod in server.store.list("pods")[0]:
            name = pod["metadata"]["name"]
            if name in server.logs:
                server.logs[name].close()
            server.store.remove("pods", name)

    def _play(self, server: ApiServer, job: Object) -> None:
        while self.watched and not self._gone.wait(0.02):
            kinds = {one.path.rpartition("/")[2] for one in server.requests if "watch" in one.query}
            if kinds == {"jobs", "pods", "events"}:
                break
        before = self.recording.watched[0]["t"]
        for entry in self.recording.watched:
            time.sleep(min((entry["t"] - before) * self.pace, LONGEST_PAUSE_S))
            before = entry["t"]
            thing = self._renamed(entry["event"]["object"], job)
            kind = entry["path"].rpartition("/")[2]
            if self._gone.is_set():
                break
            if entry["event"]["type"] == "DELETED":
                server.store.remove(kind, thing["metadata"]["name"])
            else:
                server.store.put(kind, thing)
            if kind == "pods":
                self._write_log(server, entry["event"]["object"], thing)
        self.ended.set()

    def _renamed(self, thing: Object, job: Object) -> Any:
        """The object with the new Job's name, uid and annotations in the places of the recorded ones."""
        old, new = self.recording.name, job["metadata"]["name"]
        text = json.dumps(thing)
        text = re.sub(rf"(?<![\w-]){old}(?=(-\d+)?-[a-z0-9]{{5}}(?![\w-]))", new, text)  # pods
        text = re.sub(rf'(?<="){old}(?=("|\.|-\d+"|-\d*-?"))', new, text)
        renamed = json.loads(text)
        owner = next(iter(renamed["metadata"].get("ownerReferences", ())), None)
        if renamed["kind"] == "Job" and renamed["metadata"]["name"] == new:
            renamed["metadata"]["uid"] = job["metadata"]["uid"]
            renamed["metadata"]["annotations"] = job["metadata"]["annotations"]
        elif owner and owner["name"] == new:
            owner["uid"] = job["metadata"]["uid"]
        return renamed

    def _write_log(self, server: ApiServer, recorded: Object, pod: Object) -> None:
        state = (pod["status"].get("containerStatuses") or [{"state": {}}])[0]["state"]
        name = pod["metadata"]["name"]
        if ("running" in state or "terminated" in state) and name not in server.logs:
            log = server.logs[name] = PodOutput()
            for entry in self.recording.output(recorded["metadata"]["name"]):
                stamp, _, text = entry.partition(" ")
                log.add(text, stamp)
        if "terminated" in state:
            server.logs[name].close()
