"""What an API server refuses, in its words, and what it fills in."""

import re
from collections.abc import Iterator
from typing import Any

from kubernetes import client

from object_store import Object

NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
QUANTITY = r"([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)"


class Problem(Exception):
    """An answer that is not a success."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None, said: Object | None = None):
        super().__init__(message)
        self.code = code
        self.status: Object = said or {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            **({"details": details} if details else {}),
            "code": code,
        }


def refuse_unknown_fields(thing: Object) -> None:
    """Strict field validation, by the client library's description of the API."""
    kind, version = thing["kind"], thing["apiVersion"].rpartition("/")[2]
    unknown = list(_unknown_fields(thing, f"{version.upper()}{kind}", ""))
    if unknown:
        names = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise Problem(
            400,
            "BadRequest",
            f'{kind} in version "{version}" cannot be handled as a {kind}: strict decoding error: {names}',
        )


def _unknown_fields(value: Any, type_name: str, path: str) -> Iterator[str]:
    listed = re.fullmatch(r"(?:list|List)\[(.+)\]", type_name)
    if listed:
        for index, item in enumerate(value or ()):
            yield from _unknown_fields(item, listed[1], f"{path}[{index}]")
    model = getattr(client, type_name, None)
    if model is None or not hasattr(model, "attribute_map") or not isinstance(value, dict):
        return
    types = {json_name: model.openapi_types[name] for name, json_name in model.attribute_map.items()}
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if key not in types:
            yield where
        else:
            yield from _unknown_fields(item, types[key], where)


def refuse_bad_job(job: Object) -> None:
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    for container in pod["containers"]:
        for amounts in container.get("resources", {}).values():
            for amount in amounts.values():
                if not re.fullmatch(QUANTITY, str(amount)) or str(amount).endswith("Q"):
                    raise Problem(
                        400,
                        "BadRequest",
                        'Job in version "v1" cannot be handled as a Job: quantities must match the regular '
                        f"expression '^{QUANTITY}$'",
                    )
    causes = []
    if not re.fullmatch(NAME, name):
        causes.append(("metadata.name", f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of ...'))
    if len(name) > 63:
        causes.append(("spec.template.labels", f'Invalid value: "{name}": must be no more than 63 bytes'))
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        causes.append(("spec.template.spec.restartPolicy", 'Required value: valid values: "OnFailure", "Never"'))
    mounted = {volume["name"] for volume in pod.get("volumes", ())}
    for index, container in enumerate(pod["containers"]):
        for number, mount in enumerate(container.get("volumeMounts", ())):
            if mount["name"] not in mounted:
                where = f"spec.template.spec.containers[{index}].volumeMounts[{number}].name"
                causes.append((where, f'Not found: "{mount["name"]}"'))
    if causes:
        listed = [f"{where}: {message}" for where, message in causes]
        text = listed[0] if len(listed) == 1 else f"[{', '.join(listed)}]"
        details = {
            "name": name,
            "group": "batch",
            "kind": "Job",
            "causes": [{"message": message, "field": where} for where, message in causes],
        }
        raise Problem(422, "Invalid", f'Job.batch "{name}" is invalid: {text}', details)


def fill_in_job(job: Object) -> None:
    spec, uid, name = job["spec"], job["metadata"]["uid"], job["metadata"]["name"]
    defaults = {"parallelism": 1, "completions": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": False}
    for key, value in defaults.items():
        spec.setdefault(key, value)
    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    labels = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
    for prefix in ("batch.kubernetes.io/", ""):
        labels |= {f"{prefix}controller-uid": uid, f"{prefix}job-name": name}
    for container in spec["template"]["spec"]["containers"]:
        container.setdefault("resources", {})
    job["status"] = {}
