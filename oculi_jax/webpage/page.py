"""One HTML page that needs nothing else: no network, no fonts, no libraries."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from ..utils.files import write_aside


class Page(str):
    """A page's text, which a notebook shows in a frame of its own, and which saves itself.

    Attributes:
        title: what it is called.
        height: of the frame, in pixels.
    """

    title: str
    height: int

    def __new__(cls, text: str, title: str = "A page", height: int = 720) -> Page:
        made = super().__new__(cls, text)
        made.title, made.height = title, height
        return made

    def __repr__(self) -> str:
        return f"Page({len(self.encode()) / 1e3:.0f} kB of HTML; .save(path) writes it)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self, quote=True)}" title="{escape(self.title, quote=True)}" sandbox="allow-scripts" '
            f'width="100%" height="{self.height}" style="border:1px solid #8884;box-sizing:border-box"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, whole or not at all."""
        with write_aside(path) as aside:
            aside.write_text(self, encoding="utf-8", newline="\n")


def part(name: str, **parts: str) -> str:
    """A piece of HTML that several pages have, with its own gaps filled."""
    return Template(files("oculi_jax.webpage").joinpath(f"{name}.html").read_text("utf-8")).substitute(parts)


def page(
    title: str,
    kind: str,
    body: str,
    scripts: Sequence[str],
    start: str,
    data: dict[str, Any],
    height: int = 720,
    styles: Sequence[str] = (),
) -> Page:
    """A page that draws itself.

    Args:
        title: for the browser's tab.
        kind: a class of its body, for the style.
        body: HTML, of ours alone.
        scripts: names of this package's scripts that it needs, beside the basis.
        start: a script of its own, which runs last.
        data: what they read; it may hold any texts, which are never markup.
        height: of its frame in a notebook, in pixels.
        styles: names of this package's styles that it needs, beside that of every page.
    """
    here = files("oculi_jax.webpage")
    style = "\n".join(here.joinpath(name).read_text("utf-8") for name in ("page.css", *styles))
    script = "\n".join([*(here.joinpath(name).read_text("utf-8") for name in ("basis.js", *scripts)), start])
    # "<" alone could end the element that holds the data; what else JSON escapes leaves nothing but ASCII.
    written = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    named = {"style": style, "style_hash": _hash(style), "script": script, "script_hash": _hash(script)}
    return Page(part("page", title=escape(title), kind=kind, body=body, data=written, **named), title, height)


def _hash(text: str) -> str:
    """How a content security policy names an inline element: nothing but this very text is run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def numbers(values: Any) -> Any:
    """Python floats of five digits, nested as the array is."""
    array = np.asarray(values, np.float64)
    return np.array([float(f"{x:.5g}") for x in array.ravel()]).reshape(array.shape).tolist()


def packed(patterns: np.ndarray) -> str:
    """Rows 0 … t of the triangles `[N, T, T]` as unsigned 16-bit integers, 65535 for a weight of 1; little-endian, base64."""
    rows, columns = np.tril_indices(patterns.shape[-1])
    scaled = np.rint(np.clip(patterns[:, rows, columns], 0.0, 1.0) * 65535.0)
    return base64.b64encode(scaled.astype("<u2").tobytes()).decode()
