"""`oculi heads`: every attention head, classified."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from ..analysis.circuits import PATTERNS, CircuitDetection
from ..capture.configs import CaptureConfig
from ..diagnostics import head_scores, repeated_tokens
from .common import Dtype, Model, Picture, check_picture, console, open_adapter, save_picture, working

PATTERNS_ALONE = CaptureConfig(capture_queries=False, capture_keys=False, capture_values=False)


def heads(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(help="Classify on this prompt rather than on repeated random tokens.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many heads to name for each pattern.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Of the random tokens.", min=0)] = 0,
    output: Picture = None,
    dtype: Dtype = "auto",
) -> None:
    """Every attention head, classified: what it does on random tokens that are repeated once, where nothing but the
    repetition can be known.

    Scores are attention, means over eight sequences with their standard errors; with --text, of that prompt alone.
    """
    picture = check_picture(output)
    adapter = open_adapter(model, dtype)
    config = adapter.model.config
    with working("Running the model"):
        prompt = repeated_tokens(config, seed, 2, 50)[0] if text is None else text
        capture = adapter.capture(prompt, PATTERNS_ALONE)
        found = CircuitDetection.summarize(capture)
        scores = head_scores(adapter.model, seed) if text is None else None
        raw = CircuitDetection.scores(capture)

    table = Table(box=None, pad_edge=False)
    table.add_column("pattern")
    table.add_column("heads", justify="right")
    table.add_column("strongest")
    for pattern in PATTERNS:
        named = []
        if pattern != "unknown":
            ranked = found[pattern]
            if scores is not None:
                mean, error = np.asarray(getattr(scores, pattern)), np.asarray(scores.standard_error[pattern])
                ranked = sorted(ranked, key=lambda item: -mean[item[0], item[1]])
                named = [f"L{n}H{h} {mean[n, h]:.2f} ± {error[n, h]:.2f}" for n, h, _ in ranked[:top]]
            else:
                named = [f"L{n}H{h} {score:.2f}" for n, h, score in ranked[:top]]
        table.add_row(pattern, str(len(found[pattern])), ", ".join(named))
    out = console()
    out.print(table)
    where = "random tokens, repeated once" if text is None else repr(text)
    total = config.num_hidden_layers * config.num_attention_heads
    out.print(
        f"{total} heads ({config.num_hidden_layers} layers × {config.num_attention_heads}) on {where}.", markup=False
    )
    if picture:
        from ..visualize import head_heatmap, panels

        names = ("previous_token", "induction", "duplicate_token", "bos")
        figure, axes = panels(1, len(names), 4.4 * len(names), 1.8 + 0.16 * config.num_hidden_layers)
        for name, ax in zip(names, axes, strict=True):
            values = raw[name] if scores is None else getattr(scores, name)
            title = name.replace("_", " ") if name != "bos" else "first token"
            head_heatmap(values, "attention", limits=(0.0, 1.0), ax=ax, title=title)
        save_picture(figure, picture)
