"""The prediction service: protocols, batching, limits, metrics; knows no model file, no MLflow and no torch.

What it serves is handed in (`model.ServedModel`), and so is what decodes image files (`app.Decoder`).
"""


class RequestError(Exception):
    """A request that cannot be answered as asked; the message is one line for its sender.

    `retry_after_s` tells when trying again may help.
    """

    def __init__(self, message: str, status: int = 400, retry_after_s: int | None = None) -> None:
        super().__init__(valid_text(" ".join(message.split())))
        self.status = status
        self.retry_after_s = retry_after_s


def valid_text(text: str) -> str:
    """Text that UTF-8, and so JSON, can carry, whatever a client sent."""
    return text.encode("utf-8", "backslashreplace").decode()
