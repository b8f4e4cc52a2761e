"""A job as Kubernetes manifests: plain dicts, pure, and passing the restricted Pod Security Standard.

Three layers are merged, the later one wins: what is sensible by default, the user's template, and what the run needs.

Long-running side containers in the template must be native sidecars (initContainers with `restartPolicy: Always`):
an ordinary second container keeps a Job from ending as long as it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mlproject_backends.config import Config
from mlproject_backends.inside import CANNOT_START
from mlproject_backends.job import CACHE_DIR, Job, Resources

Manifest = dict[str, Any]

MAIN = "main"  # the container that runs the entry point
MASTER_PORT = 29500  # PyTorch's default
KEPT_S = 24 * 3600  # how long an ended Job can still be looked at
USER_ID = 1000  # an image whose USER is a name cannot prove that it is not root

JOB_NAME = "batch.kubernetes.io/job-name"
INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE = "kueue.x-k8s.io/queue-name"
IMAGE_TIMEOUT, PENDING_TIMEOUT = "mlproject.image-timeout-s", "mlproject.pending-timeout-s"  # annotations of a Job
NOT_SHOWN = "(not shown)"

# Lists whose items have a name of their own: items of the same name are one item. All other lists are replaced.
_ITEM_NAME = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}

_READ_FIRST = ("apiVersion", "kind", "metadata", "name", "namespace", "image", "command", "env", "action")
_READ_LAST = ("initContainers", "containers", "volumes", "template", "spec")


def render(job: Job, config: Config, template: Manifest | None = None) -> list[Manifest]:
    """What is sent for `job`, in the order of sending: Secret (keys only), headless Service, Job.

    `template` is the user's Job manifest; of it, all survives but what names this run and says what it executes.
    """
    own_secrets = sorted(set(job.secrets) - set(config.env_from_secret))
    manifests = []
    if own_secrets:
        manifests.append(_secret(job, own_secrets))
    if config.nodes > 1:
        manifests.append(_service(job))
    manifests.append(_job(job, config, own_secrets, template or {}))
    if namespace := config.namespace or (template or {}).get("metadata", {}).get("namespace"):
        for manifest in manifests:
            manifest["metadata"]["namespace"] = namespace
    return manifests


def merged(under: Any, over: Any, list_name: str = "") -> Any:
    """`over` laid on `under`: mappings key by key, named lists item by item, anything else replaced."""
    if isinstance(under, dict) and isinstance(over, dict):
        both = {key: merged(under[key], over[key], key) for key in under.keys() & over.keys()}
        return {**under, **over, **both}
    if isinstance(under, list) and isinstance(over, list) and list_name in _ITEM_NAME:
        return _merged_items(under, over, list_name)
    return over


def _merged_items(under: list[Any], over: list[Any], list_name: str) -> list[Any]:
    key = _ITEM_NAME[list_name]
    ours = {item[key]: item for item in over}
    items = []
    for item in under:
        replacement = ours.pop(item[key], None) if isinstance(item, dict) and key in item else None
        if replacement is None:
            items.append(item)
        elif list_name.lower().endswith("containers"):
            items.append(merged(item, replacement))
        else:  # `value` in the place of `valueFrom`, `emptyDir` in the place of a claim: never both
            items.append(replacement)
    return items + list(ours.values())


def _labels(job: Job) -> dict[str, str]:
    known = {
        "app.kubernetes.io/name": job.labels.get("project"),
        "app.kubernetes.io/component": job.labels.get("entry-point"),
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/managed-by": "mlproject-backends",
    }
    ours = {f"mlproject.{name}": value for name, value in job.labels.items()}
    return {name: value for name, value in {**known, **ours}.items() if value}


def _secret(job: Job, variables: list[str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "type": "Opaque",
        "immutable": True,
        "stringData": dict.fromkeys(variables, NOT_SHOWN),
    }


def _service(job: Job) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "clusterIP": "None",
            "selector": {JOB_NAME: job.name},
            # The ranks look for each other before any of them is ready.
            "publishNotReadyAddresses": True,
            "ports": [{"name": "master", "port": MASTER_PORT}],
        },
    }


def _job(job: Job, config: Config, own_secrets: list[str], template: Manifest) -> Manifest:
    manifest = merged(merged(_defaults(), _with_main_first(template)), _needed(job, config, own_secrets))
    manifest["metadata"].pop("generateName", None)
    manifest["metadata"].pop("namespace", None)  # render() sets it for all
    ordered: Manifest = _in_reading_order(manifest)
    return ordered


def _defaults() -> Manifest:
    """What the template may change."""
    return {
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {
                "spec": {
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": USER_ID,
                        "runAsGroup": USER_ID,
                        "fsGroup": USER_ID,
                        "fsGroupChangePolicy": "OnRootMismatch",
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "automountServiceAccountToken": False,
                    # A service named `mlflow` would set MLFLOW_PORT and the like in the job.
                    "enableServiceLinks": False,
                    "containers": [
                        {
                            "name": MAIN,
                            "securityContext": {
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                            },
                        }
                    ],
                }
            },
        }
    }


def _with_main_first(template: Manifest) -> Manifest:
    """The template with our container, the one named `main` or else the first, under our name and without a command."""
    template = copy.deepcopy(template)
    pod = template.get("spec", {}).get("template", {}).get("spec", {})
    containers = pod.get("containers") or [{}]
    ours = next((container for container in containers if container.get("name") == MAIN), containers[0])
    ours["name"] = MAIN
    for key in ("command", "args"):
        ours.pop(key, None)
    if pod.get("serviceAccountName"):  # an account is named to be used
        pod.setdefault("automountServiceAccountToken", True)
    return template


def _needed(job: Job, config: Config, own_secrets: list[str]) -> Manifest:
    """What wins over the template: the name, the labels, what is executed, and what the user's configuration says."""
    spec: Manifest = {"podFailurePolicy": _failure_policy(config.nodes)}
    if config.retries:
        spec["backoffLimit"] = config.retries
    if config.timeout_s:
        spec["activeDeadlineSeconds"] = config.timeout_s
    labels = _labels(job)
    if config.queue:
        spec["suspend"] = True  # until the queue lets it run
    pod: Manifest = {"restartPolicy": "Never"}
    if config.nodes > 1:
        spec |= {
            "completionMode": "Indexed",
            "completions": config.nodes,
            "parallelism": config.nodes,
            "backoffLimit": 0,
        }
        pod["subdomain"] = job.name
    volumes, mounts = _volumes(job, config)
    container = {
        "name": MAIN,
        "image": job.image,
        "command": [_literal(argument) for argument in job.argv],
        "env": _env(job, config, own_secrets),
        "resources": _resources(job.resources),
        "volumeMounts": mounts,
    }
    pod["containers"] = [{key: value for key, value in container.items() if value}]
    if volumes:
        pod["volumes"] = volumes
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job.name,
            "labels": {**labels, **({QUEUE: config.queue} if config.queue else {})},
            # For whoever looks at the job later: its launcher may be gone by then.
            "annotations": {
                IMAGE_TIMEOUT: str(config.image_timeout_s),
                PENDING_TIMEOUT: str(config.pending_timeout_s),
            },
        },
        "spec": {**spec, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }


def _failure_policy(nodes: int) -> Manifest:
    """Which failures of a pod count: an eviction does not use up a retry, a failed bootstrap is not tried again.

    Ranks of a distributed run cannot be replaced one by one: the others would wait for the lost one in a collective
    operation. There, an eviction ends the job as any failure does.
    """
    return {
        "rules": [
            {
                "action": "Ignore" if nodes == 1 else "FailJob",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": MAIN, "operator": "In", "values": [CANNOT_START]},
            },
        ]
    }


def _env(job: Job, config: Config, own_secrets: list[str]) -> list[Manifest]:
    env: dict[str, Manifest] = {name: {"value": _literal(value)} for name, value in job.env.items()}
    if config.nodes > 1:
        env |= {
            "RANK": {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}},
            "WORLD_SIZE": {"value": str(config.nodes)},
            "MASTER_ADDR": {"value": f"{job.name}-0.{job.name}"},  # pod 0's host name in the headless service
            "MASTER_PORT": {"value": str(MASTER_PORT)},
        }
    references = {name: (job.name, name) for name in own_secrets}
    for name, where in config.env_from_secret.items():
        secret, _, key = where.partition("/")
        references[name] = (secret, key)
    for name, (secret, key) in references.items():
        env[name] = {"valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
    return [{"name": name, **source} for name, source in env.items()]


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in commands and variables, and reads $$ as $."""
    return text.replace("$", "$$") if "$(" in text or "$$" in text else text


def _resources(resources: Resources) -> Manifest:
    """Requests equal limits: the pod gets what it may use, and is among the last to be evicted."""
    wanted: dict[str, str | int] = {}
    if resources.cpu is not None:
        wanted["cpu"] = f"{round(resources.cpu * 1000)}m" if resources.cpu % 1 else str(int(resources.cpu))
    if resources.memory_bytes is not None:
        wanted["memory"] = binary(resources.memory_bytes)
    if resources.gpu:
        wanted["nvidia.com/gpu"] = resources.gpu
    return {"requests": wanted, "limits": dict(wanted)} if wanted else {}


def binary(size: int) -> str:
    """Bytes as a quantity a person can read: 4294967296 is 4Gi."""
    for unit, factor in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def _volumes(job: Job, config: Config) -> tuple[list[Manifest], list[Manifest]]:
    volumes, mounts = [], []
    if job.resources.shm_bytes:
        memory = {"medium": "Memory", "sizeLimit": binary(job.resources.shm_bytes)}
        volumes.append({"name": "shm", "emptyDir": memory})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if job.cache:
        claim = (
            {"persistentVolumeClaim": {"claimName": config.cache_volume}} if config.cache_volume else {"emptyDir": {}}
        )
        volumes.append({"name": "cache", **claim})
        mounts.append({"name": "cache", "mountPath": CACHE_DIR})
    return volumes, mounts


def _in_reading_order(value: Any) -> Any:
    """What a person looks for first comes first, what is long comes last."""
    if isinstance(value, list):
        return [_in_reading_order(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = [key for key in _READ_FIRST if key in value]
    last = [key for key in _READ_LAST if key in value]
    between = [key for key in value if key not in first and key not in last]
    return {key: _in_reading_order(value[key]) for key in first + between + last}


def waits_for_queue(job_manifest: Mapping[str, Any]) -> str | None:
    """The Kueue queue that a Job (as sent, or as the cluster has it) is in; None without one."""
    return (job_manifest.get("metadata", {}).get("labels") or {}).get(QUEUE)
