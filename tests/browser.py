"""A browser of this machine, wherever its kind is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "microsoft-edge-stable",
)  # fmt: skip
# Playwright's words for a browser that is installed where its maker's installer puts it, on Linux, macOS and Windows.
CHANNELS = ("chrome", "msedge")
APPLICATION = "/Applications/Chromium.app/Contents/MacOS/Chromium"

NONE_HERE = (
    "there is no Chromium, Chrome or Edge here: install one of them, or run `playwright install chromium`, or name a program "
    "by CHROMIUM=/path/to/it"
)


def ways(own: str) -> list[dict[str, str]]:
    """How a browser may be started, the likeliest first: arguments of Playwright's `launch`.

    Args:
        own: where Playwright keeps its own, if that was installed.
    """
    if named := os.environ.get("CHROMIUM"):
        return [{"executable_path": named}]
    found = [shutil.which(name) for name in PROGRAMS] + [p for p in (own, APPLICATION) if Path(p).is_file()]
    return [{"executable_path": path} for path in found if path] + [{"channel": name} for name in CHANNELS]


@contextmanager
def open_browser() -> Iterator[Any]:
    """Playwright's `Browser` of the first that starts.

    Raises:
        FileNotFoundError: there is none, or none that starts; the sentence says how to get one.
    """
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        said: list[str] = []
        for way in ways(playwright.chromium.executable_path):
            try:
                browser = playwright.chromium.launch(**way)
            except Error as error:
                said.append(f"{', '.join(way.values())}: {str(error).strip().splitlines()[0]}")
                continue
            try:
                yield browser
            finally:
                browser.close()
            return
    raise FileNotFoundError(f"{NONE_HERE} ({'; '.join(said)})")
