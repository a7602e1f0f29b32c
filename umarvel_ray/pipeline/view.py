"""What a person sees while jobs run: a line per job, a bar per long step, tables at the end."""

from collections.abc import Iterator
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


class Bar:
    """Progress of one step."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def at(self, done: float, note: str = "") -> None:
        """So much is done."""
        self._progress.update(self._task, completed=done, note=note)

    def advance(self, amount: float, note: str = "") -> None:
        """So much more is done."""
        self._progress.update(self._task, advance=amount, note=note)


class View:
    """Writes to a console; on one that is no terminal, bars stay away and lines remain."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def line(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True)  # a path or a long line stays whole in a log

    @contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
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
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as progress:
            yield Bar(progress, progress.add_task(title, total=total, note=""))


def short_time(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
