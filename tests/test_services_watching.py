"""What `make services` starts to watch: the services that the settings choose, and Prometheus' configuration."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from service_images import find

SERVICES = Path(__file__).resolve().parent.parent / "services"
sys.path.append(str(SERVICES))
MONITORING = {"prometheus", "alertmanager", "pushgateway", "node-exporter"}
PORTS = {
    "PROMETHEUS_PORT": "9091",  # two that change places
    "PUSHGATEWAY_PORT": "9090",
    "ALERTMANAGER_PORT": "19093",
    "NODE_EXPORTER_PORT": "19100",
    "GRAFANA_PORT": "13000",
}
PASSWORD = "a-password-for-grafana"


def values(**given: str) -> dict[str, str]:
    """The settings of a first start, with these."""
    import settings

    example = settings.parse(settings.EXAMPLE)
    secrets = {name: f"secret-of-{name.lower()}" for name in settings.SECRETS}
    found = {**example, **secrets, **PORTS, "GRAFANA_PASSWORD": PASSWORD, **given}
    settings.check(found, settings.KNOWN)
    return found


def composed(**given: str) -> dict[str, Any]:
    """The services that Compose would start, as it reads the file."""
    import compose

    environment = {**os.environ, **compose.environment(values(**given))}
    command = [find("docker-compose"), "--project-directory", str(SERVICES), "config"]
    done = subprocess.run(command, cwd=SERVICES, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = environment["COMPOSE_PROFILES"].split(",")
    everything = yaml.safe_load(done.stdout)["services"]
    return {name: one for name, one in everything.items() if set(one.get("profiles", started)) & set(started)}


def test_the_setting_chooses_what_watches() -> None:
    plain = {"server", "postgresql", "s3"}
    assert composed().keys() == plain
    assert composed(MONITORING="prometheus").keys() == plain | MONITORING
    assert composed(MONITORING="grafana").keys() == plain | MONITORING | {"grafana"}


def test_all_of_it_listens_on_loopback_and_is_bounded() -> None:
    started = composed(MONITORING="grafana")
    listens = {}
    for name in (*MONITORING, "grafana"):
        one = started[name]
        assert re.search(r":v?\d+\.\d+\.\d+$", one["image"])
        assert one["network_mode"] == "host"
        assert "ports" not in one
        assert (one["read_only"], one["cap_drop"]) == (True, ["ALL"])
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert one["mem_limit"]
        text = " ".join([*one.get("command", ()), *map("=".join, one.get("environment", {}).items())])
        (address,) = re.findall(r"--web\.listen-address=(\S+)", text) or [
            ":".join(one["environment"][f"GF_SERVER_HTTP_{word}"] for word in ("ADDR", "PORT"))
        ]
        assert address.startswith("127.0.0.1:")
        assert f"http://{address}/" in one["healthcheck"]["test"][-1]
        listens[name] = address.removeprefix("127.0.0.1:")
        # What is to outlast the container is in a volume with a name.
        kept = {"prometheus": "/prometheus", "alertmanager": "/alertmanager", "pushgateway": "/pushgateway"}
        kept |= {"grafana": "/var/lib/grafana"}
        volumes = dict(reversed(each.split(":")[:2]) for each in one["volumes"])
        assert name not in kept or volumes[kept[name]] == name
    assert listens == {
        "prometheus": "9091",
        "pushgateway": "9090",
        "alertmanager": "19093",
        "node-exporter": "19100",
        "grafana": "13000",
    }


def test_grafana_has_the_password_of_the_settings_and_no_other_way_in() -> None:
    environment = composed(MONITORING="grafana")["grafana"]["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD"] == PASSWORD
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert not [name for name in environment if "ANONYMOUS" in name]
    (source,) = yaml.safe_load((SERVICES / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (name,) = re.findall(r"\${(\w+)}", source["url"])
    assert environment[name] == PORTS[name]


def test_addresses_take_the_places_of_those_in_the_file() -> None:
    """Each once, also where two change places; all else stays as it is."""
    import watching

    given = values(SERVING_TARGETS="127.0.0.1:9100,10.0.0.7:8080")
    config = yaml.safe_load(watching.prometheus_config(given))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {
        "serving": ["127.0.0.1:9100", "10.0.0.7:8080"],
        "pushgateway": ["127.0.0.1:9090"],
        "node": ["127.0.0.1:19100"],
        "alertmanager": ["127.0.0.1:19093"],
        "prometheus": ["127.0.0.1:9091"],
    }
    (alertmanagers,) = config["alerting"]["alertmanagers"]
    assert alertmanagers["static_configs"] == [{"targets": ["127.0.0.1:19093"]}]
    import settings

    plain = watching.prometheus_config(settings.parse(settings.EXAMPLE))
    assert plain == watching.PROMETHEUS.read_text()


@pytest.mark.parametrize("url", ["", "https://hooks.example.org/a?channel=b&key=c#d"])
def test_who_is_told_of_alerts(url: str) -> None:
    import watching

    config = yaml.safe_load(watching.alertmanager_config(values(ALERT_WEBHOOK_URL=url)))
    (receiver,) = config["receivers"]
    assert config["route"]["receiver"] == receiver["name"]
    assert [one["url"] for one in receiver.get("webhook_configs", ())] == ([url] if url else [])
