"""`oculi sweep`: what becomes of an answer without each attention head."""

from __future__ import annotations

from itertools import zip_longest
from typing import Annotated

import numpy as np
import typer
from rich.table import Table
from rich.text import Text as TextCell

from ..intervention import HeadAblation
from ..run import forward
from ..sweeps.sweeping import plan
from ..sweeps.sweeping import sweep as run_sweep
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
from .effects import Against, Target, announce, bar, counting, heading, legible, measure, strongest, token_ids


def sweep(
    text: Text,
    target: Target,
    against: Against = None,
    top: Annotated[int, typer.Option(help="How many heads to show in each direction.", min=1)] = 10,
    output: Picture = None,
    as_json: Json = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """What becomes of an answer without each attention head: the output z of one head at a time is set to zero.

    The metric is the log-probability of the target after the prompt; with --against, the difference of two logits.
    """
    picture = check_picture(output)
    adapter = open_adapter(model, dtype, text)
    tokens = token_ids(adapter, text, allow_longer)
    metric, name = measure(adapter, tokens, target, against)
    heads = HeadAblation.grid(adapter.model.config)
    with working("Running the model"):
        plain = float(metric(forward(adapter.model, tokens, logits="last")))
    announce(plan(adapter.model, tokens, heads, metric))
    with counting("Ablating each head") as progress:
        found = np.asarray(run_sweep(adapter.model, tokens, heads, metric, progress=progress))
    change = found - plain

    if as_json:
        print_json({"prompt": text, "metric": name, "plain": plain, "change": change})
    sides = [[(place, float(change[place])) for place in strongest(change, top, sign)] for sign in (-1, 1)]
    largest = max((abs(value) for side in sides for _, value in side[:1]), default=1.0)
    table = Table(box=None, pad_edge=False)
    for side in ("falls without", "rises without"):
        table.add_column(side)
        table.add_column("by", justify="right")
        table.add_column("")
    for pair in zip_longest(*sides):
        cells = [(f"L{of[0][0]}H{of[0][1]}", f"{of[1]:+.3f}", bar(of[1], largest)) if of else ("",) * 3 for of in pair]
        table.add_row(*cells[0], *cells[1])
    out = console(quiet=as_json)
    out.print(TextCell(f"{name} after {shown(text)}: {plain:+.3f}"))
    n_layers, n_heads = change.shape
    out.print(f"One head at a time set to zero, of {change.size} ({n_layers} layers × {n_heads}):", markup=False)
    out.print(table)
    if picture:
        from ..visualize import sweep_heatmap

        figure = sweep_heatmap(change, label=f"change of the {legible(name)}")
        heading(figure, text, f"{name}: {plain:+.3f} without ablation")
        save_picture(figure, picture, as_json)
