"""`oculi heads`: every attention head, classified."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from ..adapter.configs import CaptureConfig
from ..analysis.circuits import PATTERNS, CircuitDetection
from ..diagnostics import head_scores
from .common import (
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    check_picture,
    console,
    open_adapter,
    print_json,
    save_picture,
    working,
)

PATTERNS_ALONE = CaptureConfig(capture_queries=False, capture_keys=False, capture_values=False)


def heads(
    text: Annotated[
        str | None,
        typer.Option(help="Classify on this prompt rather than on repeated random tokens.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many heads to name for each pattern.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Of the random tokens.", min=0, max=2**32 - 1)] = 0,
    output: Picture = None,
    as_json: Json = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Every attention head, classified: what it does on random tokens that are repeated once, where nothing but the
    repetition can be known.

    Scores are attention, means over eight sequences with their standard errors; with --text, of that prompt alone.
    """
    picture = check_picture(output)
    adapter = open_adapter(model, dtype, text)
    config = adapter.model.config
    with working("Running the model"):
        if text is None:
            scores = head_scores(adapter.model, seed, length=min(50, (config.max_position_embeddings - 1) // 2))
            raw = {name: getattr(scores, name) for name in PATTERNS if name != "unknown"}
            found = {
                name: [f"L{layer}H{head} {score:.2f} ± {error:.2f}" for layer, head, score, error in heads]
                for name, heads in scores.summarize().items()
            }
        else:
            capture = adapter.capture(text, PATTERNS_ALONE, allow_longer=allow_longer)
            raw, summary = CircuitDetection.scores(capture), CircuitDetection.summarize(capture)
            found = {
                name: [f"L{layer}H{head} {score:.2f}" for layer, head, score in heads]
                for name, heads in summary.items()
            }

    if as_json:
        print_json({"prompt": text, "scores": raw})
    table = Table(box=None, pad_edge=False)
    table.add_column("pattern")
    table.add_column("heads", justify="right")
    table.add_column("strongest")
    for name, named in found.items():
        table.add_row(name, str(len(named)), ", ".join(named[:top]) if name != "unknown" else "")
    out = console(quiet=as_json)
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
            title = name.replace("_", " ") if name != "bos" else "first token"
            head_heatmap(raw[name], "attention", limits=(0.0, 1.0), ax=ax, title=title)
        save_picture(figure, picture, as_json)
