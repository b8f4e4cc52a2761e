"""Networks, checkpoints, scores and ONNX: nothing here knows MLflow or argparse."""


class ModelError(ValueError):
    """A model, checkpoint or model setting that cannot be used; the message is one line for the user."""

    exit_code = 2
