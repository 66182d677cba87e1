"""`oculi lens`: layer by layer, what the model would say if it stopped there."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text as TextCell

from ..capture.configs import LogitConfig
from .common import Dtype, Longer, Model, Text, console, open_adapter, shown, working


def lens(
    text: Text,
    model: Model,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", help="How many tokens to show at each layer.", min=1, max=20)
    ] = 3,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Layer by layer, what the model would say if it stopped there, and how the final answer comes up.

    The logit lens: final norm and unembedding applied to the residual stream after each layer.
    """
    adapter = open_adapter(model, dtype)
    config = LogitConfig(top_k=top_k, positions=[-1])
    with working("Running the model"):
        capture = adapter.capture_logits(text, config, allow_longer=allow_longer)
        norm = np.asarray(capture.log_normalizer)[:, 0]
        logits, ids = np.asarray(capture.top_k_logits)[:, 0], np.asarray(capture.top_k_indices)[:, 0]
        answer = int(ids[-1, 0])
        assert capture.normalized is not None and capture.unembedding is not None
        row = np.asarray(capture.unembedding[answer], np.float32)
        trajectory = np.exp(np.asarray(capture.normalized, np.float32)[:, 0] @ row - norm)

    def name(token: int) -> str:
        return shown(adapter.tokenizer.decode([int(token)]))

    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for k in range(top_k):
        table.add_column("what it would say" if k == 0 else "")
    table.add_column(TextCell(f"P({name(answer)})"))
    for layer, row_logits, row_ids, lse, p in zip(capture.captured_layers, logits, ids, norm, trajectory, strict=True):
        cells = [TextCell(f"{name(i)} {np.exp(x - lse):.3f}") for x, i in zip(row_logits, row_ids, strict=True)]
        table.add_row(str(layer), *cells, f"{p:.3f} {'█' * round(20 * float(p))}")
    out = console()
    out.print(table)
    out.print(TextCell(f"{text} → {name(answer)} with probability {trajectory[-1]:.3f}"))
