"""Prometheus, its alert rules and Grafana's dashboards: a real Prometheus with the repository's own files watches real
services under load; every query of every dashboard gets data, and each alert fires when its fault is made.

`promtool test rules` with alert_rules.yml plays all alerts through with their own durations; here they are `shortened`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import yaml
from mlflow import MlflowClient
from prometheus_client import CollectorRegistry, Gauge, push_to_gateway
from service import CLASSES, SHAPE, PredictionService, png
from services_stack import Part, program

from conftest import missing
from data_loader.statistics import image_statistics
from data_loader.store import open_store
from models.networks import build
from models.onnx_export import to_onnx
from models.onnx_model import OnnxClassifier
from monitoring.reference import REFERENCE_FILE, REFERENCE_FOLDER, make_reference, write_reference
from serving.prediction_log import FILE_AGE_S
from serving.spool import MOST_BYTES, SLASH
from utils.artifacts import log_onnx_model

ROOT = Path(__file__).resolve().parent.parent
SERVICES = ROOT / "services"
sys.path.append(str(SERVICES))
PROMETHEUS, GRAFANA = SERVICES / "prometheus", SERVICES / "grafana"
RULES_TEST = Path(__file__).with_name("alert_rules.yml")
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"] for rule in RULES}

MACHINES_FAULTS = {"DiskNearlyFull", "MemoryLow"}
SICK_MACHINE = """
set -e
truncate --size 16M disk.img
mkfs.ext4 -q disk.img
mkdir disk
mount -o loop disk.img disk
dd if=/dev/zero of=disk/data status=none || true
sed 's/^MemAvailable: .*/MemAvailable: 1024 kB/' /proc/meminfo > meminfo
mount --bind meminfo /proc/meminfo
exec "$@"
"""
"""Starts a program that sees a further disk, which is full, and a kernel that has 1 MB of memory left to give. It alone
does: it is to be run as the first process of its own namespaces, whose mounts are those that the exporter reads."""
WINDOWS = {"5m": "6s", "15m": "8s", "1h": "10s", "1d": "60s"}
"""How far back a rule looks -> how far it does in these tests."""
SHORT = "1s"
"""What else is a time: between two looks of Prometheus, `for`, and the waits of Alertmanager."""
NAME = "digits"
SLOW_SHAPE = (448, 448, 3)


def shortened(text: str) -> str:
    """A file of services/prometheus/ with shorter times; nothing else is changed."""
    text = re.sub(r"\[(\d+\w)\]", lambda found: f"[{WINDOWS[found[1]]}]", text)
    times = "for|group_wait|group_interval|repeat_interval|scrape_interval|evaluation_interval"
    return re.sub(rf"^(\s*(?:{times}):) \w+$", rf"\1 {SHORT}", text, flags=re.MULTILINE)


# The files by themselves.


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Where a query stands, and its text."""
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}: {target['refId']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            yield f"{name}: ${variable['name']}", re.fullmatch(r"label_values\((.+), \w+\)", variable["definition"])[1]


def test_what_the_issue_names_is_there() -> None:
    assert DASHBOARDS.keys() == {"service", "data", "model", "business", "machine"}
    assert len(list(queries())) > 60


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_one_that_grafana_loads_and_a_person_reads(name: str) -> None:
    dashboard = DASHBOARDS[name]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert (dashboard["uid"], dashboard["title"].lower()) == (f"image-classifier-{name}", name)
    assert dashboard["description"]
    assert "id" not in dashboard  # Grafana gives it
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        covered = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not covered & cells, f"{panel['title']} lies over another one"
        assert place["x"] + place["w"] <= 24
        cells |= covered
    for panel in panels(dashboard):
        title = panel["title"]
        assert panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        (first, *_) = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert first["value"] is None, title
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])], title
        for target in panel["targets"]:
            assert target["legendFormat"] not in ("", "__auto") or panel["type"] == "table", title
            # What a legend names is a label that the query leaves.
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                grouped = re.findall(r"\bby \(([^)]*)\)", target["expr"])
                assert any(label in names for names in grouped) or not grouped, title
    described = {"type": "prometheus", "uid": source["uid"]}
    used = [panel["datasource"] for panel in panels(dashboard)]
    used += [target["datasource"] for panel in panels(dashboard) for target in panel["targets"]]
    used += [variable["datasource"] for variable in dashboard["templating"]["list"]]
    assert all(one == described for one in used)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    asked = set(re.findall(r"\$(\w+)", " ".join(expr for where, expr in queries() if where.startswith(f"{name}:"))))
    assert asked - {"__rate_interval"} == variables


def test_thresholds_that_a_panel_calls_those_of_an_alert_are() -> None:
    """A description that names an alert says its number, and so do the panel's colours."""
    named = 0
    found = {rule["alert"]: re.search(r"[<>] (0\.\d+)$", rule["expr"], re.M) for rule in RULES}
    limits = {alert: float(limit[1]) for alert, limit in found.items() if limit}
    limits |= {"MonitorNotRun": 2 * 86400}
    for dashboard in DASHBOARDS.values():
        for panel in panels(dashboard):
            for alert in re.findall(r"[Tt]he alert (\w+) is at", panel["description"]):
                assert alert in ALERTS
                steps = {step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]}
                used_of_free = 1 - limits[alert] if alert in MACHINES_FAULTS else limits[alert]
                assert used_of_free in steps, panel["title"]
                named += 1
    assert named >= 6


def test_grafana_is_given_the_files_where_compose_puts_them() -> None:
    compose = yaml.safe_load((SERVICES / "compose.yaml").read_text())["services"]["grafana"]
    mounted = dict(one.split(":")[:2] for one in compose["volumes"])
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/dashboards.yaml").read_text())["providers"]
    assert mounted["./grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning"
    home = next(one.partition("=")[2] for one in compose["environment"] if one.startswith("GF_DASHBOARDS"))
    assert home.startswith(provider["options"]["path"])
    assert Path(home).name in [f"{name}.json" for name in DASHBOARDS]


def test_rules_say_what_they_mean_and_what_to_do() -> None:
    assert len(ALERTS) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert re.search(r"\. [A-Z0-9].+\.$", rule["annotations"]["description"])  # what it means; what to do


def test_promtool_passes_the_files_and_plays_the_rules_through(tmp_path: Path) -> None:
    """As they are, and as the other tests shorten them; the file is tried with each alert on both sides."""
    for name, change in (("as they are", str), ("shortened", shortened)):
        folder = tmp_path / name
        folder.mkdir()
        for path in PROMETHEUS.glob("*.yml"):
            (folder / path.name).write_text(change(path.read_text()))
        (folder / "serving-token").touch()
        promtool("check", "config", folder / "prometheus.yml")
        promtool("check", "rules", folder / "rules.yml")
        done = subprocess.run([program("amtool"), "check-config", folder / "alertmanager.yml"], capture_output=True)
        assert done.returncode == 0
    promtool("test", "rules", RULES_TEST)
    text = RULES_TEST.read_text()
    assert set(re.findall(r'{alertname="(\w+)"}', text)) == ALERTS
    assert text.count("exp_samples: []") >= len(ALERTS)


def promtool(*words: object) -> None:
    done = subprocess.run([program("promtool"), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shortening_changes_times_and_nothing_else() -> None:
    for path in PROMETHEUS.glob("*.yml"):
        plain, short = path.read_text(), shortened(path.read_text())
        times = re.compile(r"(?<=\[)\d+[smhd](?=\])|(?<=: )\d+[smhd]$", re.MULTILINE)
        assert times.sub("T", plain) == times.sub("T", short)
    rules = yaml.safe_load(shortened((PROMETHEUS / "rules.yml").read_text()))
    assert {rule.get("for", SHORT) for group in rules["groups"] for rule in group["rules"]} == {SHORT}


# All of it at work.


class Program(Part):
    """A server of Debian's on a port of this machine; {port} in its command stands for that."""

    def __init__(self, folder: Path, *command: str, ready: str = "/-/ready") -> None:
        super().__init__(folder)
        folder.mkdir(exist_ok=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self._command, self._ready = command, ready

    def launch(self, log: Any) -> subprocess.Popen[bytes]:
        name, *words = (word.format(port=self.port) for word in self._command)
        return subprocess.Popen(
            [program(name), *words], cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}{self._ready}", timeout=5).close()
        except OSError as error:
            self.reason = str(error)
            return False
        return True

    def ask(self, path: str, **values: object) -> Any:
        """The data of an answer of Prometheus."""
        body = urllib.parse.urlencode(values).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", body if values else None, timeout=30) as response:
            return json.load(response)["data"]


class Receiver:
    """Takes what Alertmanager tells."""

    def __init__(self) -> None:
        told: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                told.extend(body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.told = told
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/told?channel=a&key=b"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def write_sure_model(path: Path) -> Path:
    """A network that is sure of some images: random weights, the last layer's fifty times larger."""
    torch.manual_seed(0)
    network = build("cnn", SHAPE, len(CLASSES), [120.0] * SHAPE[2], [70.0] * SHAPE[2])
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= 50
    to_onnx(network, SHAPE, CLASSES, path)
    return path


def write_slow_model(path: Path) -> Path:
    """A network that takes long for an image."""
    network = build("resnet18", SLOW_SHAPE, len(CLASSES), [120.0] * 3, [70.0] * 3)
    to_onnx(network, SLOW_SHAPE, CLASSES, path)
    return path


def sure_and_unsure(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """images_NHWC of which the model is sure, and some of which it is not."""
    random = np.random.default_rng(0)
    scale, shift = random.uniform(0, 80, (4000, 1, 1, 1)), random.uniform(40, 215, (4000, 1, 1, 1))
    images_NHWC = np.clip(random.normal(shift, scale, (4000, *SHAPE)), 0, 255).astype(np.uint8)
    logits_NK, _ = OnnxClassifier(model).outputs(images_NHWC)
    shares_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    order = np.argsort((shares_NK / shares_NK.sum(axis=1, keepdims=True)).max(axis=1))
    return images_NHWC[random.permutation(order[-400:])], images_NHWC[random.permutation(order[:400])]


def register(model: Path, folder: Path, images_NHWC: np.ndarray) -> str:
    """A run with the model and its reference, as training leaves them; the new champion's version."""
    outputs = OnnxClassifier(model).outputs(images_NHWC)
    labels_N, rows_N = outputs[0].argmax(axis=1), np.arange(len(images_NHWC))
    table = make_reference(images_NHWC, labels_N, rows_N, CLASSES, outputs=outputs, statistics=image_statistics)
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(write_reference(table, folder / REFERENCE_FILE)), REFERENCE_FOLDER)
        version = mlflow.register_model(log_onnx_model(run.info.run_id, model, images_NHWC[:1]), NAME).version
    MlflowClient().set_registered_model_alias(NAME, "champion", version)
    return str(version)


def push_forgotten(gateway: Program) -> None:
    """What is left at the Pushgateway by a `monitor` that ran three days ago for the last time."""
    registry = CollectorRegistry()
    Gauge("monitor_last_run_timestamp_seconds", "", registry=registry).set(time.time() - 3 * 86400)
    push_to_gateway(gateway.url, job="monitor", grouping_key={"model": "forgotten"}, registry=registry)


class Load:
    """Requests at a service until the block ends: what `ask` does, over and over, in some threads."""

    def __init__(self, ask: Callable[[int], None], threads: int = 1, pause_s: float = 0.1) -> None:
        self._stopped = threading.Event()
        self.failures: list[BaseException] = []

        def work(number: int) -> None:
            for turn in itertools.count(number):
                if self._stopped.wait(pause_s):
                    return
                try:
                    ask(turn)
                except (OSError, AssertionError) as error:
                    self.failures.append(error)

        self._threads = [threading.Thread(target=work, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class Watched:
    """All parts, and what Prometheus says of them."""

    def __init__(self, project: Path, at_end: ExitStack) -> None:
        self.project = project
        self.model = write_sure_model(project / "sure.onnx")
        self.slow_model = write_slow_model(project / "slow.onnx")
        self.sure_NHWC, self.unsure_NHWC = sure_and_unsure(self.model)
        register(self.model, project, self.sure_NHWC)
        self.token = "a-token-of-the-tests"
        self.told, self.worth = {True: 0, False: 0}, 0.0
        self.service = self.serve(
            f"models:/{NAME}@champion", "--poll_s=0.5", f"--log={project / 'log'}", SERVING_TOKEN=self.token
        )
        self.second = self.serve(self.slow_model, f"--log={project / 'second-log'}", SERVING_TOKEN=self.token)
        self.receiver = Receiver()
        at_end.callback(self.receiver.close)
        at_end.callback(lambda: [one.kill() for one in (self.service, self.second)])
        listen = "--web.listen-address=127.0.0.1:{port}"
        self.gateway = Program(project / "gateway", "prometheus-pushgateway", listen)
        self.node = Program(project / "node", "prometheus-node-exporter", listen, ready="/")
        arguments = ("--config.file=alertmanager.yml", "--storage.path=data", "--cluster.listen-address=")
        self.alertmanager = Program(project / "alertmanager", "prometheus-alertmanager", *arguments, listen)
        arguments = ("--config.file=prometheus.yml", "--storage.tsdb.path=data")
        self.prometheus = Program(project / "prometheus", "prometheus", *arguments, listen)
        self.configure()
        for part in (self.gateway, self.node, self.alertmanager, self.prometheus):
            at_end.callback(part.kill)
            part.start()
        for service in (self.service, self.second):
            service.wait()
        self.started_s = time.time()

    def serve(self, model: str | Path, *flags: str, port: int = 0, **environment: str) -> PredictionService:
        return PredictionService(model, self.project, *flags, port=port, **environment)

    @contextmanager
    def monitoring(self, since: datetime) -> Iterator[None]:
        """`monitor.py` at work during the block, on what the service has logged since then."""
        flags = [f"--log={self.project / 'log'}", f"--model_uri=models:/{NAME}/1", f"--since={since:%Y-%m-%dT%H:%M:%S}"]
        command = [sys.executable, str(ROOT / "monitor.py"), *flags, f"--push_gateway={self.gateway.url}"]
        monitor = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            yield
            said, _ = monitor.communicate(timeout=60)
            assert monitor.returncode == 0, said
        finally:
            monitor.kill()
            monitor.communicate()

    def configure(self) -> None:
        """The repository's files, with these addresses as compose.py writes them, and shorter times."""
        from watching import alertmanager_config, prometheus_config

        values = {
            "SERVING_TARGETS": f"127.0.0.1:{self.service.port},127.0.0.1:{self.second.port}",
            "PROMETHEUS_PORT": str(self.prometheus.port),
            "ALERTMANAGER_PORT": str(self.alertmanager.port),
            "PUSHGATEWAY_PORT": str(self.gateway.port),
            "NODE_EXPORTER_PORT": str(self.node.port),
            "ALERT_WEBHOOK_URL": self.receiver.url,
        }
        folder = self.prometheus.folder
        (folder / "prometheus.yml").write_text(shortened(prometheus_config(values)))
        (folder / "rules.yml").write_text(shortened((PROMETHEUS / "rules.yml").read_text()))
        (folder / "serving-token").write_text(self.token)
        (self.alertmanager.folder / "alertmanager.yml").write_text(shortened(alertmanager_config(values)))

    def ask(self, service: PredictionService, path: str, value: Any) -> tuple[int, Any]:
        return service.post(path, value, Authorization=f"Bearer {self.token}")

    def predict(self, images_NHWC: np.ndarray, wrong: bool = False, value: float = 1.5) -> None:
        """Ask for predictions in three protocols, and tell the true classes."""
        status, answer = self.ask(self.service, "/invocations", {"inputs": images_NHWC[2:].tolist()})
        assert status == 200
        labels = [CLASSES[(int(one.rpartition("-")[2]) + wrong) % len(CLASSES)] for one in answer["ids"]]
        told = [{"id": one, "label": label, "value": value} for one, label in zip(answer["ids"], labels, strict=True)]
        assert self.ask(self.service, "/feedback", told)[0] == 200
        self.told[not wrong] += len(told)
        self.worth += value * len(told)
        tensor = {"name": "images", "shape": [1, *SHAPE], "datatype": "UINT8", "data": images_NHWC[0].ravel().tolist()}
        assert self.ask(self.service, f"/v2/models/{NAME}/infer", {"inputs": [tensor]})[0] == 200
        headers = {"Authorization": f"Bearer {self.token}"}
        assert self.service.ask("POST", "/predict", png(images_NHWC[1]), **headers)[0] == 200

    def sure(self, turn: int) -> None:
        """Good requests: nearly every prediction is right, one input in a hundred is none."""
        rows = np.arange(turn * 20, turn * 20 + 20) % len(self.sure_NHWC)
        self.predict(self.sure_NHWC[rows], wrong=turn % 20 == 7, value=-4 if turn % 20 == 7 else 1.5)
        if turn % 30 == 3:
            self.bad(turn)

    def unsure(self, turn: int) -> None:
        rows = np.arange(turn * 20, turn * 20 + 20) % len(self.unsure_NHWC)
        self.predict(self.unsure_NHWC[rows])

    def mistaken(self, turn: int) -> None:
        rows = np.arange(turn * 20, turn * 20 + 20) % len(self.sure_NHWC)
        self.predict(self.sure_NHWC[rows], wrong=turn % 2 == 0, value=-4 if turn % 2 == 0 else 1.5)

    def bad(self, turn: int) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        assert self.service.ask("POST", "/predict", b"no image", **headers)[0] == 400

    def overload(self, turn: int) -> None:
        """Eight images that take long; a client that is refused waits before it asks again."""
        images_NHWC = np.full((8, *SLOW_SHAPE), turn % 256, np.uint8)
        parameters = {"binary_data_size": images_NHWC.nbytes}
        tensor = {"name": "images", "shape": images_NHWC.shape, "datatype": "UINT8", "parameters": parameters}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Inference_Header_Content_Length": str(len(head))}
        body = head + images_NHWC.tobytes()
        status, _, _ = self.second.ask("POST", "/v2/models/classifier/infer", body, **headers)
        assert status in (200, 503)
        time.sleep(0.2 if status == 503 else 0)

    def alerts(self, state: str = "firing") -> dict[str, dict[str, Any]]:
        found = self.prometheus.ask("alerts")["alerts"]
        return {one["labels"]["alertname"]: one for one in found if one["state"] == state}

    def fire(self, *names: str) -> None:
        """Wait until these alerts fire."""
        until(lambda: set(names) <= self.alerts().keys(), lambda: f"of {names} fire {self.alerts().keys()}")

    def value(self, query: str) -> float:
        """The sum of an instant query's samples."""
        return sum(float(one["value"][1]) for one in self.prometheus.ask("query", query=query)["result"])

    def compare_with_what_was_told(self) -> None:
        """Nobody asks just now, so Prometheus soon has all the feedback, to the last one."""
        gain, loss = (f'sum(serving_feedback_value_total{{sign="{sign}"}})' for sign in ("gain", "loss"))
        right, wrong = (f'sum(serving_feedback_total{{correct="{correct}"}})' for correct in ("true", "false"))
        until(lambda: self.value(f"{right} + {wrong}") == sum(self.told.values()), lambda: self.told)
        assert (self.value(right), self.value(wrong)) == (self.told[True], self.told[False])
        assert self.value(f"{gain} - {loss}") == pytest.approx(self.worth)

    def has_data(self, query: str) -> bool:
        """Whether a query, as a dashboard has it, had a number at any time since the beginning."""
        query = query.replace("$__rate_interval", "5s").replace("$instance", ".*")
        asked = {"query": query, "start": self.started_s, "end": time.time(), "step": "1s"}
        series = self.prometheus.ask("query_range", **asked)["result"]
        return any(math.isfinite(float(value)) for one in series for _, value in one["values"])


def until(reached: Callable[[], bool], told: Callable[[], object], patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not reached():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def test_the_alerts_of_a_machine_fire_when_its_disk_and_its_memory_are_full(tmp_path: Path) -> None:
    from watching import PORTS, prometheus_config

    if os.getuid():
        missing("only root can mount a disk, which this test fills")
    listen = "--web.listen-address=127.0.0.1:{port}"
    exporter = program("prometheus-node-exporter")
    sick = ("unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", SICK_MACHINE, "sh", exporter, listen)
    node = Program(tmp_path / "node", *sick, ready="/")
    arguments = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", listen)
    prometheus = Program(tmp_path / "prometheus", "prometheus", *arguments)
    nobody = dict.fromkeys(PORTS.values(), "1")
    config = prometheus_config({**nobody, "SERVING_TARGETS": "", "NODE_EXPORTER_PORT": str(node.port)})
    (prometheus.folder / "prometheus.yml").write_text(shortened(config))
    (prometheus.folder / "rules.yml").write_text(shortened((PROMETHEUS / "rules.yml").read_text()))
    (prometheus.folder / "serving-token").touch()
    with ExitStack() as at_end:
        for part in (node, prometheus):
            at_end.callback(part.kill)
            part.start()

        def summaries() -> set[str]:
            firing = [one for one in prometheus.ask("alerts")["alerts"] if one["state"] == "firing"]
            return {one["annotations"]["summary"] for one in firing}

        machine = f"127.0.0.1:{node.port}"
        disk = f"0% are left on {node.folder / 'disk'} of {machine}"
        memory = rf"0\.0\d+% of the memory of {machine} are free"
        until(lambda: disk in summaries() and any(re.fullmatch(memory, one) for one in summaries()), summaries)


LOGGED_WITHIN_S = FILE_AGE_S + 1
DEPENDS_ON_THE_MACHINE = {"ServiceSlow", *MACHINES_FAULTS}
"""What may be true of the machine that the tests run on."""


@pytest.mark.slow
def test_every_alert_fires_at_its_fault_and_every_query_gets_data(project: Path) -> None:
    """Everything is well at first; then one fault after the other, and what fires before it is not what fires after."""
    with ExitStack() as at_end:
        watched = Watched(project, at_end)
        seen: set[str] = set()

        def fires(*names: str) -> None:
            assert not seen & set(names)
            watched.fire(*names)
            seen.update(names)

        with Load(watched.sure) as load:
            until(lambda: watched.value("sum(up == 1)") == 6, lambda: watched.prometheus.ask("query", query="up"))
            time.sleep(LOGGED_WITHIN_S)
            with watched.monitoring(datetime.now(UTC) - timedelta(hours=1)):
                pass
            until(lambda: watched.value("monitor_window_images") >= 100, lambda: "there are no gauges of a monitor")
            assert watched.value("monitor_drift_detected") == 0
            assert (
                watched.value("count(serving_log_dropped_rows_total == 0)") == 4
            )  # so that the first row lost is seen
            assert load.failures == []
            assert watched.alerts().keys() - DEPENDS_ON_THE_MACHINE == set()

            push_forgotten(watched.gateway)
            broken = MlflowClient().create_model_version(NAME, str(project / "nothing here")).version
            MlflowClient().set_registered_model_alias(NAME, "champion", broken)
            fires("MonitorNotRun", "ModelChangeFails")

        expected = {"ConfidenceDrop", "BadInputs", "ServiceDown", "FeedbackAccuracyLow", "DriftDetected"}
        assert not watched.alerts().keys() & expected
        watched.second.kill()
        since = datetime.now(UTC)
        with Load(watched.unsure), Load(watched.bad):
            fires("ConfidenceDrop", "BadInputs", "ServiceDown")
            time.sleep(LOGGED_WITHIN_S)
        break_log(project / "second-log")
        flags = ("--max_queue=8", f"--log={project / 'second-log'}")
        port, token = watched.second.port, {"SERVING_TOKEN": watched.token}
        watched.second = watched.serve(watched.slow_model, *flags, port=port, **token)
        with watched.monitoring(since), Load(watched.mistaken):
            fires("FeedbackAccuracyLow")
        fires("DriftDetected")
        watched.compare_with_what_was_told()

        expected = {"ServiceErrors", "ServiceSlow", "QueueNearlyFull", "LogUnsent", "LogRowsDropped"}
        assert not watched.alerts().keys() & (expected - DEPENDS_ON_THE_MACHINE - {"LogUnsent"})
        watched.second.wait()
        with Load(watched.overload, threads=3) as load, Load(watched.sure, pause_s=0.5):
            fires(*expected)
        assert load.failures == []
        watched.gateway.kill()
        fires("TargetDown")

        assert [where for where, query in queries() if not watched.has_data(query)] == []
        assert seen == ALERTS - MACHINES_FAULTS
        for alert in watched.alerts().values():
            assert "{{" not in "".join(alert["annotations"].values())
        told = {one["labels"]["alertname"]: one["annotations"]["summary"] for one in watched.receiver.told}
        assert told["ServiceDown"] == f"The prediction service 127.0.0.1:{port} does not answer Prometheus"


def break_log(folder: Path) -> None:
    """A log as after hours in which its place could not be written to: as much waits as may, and it still cannot be."""
    for path in (folder / "predictions", folder / "images"):
        if path.exists():
            path.rename(path.with_name(f"{path.name}-of-before"))
        path.write_text("where a folder was")
    name = "predictions/day=2026-01-01/000000-00000000-000001.parquet"
    waiting = open_store(str(folder)).spool / name.replace("/", SLASH)
    waiting.parent.mkdir(exist_ok=True)
    with waiting.open("wb") as file:
        file.truncate(MOST_BYTES)
