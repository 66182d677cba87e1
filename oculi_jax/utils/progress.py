"""A progress bar for work that turns out to take longer than a second; quick work shows nothing."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Pace:
    """How fast work goes, and when it ends at that.

    Attributes:
        total: how many units there are.
        done: how many of them are done.
    """

    total: int
    done: int = 0
    _before: int = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._before, self._started = self.done, time.monotonic()

    @property
    def rate(self) -> float:
        """Units a second, of those that were not done before; 0 where none is."""
        took = time.monotonic() - self._started
        return (self.done - self._before) / took if took > 0 else 0.0

    def __str__(self) -> str:
        """`12.5/s, ends 14:05`; "" where nothing is done yet."""
        rate = self.rate
        if rate <= 0:
            return ""
        said = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        return f"{said}/s, ends {_clock((self.total - self.done) / rate)}"


def _clock(seconds: float) -> str:
    """The time of day in so many seconds, with its date where that is not today's."""
    now = datetime.datetime.now()
    try:
        end = now + datetime.timedelta(seconds=seconds)
    except OverflowError:
        return "in ages"
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b %H:%M}"


@contextmanager
def progress(
    label: str, total: int, *, done: int = 0, in_bytes: bool = False, after: float = 1.0
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`; a bar appears on a terminal's standard error once `after` seconds have passed.

    Args:
        label: what is being done.
        total: how many units there are.
        done: how many of them were done before.
        in_bytes: whether these are bytes, and shown as such.
        after: seconds to wait before anything is drawn.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    pace = Pace(total, done)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn() if in_bytes else TextColumn("{task.fields[pace]}"),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(label, total=total, completed=done, pace="")
    started = time.monotonic()
    shown = False

    def advance(amount: int) -> None:
        nonlocal shown
        pace.done += amount
        bar.update(task, advance=amount, pace=str(pace))
        if not shown and time.monotonic() - started > after:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
