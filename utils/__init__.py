"""What it means to be an entry point: settings, tracking, runtime."""


class UsageError(ValueError):
    """Bad input from the user: one line that says what was wrong, received, allowed, and what to do."""

    exit_code = 2


class RunFailed(RuntimeError):
    """The input was fine and the run still failed: a gate not met, a tracking server that never came back."""

    exit_code = 1
