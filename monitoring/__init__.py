"""Watching a model at work: drift against the reference, what to label, when to retrain; knows no server and no MLflow.

What it looks at is handed in: files of the prediction log and of the reference, functions that predict.
"""


class MonitoringError(ValueError):
    """A log, a reference or a setting that cannot be used as asked; the message is one line for the user."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
