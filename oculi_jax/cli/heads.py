"""`oculi heads`: every attention head, classified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import oculi_jax

from .common import (
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
    working,
)
from .prompts import token_ids

if TYPE_CHECKING:
    from ..models.llama import LlamaAttentionAdapter


def heads(
    text: Annotated[
        str | None,
        typer.Option(help="Classify on this prompt rather than on repeated random tokens.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="How many heads to name for each pattern.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Of the random tokens.", min=0, max=2**32 - 1)] = 0,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Every attention head, classified: what it does on random tokens that are repeated once, where nothing but the
    repetition can be known.

    Scores are attention, means over eight sequences with their standard errors; with --text, of that prompt alone.
    """
    picture = check_picture(output)
    if chat and text is None:
        raise ValueError("--chat says that --text is a user's message, and there is no --text.")
    adapter = open_adapter(model, dtype, text, chat=chat)
    config = adapter.model.config
    with working("Running the model"):
        if text is None:
            raw, errors, found = _on_random_tokens(adapter, seed)
        else:
            kept = oculi_jax.CaptureConfig(capture_queries=False, capture_keys=False, capture_values=False)
            tokens = token_ids(adapter, text, allow_longer, chat)
            capture = adapter.capture(tokens, kept, allow_longer=allow_longer)
            detection = oculi_jax.analysis.CircuitDetection
            raw, errors, found = detection.scores(capture), None, detection.summarize(capture)

    if as_json:
        places = sorted((layer, head, name) for name, heads in found.items() for layer, head, *_ in heads)
        classes = [[name for n, _, name in places if n == layer] for layer in range(config.num_hidden_layers)]
        given = {"prompt": text, "chat": chat}
        print_json({**given, "scores": raw, "standard_errors": errors, "classes": classes})
    table = Table(box=None, pad_edge=False)
    table.add_column("pattern")
    table.add_column("heads", justify="right")
    table.add_column("strongest")
    for name, heads in found.items():
        strongest = [f"L{n}H{h} {' ± '.join(f'{x:.2f}' for x in numbers)}" for n, h, *numbers in heads[:top]]
        table.add_row(name, str(len(heads)), ", ".join(strongest) if name != "unknown" else "")
    out = console(quiet=as_json)
    out.print(table)
    where = "random tokens, repeated once" if text is None else repr(prompt_label(text, chat))
    total = config.num_hidden_layers * config.num_attention_heads
    out.print(
        f"{total} heads ({config.num_hidden_layers} layers × {config.num_attention_heads}) on {where}.", markup=False
    )
    if picture:
        save_picture(_draw(raw, config.num_hidden_layers), picture, as_json)


def _on_random_tokens(
    adapter: LlamaAttentionAdapter, seed: int
) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Sequence[tuple]]]:
    """Scores and their standard errors, name → `[L, H]`, and every head under its pattern."""
    length = min(50, (adapter.model.config.max_position_embeddings - 1) // 2)
    scores = oculi_jax.diagnostics.head_scores(adapter.model, seed, length=length)
    names = list(scores.standard_error)
    return {name: getattr(scores, name) for name in names}, dict(scores.standard_error), scores.summarize()


def _draw(raw: Mapping[str, Any], n_layers: int) -> Any:
    names = ("previous_token", "induction", "duplicate_token", "bos")
    figure, axes = oculi_jax.visualize.panels(1, len(names), 4.4 * len(names), 1.8 + 0.16 * n_layers)
    for name, ax in zip(names, axes, strict=True):
        title = name.replace("_", " ") if name != "bos" else "first token"
        oculi_jax.visualize.head_heatmap(raw[name], "attention", limits=(0.0, 1.0), ax=ax, title=title)
    return figure
