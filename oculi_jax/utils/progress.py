"""A progress bar for work that turns out to take longer than a second; quick work shows nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, *, in_bytes: bool = False, after: float = 1.0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`; a bar appears on a terminal's standard error once `after` seconds have passed.

    Args:
        label: what is being done.
        total: how many units there are.
        in_bytes: whether these are bytes, and shown as such.
        after: seconds to wait before anything is drawn.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(label, total=total)
    started = time.monotonic()
    shown = False

    def advance(amount: int) -> None:
        nonlocal shown
        bar.advance(task, amount)
        if not shown and time.monotonic() - started > after:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
