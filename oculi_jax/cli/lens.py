"""`oculi lens`: layer by layer, what the model would say if it stopped there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

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
from .prompts import LensFile, OneText, Row, check_one, read_rows, token_ids
from .sets import answers, as_lists, chunks, encoded, interval_cells, mean_and_interval, note_few

if TYPE_CHECKING:
    import numpy as np

    from ..models.llama import LlamaAttentionAdapter


def lens(
    text: OneText = None,
    prompts: LensFile = None,
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", help="How many tokens of one prompt to show at each layer.", min=1, max=20)
    ] = 3,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Layer by layer, what the model would say if it stopped there, and how the final answer comes up.

    The logit lens: final norm and unembedding applied to the residual stream after each layer. With --prompts, the mean
    probability of each prompt's own final answer, or of its row's target, and the share of prompts whose likeliest token
    that is already.
    """
    check_one(prompts, text=text)
    asked = Asked(top_k, check_picture(output), as_json, chat, longer=allow_longer)
    if prompts is not None:
        rows = read_rows(prompts, ("prompt",), {"target": None})
        adapter = open_adapter(model, dtype, *(row["prompt"] for row in rows), chat=chat)
        _of_set(adapter, rows, asked)
    elif text is not None:
        _of_one(open_adapter(model, dtype, text, chat=chat), text, asked)


def _of_one(adapter: LlamaAttentionAdapter, text: str, asked: Asked) -> None:
    import numpy as np

    analysis = oculi_jax.analysis.LogitLensAnalysis(adapter.tokenizer)
    tokens = token_ids(adapter, text, asked.longer, asked.chat)
    with working("Running the model"):
        config = oculi_jax.LogitConfig(top_k=asked.top, positions=[-1])
        capture = adapter.capture_logits(tokens, config, allow_longer=asked.longer)
        predictions = analysis.layer_predictions(capture, top_k=asked.top)
        answer = analysis.prediction_trajectory(capture)[-1]
        trajectory = np.asarray(analysis.token_probability_trajectory(capture, answer["token"]))
    name = shown(answer["text"])
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for k in range(asked.top):
        table.add_column("what it would say" if k == 0 else "")
    table.add_column(TextCell(f"P({name})"))
    for row, p in zip(predictions, trajectory, strict=True):
        cells = [TextCell(f"{shown(token)} {chance:.3f}") for token, chance in row["predictions"]]
        table.add_row(str(row["layer"]), *cells, f"{p:.3f} {'█' * round(20 * float(p))}")
    if asked.as_json:
        pairs = zip(predictions, trajectory, strict=True)
        layers = [{**row, "probability_of_answer": float(p)} for row, p in pairs]
        last = {"answer": answer["text"], "answer_id": answer["token"]}
        print_json({"prompt": text, "chat": asked.chat, **last, "layers": layers})
    out = console(quiet=asked.as_json)
    out.print(table)
    out.print(TextCell(f"{prompt_label(text, asked.chat)} → {name} with probability {trajectory[-1]:.3f}"))
    if asked.picture:
        figure = oculi_jax.visualize.lens_table(predictions, title=prompt_label(text, asked.chat))
        save_picture(figure, asked.picture, asked.as_json)


def _of_set(adapter: LlamaAttentionAdapter, rows: list[Row], asked: Asked) -> None:
    import numpy as np

    tokens, mask = encoded(adapter, rows, "prompt", asked)
    with_target = np.array([row["target"] is not None for row in rows])
    wanted = np.full(len(rows), -1)
    if with_target.any():
        chosen = [row for row in rows if row["target"] is not None]
        wanted[with_target] = answers(adapter, tokens[with_target], mask[with_target], chosen, "target")
    with working("Running the model"):
        ids, chances, first = _trajectories(adapter, tokens, mask, wanted, asked.longer)
    probability, share = mean_and_interval(chances), mean_and_interval(first)
    note_few(rows)
    if asked.as_json:
        lists = {"answers": adapter.str_tokens(ids), "answer_ids": ids, "chat": asked.chat}
        found = {"probability_of_answer": probability, "likeliest": share}
        print_json({**as_lists(rows, "prompt", "target"), **lists, **found})
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "P(answer)", "95 % interval", "likeliest already", "95 % interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for n, p in enumerate(probability["mean"]):
        cells = *interval_cells(probability, (n,), ""), *interval_cells(share, (n,), "")
        table.add_row(str(n), *cells, "█" * round(20 * float(p)))
    out = console(quiet=asked.as_json)
    out.print(table)
    what = {0: "its own final answer", len(rows): "its target"}.get(
        int(with_target.sum()), "its target, or else its own final answer"
    )
    out.print(f"Means over {len(rows)} prompts; the answer of each is {what}.", markup=False)
    if asked.picture:
        labels = ["probability of the answer", "share of prompts where it is the likeliest"]
        means = np.stack([probability["mean"], share["mean"]])
        title = f"{len(rows)} prompts"
        figure = oculi_jax.visualize.layer_profile(means, labels=labels, ylabel="mean over prompts", title=title)
        save_picture(figure, asked.picture, asked.as_json)


def _trajectories(
    adapter: LlamaAttentionAdapter, tokens: np.ndarray, mask: np.ndarray, wanted: np.ndarray, longer: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each prompt's answer `[B]`, its probability `[B, L]`, and whether it is the likeliest token `[B, L]`.

    `wanted` are ids `[B]`, −1 where the answer is what the model says in the end.
    """
    import jax
    import numpy as np

    analysis, config = oculi_jax.analysis.LogitLensAnalysis(), oculi_jax.LogitConfig(top_k=1, positions=[-1])

    @jax.jit
    def trajectories(capture: Any, goal: Any) -> Any:
        axes = dataclasses.replace(jax.tree.map(lambda _: 0, capture), unembedding=None)  # which all prompts share
        return jax.vmap(analysis.token_probability_trajectory, in_axes=(axes, 0))(capture, goal)

    ids, chances, first = [], [], []
    for part, real, goal in chunks(tokens, mask, wanted):
        capture = adapter.capture_logits(part, config, attention_mask=real, allow_longer=longer)
        likeliest = np.asarray(capture.top_k_indices)[:, :, 0, 0]
        goal = np.where(goal < 0, likeliest[:, -1], goal)
        found = trajectories(capture, goal)
        ids += goal.tolist()
        chances += list(np.asarray(found))
        first += list(likeliest == goal[:, None])
    return np.array(ids), np.stack(chances), np.stack(first)
