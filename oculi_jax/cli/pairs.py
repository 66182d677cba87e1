"""What the commands share that take two prompts, one of them spoilt, or a file of such pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text as TextCell

from .common import Asked, prompt_label, shown
from .prompts import Row, read_rows
from .sets import encoded, interval_cells, with_row

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..models.llama import LlamaAttentionAdapter

Clean = Annotated[str | None, typer.Argument(help="The prompt with the answer; or give --prompts.", show_default=False)]
Corrupted = Annotated[
    str | None,
    typer.Argument(help="The same prompt but for some tokens, which change the answer.", show_default=False),
]


def read_pairs(path: Path, target: str | None, against: str | None) -> tuple[list[Row], list[str | None]]:
    """The rows of a file of pairs, and all their prompts."""
    rows = read_rows(path, ("clean", "corrupted"), {"target": target, "against": against}, needed=("target",))
    return rows, [row[field] for row in rows for field in ("clean", "corrupted")]


def check_aligned(adapter: LlamaAttentionAdapter, clean: np.ndarray, corrupted: np.ndarray) -> None:
    """Raises for a pair of prompts that cannot be put side by side, or that are one."""
    texts = [adapter.str_tokens(tokens) for tokens in (clean, corrupted)]
    if len(clean) != len(corrupted):
        raise ValueError(
            "Patching puts the prompts' tokens side by side, and there are not as many of them: the clean prompt has "
            f"{len(clean)}, {texts[0]}, and the corrupted one {len(corrupted)}, {texts[1]}."
        )
    if (clean == corrupted).all():
        raise ValueError(f"Both prompts are the tokens {texts[0]}: there is nothing to patch.")


def aligned(
    adapter: LlamaAttentionAdapter, rows: Sequence[Row], asked: Asked
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids `[B, T]` of clean and of corrupted prompts, and the mask of both."""
    (clean, mask), (corrupted, other) = (encoded(adapter, rows, field, asked) for field in ("clean", "corrupted"))
    for row, a, m, b, n in zip(rows, clean, mask, corrupted, other, strict=True):
        with_row(row, lambda row, a=a[m], b=b[n]: check_aligned(adapter, a, b))
    return clean, corrupted, mask


def print_ends(out: Console, texts: Sequence[str], values: Sequence[Any], chat: bool) -> None:
    """The metric of the clean run and, where there is one, of the corrupted, with their prompts."""
    for kind, text, value in zip(("clean", "corrupted")[: len(texts)], texts, values, strict=True):
        out.print(TextCell(f"{kind:9} {float(value):+.3f}  {shown(prompt_label(text, chat))}"))


def print_mean_ends(out: Console, rows: Sequence[Row], runs: Mapping[str, dict[str, np.ndarray]]) -> None:
    """The mean metric of each kind of runs."""
    out.print(f"Means over {len(rows)} pairs of prompts, with 95 % intervals:")
    for kind, run in runs.items():
        mean, interval = interval_cells(run)
        out.print(f"{kind:9} {mean} ({interval})", markup=False)
