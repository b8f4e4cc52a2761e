"""What Prometheus reads at /metrics; several workers add up through files, in prometheus_client's own way.

serving_requests_total{endpoint,status}               requests answered; errors are those with status 4xx and 5xx
serving_request_seconds{endpoint}                     histogram: from a request's head to its answer
serving_requests_in_progress{endpoint}                requests whose answer is not ready
serving_bad_inputs_total{endpoint}                    requests and image files refused
serving_queue_images                                  images that wait or are being predicted
serving_queue_limit_images                            images that may wait (max_queue of every worker)
serving_batch_images, serving_batch_seconds           histograms: images in a batch, its time in the network
serving_predictions_total{class}                      images by predicted class
serving_confidence                                    histogram: probability of the predicted class
serving_model_workers{name,version}                   workers that serve a version of the model
serving_model_changes_total                           changes to another version
serving_model_failed_changes_total                    looks at the alias, or loads, that failed
serving_feedback_total{label,correct}                 feedback by true label; correct is true or false
serving_feedback_value_total{sign}                    business value told with it: gain, and loss as a positive sum
serving_log_rows_total{table}                         rows written to the prediction log; table: predictions, feedback
serving_log_dropped_rows_total{table}                 rows lost, because the log's place was away for too long
serving_log_waiting_rows                              rows that are in no file yet
serving_log_unsent_files                              files on this machine's disk that wait for the log's place
serving_log_failures_total                            attempts to write a file, or to bring it to its place, that failed
serving_kept_images_total{rule}                       images kept; rule: sampled, uncertain, far
serving_kept_image_bytes_total                        their bytes
serving_measured_images_total                         images whose statistics were taken
serving_image_statistic_total{statistic}              sum over them; statistic: brightness, contrast, sharpness, clipped
serving_compared_images_total                         images compared with the reference
serving_reference_distance_total                      sum of their distances from it, its threshold being 1
serving_far_images_total                              images above the threshold

Those from serving_log_rows_total on need a prediction log, the last three a model whose run holds a reference. To ask:

accuracy of the feedback   sum(rate(serving_feedback_total{correct="true"}[1h])) / sum(rate(serving_feedback_total[1h]))
business value an hour     sum(increase(serving_feedback_value_total{sign="gain"}[1h]))
                           - sum(increase(serving_feedback_value_total{sign="loss"}[1h]))
share of far images        sum(rate(serving_far_images_total[5m])) / sum(rate(serving_compared_images_total[5m]))
mean brightness            sum(rate(serving_image_statistic_total{statistic="brightness"}[5m]))
                           / sum(rate(serving_measured_images_total[5m]))
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from serving.model import ServedModel

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
TRUTH = {False: "false", True: "true"}


class Metrics:
    """The counters of one worker."""

    def __init__(self) -> None:
        r = self._registry = CollectorRegistry()
        self.requests = Counter(
            "serving_requests", "Requests answered, by endpoint and HTTP status", ["endpoint", "status"], registry=r
        )
        self.seconds = Histogram(
            "serving_request_seconds",
            "From the request's head to its answer",
            ["endpoint"],
            registry=r,
            buckets=SECONDS,
        )
        self.in_progress = Gauge(
            "serving_requests_in_progress",
            "Requests whose answer is not ready",
            ["endpoint"],
            registry=r,
            multiprocess_mode="livesum",
        )
        self.bad_inputs = Counter("serving_bad_inputs", "Requests and image files refused", ["endpoint"], registry=r)
        self.waiting = Gauge(
            "serving_queue_images", "Images that wait or are being predicted", registry=r, multiprocess_mode="livesum"
        )
        self.limit = Gauge(
            "serving_queue_limit_images", "Images that may wait", registry=r, multiprocess_mode="livesum"
        )
        self.batch_images = Histogram("serving_batch_images", "Images in a batch", registry=r, buckets=IMAGES)
        self.batch_seconds = Histogram("serving_batch_seconds", "A batch in the network", registry=r, buckets=SECONDS)
        self.predictions = Counter("serving_predictions", "Images by predicted class", ["class"], registry=r)
        self._of_class: dict[str, Counter] = {}
        self.confidence = Histogram(
            "serving_confidence", "Probability of the predicted class", registry=r, buckets=SHARES
        )
        self.model = Gauge(
            "serving_model_workers",
            "Workers that serve a version of the model",
            ["name", "version"],
            registry=r,
            multiprocess_mode="livesum",
        )
        self.changes = Counter("serving_model_changes", "Changes to another version", registry=r)
        self.failed_changes = Counter("serving_model_failed_changes", "Looks or loads that failed", registry=r)
        self._feedback = Counter(
            "serving_feedback", "Predictions of which the true class was told", ["label", "correct"], registry=r
        )
        self._value = Counter(
            "serving_feedback_value", "Business value told, gains and losses apart", ["sign"], registry=r
        )
        self._gain, self._loss = self._value.labels("gain"), self._value.labels("loss")
        self.log_rows = Counter("serving_log_rows", "Rows written to the prediction log", ["table"], registry=r)
        self.log_dropped = Counter("serving_log_dropped_rows", "Rows lost", ["table"], registry=r)
        self.log_waiting = Gauge(
            "serving_log_waiting_rows", "Rows that are in no file yet", registry=r, multiprocess_mode="livesum"
        )
        self.log_unsent = Gauge(
            "serving_log_unsent_files",
            "Files that wait for the log's place",
            registry=r,
            multiprocess_mode="livesum",
        )
        self.log_failures = Counter("serving_log_failures", "Attempts to write a file that failed", registry=r)
        self.kept = Counter("serving_kept_images", "Images kept, by rule", ["rule"], registry=r)
        self.kept_bytes = Counter("serving_kept_image_bytes", "Bytes of the images kept", registry=r)
        self.measured = Counter("serving_measured_images", "Images whose statistics were taken", registry=r)
        self.statistics = Counter("serving_image_statistic", "Sums over these images", ["statistic"], registry=r)
        self.compared = Counter("serving_compared_images", "Images compared with the reference", registry=r)
        self.distances = Counter(
            "serving_reference_distance", "Sum of their distances from it, its threshold being 1", registry=r
        )
        self.far = Counter("serving_far_images", "Images farther than the threshold", registry=r)

    def batch(self, model: ServedModel, logits_NK: np.ndarray, seconds: float) -> None:
        """Count a batch that was predicted."""
        self.batch_images.observe(len(logits_NK))
        self.batch_seconds.observe(seconds)
        # The largest share of a softmax is one over the sum of all, each against the largest.
        sums_N = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True)).sum(axis=1)
        for label, confidence in zip(logits_NK.argmax(axis=1).tolist(), (1 / sums_N).tolist(), strict=True):
            self._of_class[model.classes[label]].inc()
            self.confidence.observe(confidence)

    def serves(self, model: ServedModel, before: ServedModel | None = None) -> None:
        """Note the version that is served from now on."""
        if before is not None:
            self.model.labels(before.name, before.version).set(0)
            self.changes.inc()
        self.model.labels(model.name, model.version).set(1)
        for name in model.classes:  # a rate sees the first of its kind only if there was a 0 before it
            self._of_class[name] = self.predictions.labels(name)
            for correct in TRUTH.values():
                self._feedback.labels(name, correct)

    def feedback(self, label: str, correct: bool, value: float | None) -> None:
        """Count what was told of one prediction."""
        self._feedback.labels(label, TRUTH[correct]).inc()
        if value is not None:
            (self._loss if value < 0 else self._gain).inc(abs(value))

    def exposition(self, waiting: int) -> bytes:
        """All values in Prometheus' text format, those of the other workers included."""
        self.waiting.set(waiting)
        if not os.environ.get(SHARED_FOLDER):
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def forget_dead_workers() -> None:
    """Take out of the shared files what workers say that are no more: a killed one cannot do it itself."""
    folder = os.environ.get(SHARED_FOLDER)
    for path in Path(folder).glob("gauge_live*_*.db") if folder else ():
        pid = path.stem.rpartition("_")[2]
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
