"""Prometheus' and Alertmanager's configuration with the settings in the place of the addresses that the files name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from settings import FOLDER

PROMETHEUS, ALERTMANAGER = (FOLDER / "prometheus" / name for name in ("prometheus.yml", "alertmanager.yml"))
PORTS = {
    "9090": "PROMETHEUS_PORT",
    "9091": "PUSHGATEWAY_PORT",
    "9093": "ALERTMANAGER_PORT",
    "9100": "NODE_EXPORTER_PORT",
}
"""The port in prometheus.yml -> the setting that has another one."""
SERVICE = "8080"


def prometheus_config(values: Mapping[str, str]) -> str:
    """prometheus.yml with these addresses."""

    def targets(found: re.Match[str]) -> str:
        port = found[1]
        return f"targets: [{values['SERVING_TARGETS'] if port == SERVICE else f'127.0.0.1:{values[PORTS[port]]}'}]"

    return re.sub(r"targets: \[127\.0\.0\.1:(\d+)\]", targets, PROMETHEUS.read_text(encoding="utf-8"))


def alertmanager_config(values: Mapping[str, str]) -> str:
    """alertmanager.yml, whose last line names the receiver, and the address that is to be told of alerts."""
    config, url = ALERTMANAGER.read_text(encoding="utf-8"), values["ALERT_WEBHOOK_URL"]
    return f"{config}    webhook_configs:\n      - url: '{url}'\n" if url else config
