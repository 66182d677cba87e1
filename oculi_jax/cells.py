"""What notebooks show of our objects: names, shapes, and small pictures of what is small; never screens of numbers."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import TypeGuard

import jax
import numpy as np
from jax.core import Tracer

from .arrays import AnyArray, listing

MOST_PIXELS = 64  # along either axis of a picture
MOST_ROWS = 40  # of a value that is a table itself
_HEIGHT, _WIDTH = 96, 192  # of a picture on a page, at most


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """A table of named values: arrays by dtype and shape, with a picture where they are a grid of moderate size."""
    cells = "".join(
        f"<tr><td style='text-align:left'><code>{escape(name)}</code></td><td style='text-align:left'>{_shown(value)}</td>"
        f"<td style='text-align:left'>{picture(value)}</td></tr>"
        for name, value in rows
        if value is not None
    )
    return f"<div><b>{escape(title)}</b><table>{cells}</table></div>"


def _shown(value: object) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        return (
            f"{listing(value.shape)} {value.dtype}"
            if value.ndim
            else escape(f"{value:.4g}" if _known(value) else str(value.dtype))
        )
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(name))} {_shown(part)}" for name, part in list(value.items())[:MOST_ROWS])
    text = repr(value)
    return escape(text if len(text) <= 120 else text[:119] + "…")


def picture(value: object) -> str:
    """An `<img>` of a grid of numbers, red above zero and blue below it, white at zero; nothing for anything else."""
    if not _known(value) or value.ndim != 2 or not 1 < max(value.shape) <= MOST_PIXELS or 0 in value.shape:
        return ""
    if not (value.dtype == bool or np.issubdtype(np.asarray(value).dtype, np.number)):
        return ""
    grid = np.nan_to_num(np.asarray(value, np.float64), posinf=0.0, neginf=0.0)
    scaled = grid / (np.abs(grid).max() or 1.0)
    rest = 255 - np.abs(scaled) * 200
    red, blue = np.where(scaled >= 0, 255, rest), np.where(scaled <= 0, 255, rest)
    pixels = np.stack([red, rest, blue], axis=-1).round().astype(np.uint8)
    n_rows, n_columns = grid.shape
    size = min(_HEIGHT / n_rows, _WIDTH / n_columns)
    encoded = base64.b64encode(_png(pixels)).decode()
    words = f"{n_rows} × {n_columns} numbers from {grid.min():.3g} to {grid.max():.3g}"
    return (
        f"<img alt='{words}' title='{words}' width='{max(1, round(size * n_columns))}' height='{max(1, round(size * n_rows))}' "
        f"style='image-rendering:pixelated' src='data:image/png;base64,{encoded}'>"
    )


def _known(value: object) -> TypeGuard[AnyArray]:
    """Whether this is an array whose numbers can be read here."""
    return isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)


def _png(pixels: np.ndarray) -> bytes:
    """An RGB picture `[rows, columns, 3]` of bytes, in the format of RFC 2083."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns, _ = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
