"""Pods of the test API server: the main container of each runs as a Docker container, with states as recorded."""

import base64
import contextlib
import random
import re
import string
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import docker.errors

from object_store import Object, PodOutput, event, new_metadata, now

LABEL = "mlproject-backends-tests"  # of containers, networks and volumes
INDEX = "batch.kubernetes.io/job-completion-index"
NODE = "node1"
NODE_MEMORY = 64 * 2**30
TICK_S = 0.05
UNITS = {"": 1, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class CannotRun(Exception):
    """A container that waits, with the reason and the message of its status."""


class RunningPod(threading.Thread):
    """The scheduler and the kubelet of one pod."""

    def __init__(self, job: Any, index: int):
        super().__init__(daemon=True)
        self.job, self.index = job, index
        self.server, self.engine = job.server, job.containers.engine
        indexed = job.spec["completionMode"] == "Indexed"
        self.hostname = f"{job.name}-{index}" if indexed else f"{job.name}-{suffix()}"
        self.name = f"{self.hostname}-{suffix()}" if indexed else self.hostname
        self.phase, self.exit_code, self.disrupted, self.ended_at = "Pending", 0, False, 0.0
        self._stopped = threading.Event()
        self._container = ""
        self._folder = tempfile.TemporaryDirectory(prefix="pod-")
        self.object = self._made(indexed)

    def _made(self, indexed: bool) -> Object:
        template = self.job.job["spec"]["template"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": self.job.name, "controller": True}
        owner["uid"] = self.job.job["metadata"]["uid"]
        index = {INDEX: str(self.index)} if indexed else {}
        metadata = {
            "name": self.name,
            "labels": {**template["metadata"]["labels"], **index},
            "annotations": {**template["metadata"].get("annotations", {}), **index},
            "ownerReferences": [owner],
        }
        spec = {**template["spec"], "hostname": self.hostname}
        pod = {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": new_metadata(metadata, self.server.namespace),
            "spec": spec,
        }
        made: Object = self.server.store.put("pods", {**pod, "status": {"phase": "Pending"}})
        return made

    @property
    def main(self) -> Object:
        container: Object = self.object["spec"]["containers"][0]
        return container

    def run(self) -> None:
        try:
            if self._scheduled() and self._running():
                self._follow()
        finally:
            if self._stopped.is_set():
                time.sleep(TICK_S * 4)
                self.server.store.remove("pods", self.name)
            if self._container:
                with contextlib.suppress(docker.errors.APIError):
                    self.engine.remove_container(self._container, force=True, v=True)
            self._folder.cleanup()

    def stop(self, evicted: bool = False) -> None:
        """End the pod as a deletion does: SIGTERM, 30 seconds, SIGKILL; then it is gone."""
        if self._stopped.is_set() or self.phase in ("Succeeded", "Failed"):
            self.server.store.remove("pods", self.name)
            return
        if evicted:
            self.disrupted = True
            words = {"reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}
            self._change(lambda status: _set_condition(status, "DisruptionTarget", "True", **words))

        def mark(pod: Object) -> None:
            pod["metadata"] |= {"deletionTimestamp": now(), "deletionGracePeriodSeconds": 30}

        self.server.store.change("pods", self.name, mark)
        self._stopped.set()
        self._tell("Killing", "Stopping container main")
        if self._container:
            threading.Thread(target=self._stop_container, daemon=True).start()

    def kill(self) -> None:
        """End the pod without ceremony."""
        self._stopped.set()
        if self._container:
            with contextlib.suppress(docker.errors.APIError):
                self.engine.remove_container(self._container, force=True, v=True)
        self.join(10)

    def _stop_container(self) -> None:
        with contextlib.suppress(docker.errors.APIError):
            self.engine.stop(self._container, timeout=30)

    def _tell(self, reason: str, message: str, warning: bool = False) -> None:
        self.server.store.put("events", event(self.object, "Pod", reason, message, warning))

    def _change(self, change: Any) -> None:
        self.server.store.change("pods", self.name, lambda pod: change(pod["status"]))

    def _state(self, phase: str, **state: Any) -> None:
        """Set the state of the pod's container."""
        self.phase = phase
        one = {
            "name": "main",
            "image": self.main["image"],
            "state": state,
            "ready": "running" in state,
            "restartCount": 0,
        }
        self._change(lambda status: status.update(phase=phase, containerStatuses=[one]))

    def _scheduled(self) -> bool:
        message = ""
        if _amount(self._limits().get("memory", "0")) > NODE_MEMORY:
            message = "1 Insufficient memory."
        elif self._limits().get("nvidia.com/gpu"):
            message = "1 Insufficient nvidia.com/gpu."
        elif self.object["spec"].get("nodeSelector"):
            message = "1 node(s) didn't match Pod's node affinity/selector."
        for volume in self.object["spec"].get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in self.job.containers.claims:
                message = f'persistentvolumeclaim "{claim}" not found.'
        if message:
            text = f"0/1 nodes are available: {message} no new claims to deallocate, preemption: 0/1 nodes are "
            text += "available: 1 Preemption is not helpful for scheduling."
            words = {"reason": "Unschedulable", "message": text}
            self._change(lambda status: _set_condition(status, "PodScheduled", "False", **words))
            self._tell("FailedScheduling", text, warning=True)
            self._stopped.wait()
            return False
        self.server.store.change("pods", self.name, lambda pod: pod["spec"].update(nodeName=NODE))
        self._change(lambda status: _set_condition(status, "PodScheduled", "True"))
        self._tell("Scheduled", f"Successfully assigned {self.server.namespace}/{self.name} to {NODE}")
        self._state("Pending", waiting={"reason": "ContainerCreating"})
        return True

    def _running(self) -> bool:
        """Make and start the container; a reason why it cannot be made stays until the pod is deleted."""
        try:
            self._pull()
            self._create()
        except CannotRun as reason:
            self._state("Pending", waiting={"reason": reason.args[0], "message": reason.args[1]})
            self._stopped.wait()
            return False
        try:
            self.engine.start(self._container)
        except docker.errors.APIError as error:
            self._ended({"exitCode": 128, "reason": "StartError", "message": str(error.explanation)})
            return False
        self._tell("Started", "Container started")
        self.server.logs[self.name] = PodOutput()
        self._state("Running", running={"startedAt": now()})
        return True

    def _pull(self) -> None:
        image = self.main["image"]
        if not re.fullmatch(r"[a-z0-9.:@/_-]+", image):
            message = f'Failed to apply default image tag "{image}": couldn\'t parse image name'
            raise CannotRun("InvalidImageName", message)
        try:
            self.engine.inspect_image(image)
            self._tell("Pulled", f'Container image "{image}" already present on machine and can be accessed by the pod')
        except docker.errors.ImageNotFound:
            self._tell("Pulling", f'Pulling image "{image}"')
            try:
                self.engine.pull(image)
            except docker.errors.APIError as error:
                message = f'failed to pull and unpack image "{image}": {error.explanation}'
                self._tell("Failed", f'Failed to pull image "{image}": {message}', warning=True)
                self._state("Pending", waiting={"reason": "ErrImagePull", "message": message})
                raise CannotRun(
                    "ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {message}'
                ) from error

    def _create(self) -> None:
        security = {**self.object["spec"].get("securityContext", {}), **self.main.get("securityContext", {})}
        user = self.engine.inspect_image(self.main["image"])["Config"].get("User") or "0"
        user = str(security.get("runAsUser", user))
        if security.get("runAsNonRoot") and user in ("0", "root"):
            raise CannotRun("CreateContainerConfigError", "container has runAsNonRoot and image will run as root")
        message = Path(self._folder.name, "termination-log")
        message.touch()
        message.chmod(0o666)
        memory = _amount(self._limits().get("memory", "0"))
        host: Object = {
            "CapDrop": security.get("capabilities", {}).get("drop", []),
            "SecurityOpt": ["no-new-privileges"] if security.get("allowPrivilegeEscalation") is False else [],
            "GroupAdd": [str(security["fsGroup"])] if "fsGroup" in security else [],
            "Memory": int(memory),
            "MemorySwap": int(memory),
            "NanoCpus": int(_amount(self._limits().get("cpu", "0")) * 10**9),
            "Binds": [f"{message}:/dev/termination-log"],
            "Tmpfs": {},
            **self._volumes(),
        }
        body = {
            "Image": self.main["image"],
            "Entrypoint": [_expanded(text, self._env()) for text in self.main["command"]],
            "Cmd": [],
            "Env": [f"{name}={value}" for name, value in self._env().items()],
            "Hostname": self.hostname[:63],
            "User": f"{user}:{security.get('runAsGroup', 0)}",
            "Labels": self.job.containers.labels,
            "HostConfig": host,
        }
        subdomain = self.object["spec"].get("subdomain")
        if subdomain and self.server.store.get("services", subdomain):
            network = self._network(subdomain)
            host["NetworkMode"] = network
            aliases = [self.hostname, f"{self.hostname}.{subdomain}"]
            body["NetworkingConfig"] = {"EndpointsConfig": {network: {"Aliases": aliases}}}
        self._container = self.engine.create_container_from_config(body, f"k8s-{self.name}")["Id"]
        self._tell("Created", "Container created")

    def _network(self, name: str) -> str:
        with _networks, contextlib.suppress(docker.errors.APIError):
            self.engine.create_network(f"k8s-{name}", check_duplicate=True, labels=self.job.containers.labels)
        return f"k8s-{name}"

    def _volumes(self) -> Object:
        volumes = {volume["name"]: volume for volume in self.object["spec"].get("volumes", ())}
        host: Object = {}
        for mount in self.main.get("volumeMounts", ()):
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if path == "/dev/shm":
                host["ShmSize"] = int(_amount(volume["emptyDir"]["sizeLimit"]))
            elif claim := volume.get("persistentVolumeClaim"):
                name = f"k8s-{claim['claimName']}"
                self.engine.create_volume(name, labels=self.job.containers.labels)
                self._open_to_all(name)
                host["Mounts"] = [{"Type": "volume", "Source": name, "Target": path}]
            elif "emptyDir" in volume:
                host["Tmpfs"] = {path: "mode=1777,exec"}
        return host

    def _open_to_all(self, volume: str) -> None:
        """What fsGroup does to a volume, roughly."""
        body = {
            "Image": self.main["image"],
            "Entrypoint": ["chmod", "1777", "/volume"],
            "User": "0",
            "Labels": self.job.containers.labels,
            "HostConfig": {"Mounts": [{"Type": "volume", "Source": volume, "Target": "/volume"}]},
        }
        helper = self.engine.create_container_from_config(body)["Id"]
        self.engine.start(helper)
        self.engine.wait(helper)
        self.engine.remove_container(helper)

    def _env(self) -> dict[str, str]:
        env: dict[str, str] = {}
        for variable in self.main.get("env", ()):
            source = variable.get("valueFrom", {})
            if reference := source.get("secretKeyRef"):
                env[variable["name"]] = self._secret_value(reference["name"], reference["key"])
            elif reference := source.get("fieldRef"):
                env[variable["name"]] = _downward(self.object, reference["fieldPath"])
            else:
                env[variable["name"]] = _expanded(variable.get("value", ""), env)
        return env

    def _secret_value(self, name: str, key: str) -> str:
        secret = self.server.store.get("secrets", name)
        if secret is None:
            raise CannotRun("CreateContainerConfigError", f'secret "{name}" not found')
        if key not in secret["data"]:
            where = f"{self.server.namespace}/{name}"
            raise CannotRun("CreateContainerConfigError", f"couldn't find key {key} in Secret {where}")
        return base64.b64decode(secret["data"][key]).decode()

    def _limits(self) -> Object:
        limits: Object = self.main["resources"].get("limits", {})
        return limits

    def _follow(self) -> None:
        """Keep the container's log until it ends."""
        log, line = self.server.logs[self.name], b""
        with contextlib.suppress(docker.errors.APIError):
            entries = self.engine.logs(self._container, stream=True, follow=True, timestamps=True)
            with contextlib.closing(entries):
                for entry in entries:  # one each 16 KiB of a line
                    stamp, _, text = entry.partition(b" ")
                    line += text
                    if line.endswith(b"\n"):
                        log.add(line[:-1].decode(errors="replace"), stamp.decode())
                        line = b""
            last = self.engine.logs(self._container, timestamps=True, tail=1)
            if last and not last.endswith(b"\n"):  # following leaves such a line out
                stamp, _, text = last.partition(b" ")
                log.add(text.decode(errors="replace"), stamp.decode())
        try:
            code = self.engine.wait(self._container)["StatusCode"]
            killed = self.engine.inspect_container(self._container)["State"]["OOMKilled"]
        except docker.errors.APIError:
            code, killed = 137, False
        log.close()
        reason = "OOMKilled" if killed and code else "Error" if code else "Completed"
        ended = {"exitCode": code, "reason": reason, "containerID": f"docker://{self._container}"}
        message = Path(self._folder.name, "termination-log").read_text()
        self._ended({**ended, **({"message": message} if message else {})})

    def _ended(self, terminated: Object) -> None:
        self.exit_code, self.ended_at = terminated["exitCode"], time.monotonic()
        terminated = {"startedAt": now(), "finishedAt": now(), **terminated}
        self._state("Running", terminated=terminated)
        time.sleep(TICK_S)
        self._state("Failed" if self.exit_code else "Succeeded", terminated=terminated)


_networks = threading.Lock()


def suffix() -> str:
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=5))


def _amount(quantity: str | int) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _expanded(text: str, env: dict[str, str]) -> str:
    """$(NAME) is the variable's value where there is one, $$ is $."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def _downward(pod: Object, path: str) -> str:
    match = re.fullmatch(r"metadata\.(labels|annotations)\['(.*)'\]", path)
    value: str = pod["metadata"][match[1]][match[2]] if match else pod["metadata"][path.rpartition(".")[2]]
    return value


def _set_condition(status: Object, kind: str, value: str, **words: str) -> None:
    others = [one for one in status.get("conditions", ()) if one["type"] != kind]
    status["conditions"] = [*others, {"type": kind, "status": value, "lastTransitionTime": now(), **words}]
