"""Raw files -> verified, versioned, labelled uint8 images -> batches."""


class DataError(ValueError):
    """Data that cannot be used as asked; the message is one line for the user."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Unreachable(DataError):
    """A place with data that is away; the same words may do later."""

    exit_code = 1
