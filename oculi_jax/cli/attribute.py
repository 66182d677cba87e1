"""`oculi attribute`: which heads and MLPs an answer comes from."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text as TextCell

from ..adapter.configs import CaptureConfig, LogitConfig, MLPConfig
from ..analysis.attribution import AttributionMethods
from .common import (
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    Text,
    check_picture,
    console,
    open_adapter,
    print_json,
    save_picture,
    shown,
    working,
)
from .effects import answer, token_ids

# What attribution reads: heads' outputs come with any capture of attention.
HEADS_ALONE = CaptureConfig(capture_queries=False, capture_keys=False, capture_values=False, capture_patterns=False)
OUTPUT_ALONE = MLPConfig(capture_gate=False, capture_up=False, capture_post_activation=False)
LAST = LogitConfig(layers=[0], top_k=1, positions=[-1])


def attribute(
    text: Text,
    target: Annotated[
        str, typer.Option(help="The answer, one token; mind the space before a word: ' Paris'.", show_default=False)
    ],
    versus: Annotated[
        str | None,
        typer.Option(help="Another token: attribute the difference of the two logits.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many heads and MLPs to show.", min=1)] = 12,
    output: Picture = None,
    as_json: Json = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Which heads and MLPs an answer comes from: direct logit attribution at the last token.

    Every part of the residual stream goes through the final norm, with its scale in this run, and the unembedding; the
    parts sum to the logit.
    """
    picture = check_picture(output)
    adapter = open_adapter(model, dtype, text)
    tokens = token_ids(adapter, text, allow_longer)
    goal = answer(adapter, tokens, target)
    token = goal if versus is None else (goal, answer(adapter, tokens, versus))
    with working("Running the model"):
        full = adapter.capture_full(
            text, attention=HEADS_ALONE, mlp=OUTPUT_ALONE, logits=LAST, allow_longer=allow_longer
        )
        weights = adapter.model.lm_head.weight
        parts = AttributionMethods.component_attribution(full.residual, full.mlp, weights, token)
        heads = AttributionMethods.head_attribution(full.attention, adapter.model, token, residual=full.residual)
        by_head, by_part = np.asarray(heads.values), np.asarray(parts.values)
    ranked = [(abs(v), f"L{n}H{h}", float(v)) for (n, h), v in np.ndenumerate(by_head)]
    ranked += [(abs(v), f"L{n} MLP", float(v)) for n, v in enumerate(by_part[:, 1])]
    ranked.sort(reverse=True)
    largest = ranked[0][0] or 1.0

    details = heads.details
    if as_json:
        ends = {
            "logit": details["logit"],
            "embedding": details["embedding"],
            "completeness_error": heads.completeness_error,
        }
        print_json(
            {"prompt": text, "target": target, "versus": versus, **ends, "heads": by_head, "mlps": by_part[:, 1]}
        )
    logit = float(details["logit"])
    rest = [
        ("embedding", float(details["embedding"])),
        ("all attention heads", float(by_head.sum())),
        ("all MLPs", float(by_part[:, 1].sum())),
    ]
    out = console(quiet=as_json)
    what = f"logit of {shown(target)}" + (f" − logit of {shown(versus)}" if versus is not None else "")
    out.print(TextCell(f"{what} after {shown(text)}: {logit:+.3f}"))
    out.print(_table(ranked[:top], largest))
    summary = ", ".join(f"{name} {value:+.3f}" for name, value in rest)
    assert heads.completeness_error is not None
    out.print(f"{summary}; all parts together miss the logit by {float(heads.completeness_error):.1e}.", markup=False)
    if picture:
        from ..visualize import attribution_bars, panels

        figure, (left, right) = panels(1, 2, 11.0, 5.0, widths=(3, 2))
        attribution_bars(parts, ax=left, title=what)
        attribution_bars(heads, ax=right, k=15, title="the strongest heads")
        save_picture(figure, picture, as_json)


def _table(parts: list[tuple[float, str, float]], largest: float) -> Table:
    """Each part's name and what it adds, with a bar of its size."""
    table = Table(box=None, pad_edge=False)
    for column, justify in (("part", "left"), ("adds to the logit", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for size, name, value in parts:
        table.add_row(name, f"{value:+.3f}", ("█" if value > 0 else "░") * round(20 * size / largest))
    return table
