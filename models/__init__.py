"""Networks, checkpoints, scores and ONNX: nothing here knows MLflow or argparse."""

import os

# ONNX Runtime would keep a device id in the home folder and report to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class ModelError(ValueError):
    """A model, checkpoint or model setting that cannot be used; the message is one line for the user."""

    exit_code = 2


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number any more."""

    exit_code = 1

    def __init__(self, loss: float, step: int, learning_rate: float):
        super().__init__(
            f"the loss became {loss} at step {step}, where the learning rate was {learning_rate:.3g}; "
            "give a lower learning_rate or precision=fp32, or look at the data"
        )
