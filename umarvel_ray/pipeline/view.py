"""What a person sees while jobs run: a line per job, a bar per long step, tables at the end.

On a console that is no terminal, as in a cluster's log, a long step says once a minute where it is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from umarvel_ray.pipeline.progress import Tally, short_time

__all__ = ["Bar", "View", "short_time"]
_LINE_EVERY_S = 60.0


class Bar:
    """Progress of one step."""

    def __init__(self, tally: Tally, show: Callable[[Tally], None]) -> None:
        self._tally = tally
        self._show = show

    def at(self, done: float, note: str = "") -> None:
        """So much is done."""
        self._tally.at(done, note)
        self._show(self._tally)

    def advance(self, amount: float, note: str = "") -> None:
        """So much more is done."""
        self.at(self._tally.done + amount, note)


class View:
    """Writes to a console; on one that is no terminal, bars stay away and lines remain.

    Attributes:
        console: Where to.
        record: Told of every move of a bar.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.record: Callable[..., None] = lambda tally, last=False: None

    @contextmanager
    def recorded(self, record: Callable[..., None]) -> Iterator[None]:
        """Tell `record` of every move of a bar, for the length of a block."""
        before, self.record = self.record, record
        try:
            yield
        finally:
            self.record = before

    def line(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True)  # a path or a long line stays whole in a log

    @contextmanager
    def bar(self, title: str, total: float, *, unit: str = "") -> Iterator[Bar]:
        """A bar with rate and time left, gone when the step ends."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        tally, terminal = Tally(title, total, unit), self.console.is_terminal
        due = time.monotonic() + _LINE_EVERY_S
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as progress:
            task: Any = progress.add_task(title, total=total, note="")

            def show(tally: Tally) -> None:
                nonlocal due
                progress.update(task, completed=tally.done, note=tally.note)
                self.record(tally)
                if not terminal and time.monotonic() >= due:
                    due = time.monotonic() + _LINE_EVERY_S
                    self.line(f"  {tally.line()}")

            yield Bar(tally, show)
            self.record(tally, last=True)
