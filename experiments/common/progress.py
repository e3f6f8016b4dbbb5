"""A progress bar with the time left; plain lines where there is no terminal."""

import contextlib
import time
from collections.abc import Iterator

from rich import progress as rich_progress
from rich.console import Console

# Seconds between two lines in a log file.
_PATIENCE = 15.0


class Bar:
    """What a training loop reports to; by itself it shows nothing.

    Attributes:
        done: the steps reported so far.
    """

    def __init__(self) -> None:
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        """Reports that some steps more are done."""
        self.done += steps

    def note(self, text: str) -> None:
        """Replaces the line that says how it stands."""


class _RichBar(Bar):
    def __init__(self, console: Console, total: int, title: str):
        super().__init__()
        self._console = console
        self._total = total
        self._title = title
        self._last = time.monotonic()
        self.progress = rich_progress.Progress(
            rich_progress.TextColumn('{task.description}'),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn('left'),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn('{task.fields[note]}'),
            console=console,
            disable=not console.is_terminal,
            # Drawing takes time from what is being timed.
            refresh_per_second=2,
        )
        self._task = self.progress.add_task(title, total=total, note='')

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        self.progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        self.progress.update(self._task, note=text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last > _PATIENCE:
            self._last = now
            share = self.done / max(self._total, 1)
            line = f'{self._title} {share:4.0%} {text}'
            self._console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def bar(total: int, title: str) -> Iterator[Bar]:
    """A bar on the standard error of this process, until the block is left."""
    shown = _RichBar(Console(stderr=True), total, title)
    with shown.progress:
        yield shown
