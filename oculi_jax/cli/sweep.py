"""`oculi sweep`: what becomes of an answer without each attention head."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text as TextCell

import oculi_jax

from .common import (
    Asked,
    Chat,
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    check_picture,
    console,
    open_adapter,
    print_json,
    prompt_label,
    save_picture,
    shown,
    working,
)
from .effects import Against, Target, announce, bar, counting, heading, legible, measure, strongest
from .prompts import OneText, PromptFile, Row, check_one, check_target, read_rows, token_ids
from .sets import as_lists, encoded, interval_cells, mean_and_interval, measure_set, note_few, plain_values

if TYPE_CHECKING:
    import numpy as np

    from ..metrics import Metric
    from ..models.llama import LlamaAttentionAdapter


def sweep(
    text: OneText = None,
    prompts: PromptFile = None,
    target: Target = None,
    against: Against = None,
    top: Annotated[int, typer.Option(help="How many heads to show in each direction.", min=1)] = 10,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """What becomes of an answer without each attention head: the output z of one head at a time is set to zero.

    The metric is the log-probability of the target after the prompt; with --against, the difference of two logits.
    """
    check_one(prompts, text=text)
    asked = Asked(top, check_picture(output), as_json, chat, longer=allow_longer)
    if prompts is not None:
        rows = read_rows(prompts, ("prompt",), {"target": target, "against": against}, needed=("target",))
        adapter = open_adapter(model, dtype, *(row["prompt"] for row in rows), chat=chat)
        _of_set(adapter, rows, asked)
    elif text is not None:
        goal = check_target(target)
        adapter = open_adapter(model, dtype, text, chat=chat)
        _of_one(adapter, text, goal, against, asked)


def _without_each_head(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray | None, metric: Metric
) -> np.ndarray:
    """The metric without each head, `[L, H]`, or `[B, L, H]` of several prompts."""
    import numpy as np

    heads = oculi_jax.HeadAblation.grid(adapter.model.config)
    announce(oculi_jax.plan(adapter.model, tokens, heads, metric, mask=mask))
    with counting("Ablating each head") as progress:
        return np.asarray(oculi_jax.sweep(adapter.model, tokens, heads, metric, mask=mask, progress=progress))


def _of_one(adapter: LlamaAttentionAdapter, text: str, target: str, against: str | None, asked: Asked) -> None:
    tokens = token_ids(adapter, text, asked.longer, asked.chat)
    metric, name = measure(adapter, tokens, target, against)
    with working("Running the model"):
        plain = float(metric(oculi_jax.forward(adapter.model, tokens, logits="last")))
    change = _without_each_head(adapter, tokens, None, metric) - plain
    if asked.as_json:
        print_json({"prompt": text, "chat": asked.chat, "metric": name, "plain": plain, "change": change})
    out = console(quiet=asked.as_json)
    out.print(TextCell(f"{name} after {shown(prompt_label(text, asked.chat))}: {plain:+.3f}"))
    out.print(_caption(change), markup=False)
    out.print(_table(change, asked.top, lambda place: [f"{change[place]:+.3f}"], ["by"]))
    if asked.picture:
        figure = oculi_jax.visualize.sweep_heatmap(change, label=f"change of the {legible(name)}")
        heading(figure, prompt_label(text, asked.chat), f"{name}: {plain:+.3f} without ablation")
        save_picture(figure, asked.picture, asked.as_json)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: Asked) -> None:
    tokens, mask = encoded(adapter, rows, "prompt", asked)
    metric, name = measure_set(adapter, tokens, mask, rows)
    with working("Running the model"):
        before = plain_values(adapter, tokens, mask, metric)
    plain = mean_and_interval(before)
    change = mean_and_interval(_without_each_head(adapter, tokens, mask, metric) - before[:, None, None])
    note_few(rows)
    if asked.as_json:
        given = {**as_lists(rows, "prompt", "target", "against"), "chat": asked.chat}
        print_json({**given, "metric": name, "plain": plain, "change": change})
    out = console(quiet=asked.as_json)
    mean, interval = interval_cells(plain)
    out.print(TextCell(f"{name}, mean over {len(rows)} prompts: {mean} (95 % interval {interval})"))
    out.print(_caption(change["mean"]), markup=False)
    out.print(_table(change["mean"], asked.top, lambda place: interval_cells(change, place), ["by", "95 % interval"]))
    if asked.picture:
        figure = oculi_jax.visualize.sweep_heatmap(change["mean"], label="mean change")
        heading(figure, f"{len(rows)} prompts", f"{name}: {mean} without ablation")
        save_picture(figure, asked.picture, asked.as_json)


def _caption(change: np.ndarray) -> str:
    n_layers, n_heads = change.shape
    return f"One head at a time set to zero, of {change.size} ({n_layers} layers × {n_heads}):"


def _table(change: np.ndarray, top: int, cells: Callable, columns: list[str]) -> Table:
    """The heads without which the metric falls, beside those without which it rises."""
    sides = [strongest(change, top, sign) for sign in (-1, 1)]
    largest = max((abs(float(change[place])) for side in sides for place in side[:1]), default=1.0)
    table = Table(box=None, pad_edge=False)
    for side in ("falls without", "rises without"):
        table.add_column(side)
        for name in columns:
            table.add_column(name, justify="right")
        table.add_column("")
    for pair in zip_longest(*sides):
        each = [
            (f"L{at[0]}H{at[1]}", *cells(at), bar(float(change[at]), largest)) if at else ("",) * (len(columns) + 2)
            for at in pair
        ]
        table.add_row(*each[0], *each[1])
    return table
