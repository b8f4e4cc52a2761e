"""Progress for whoever watches: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts steps. On a terminal a bar moves; elsewhere only the lines are printed."""

    def __init__(self, total: int, *, done: int = 0, unit: str = "step", shown: bool = True):
        """`shown=False` prints nothing: for processes that are not in the lead."""
        self._shown = shown
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on; `note` is shown beside the bar."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(steps)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._shown:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
