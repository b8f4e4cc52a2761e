"""What a comparison found, as gauges for Prometheus, which fetches them from a Pushgateway."""

from __future__ import annotations

from monitoring import MonitoringError
from monitoring.drift import PARTS, Drift

JOB = "monitor"
TIMEOUT_S = 10.0


class GatewayAway(MonitoringError):
    """A Pushgateway that does not take what it is sent; the same words may do later."""

    exit_code = 1


def push(gateway: str, model: str, drift: Drift) -> None:
    """Replace what the Pushgateway at `gateway` (host:port or an http address) knows of `model`."""
    from prometheus_client import CollectorRegistry, Gauge, push_to_gateway

    registry = CollectorRegistry()
    score = Gauge("monitor_drift_score", "Drift against the reference, found from 1 on", ["part"], registry=registry)
    detected = Gauge("monitor_drift_detected", "1 where drift was found", ["part"], registry=registry)
    for part in PARTS:
        score.labels(part).set(drift.score(part))
        detected.labels(part).set(part in drift.drifted_parts)
    Gauge("monitor_window_images", "Images of the window", registry=registry).set(drift.images)
    last = Gauge("monitor_last_run_timestamp_seconds", "When monitor compared last", registry=registry)
    last.set_to_current_time()
    try:
        push_to_gateway(gateway, JOB, registry, grouping_key={"model": model}, timeout=TIMEOUT_S)
    except (OSError, ValueError) as error:  # urllib's are OSErrors; an address that is none is a ValueError
        raise GatewayAway(
            f"the Pushgateway at '{gateway}' cannot be reached: {error}; give host:port of a running one"
        ) from None
