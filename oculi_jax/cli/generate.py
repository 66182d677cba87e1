"""`oculi generate`: what the model writes, plain and under interventions, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text as TextCell

import oculi_jax

from .common import (
    Chat,
    Dtype,
    Json,
    Longer,
    Model,
    Picture,
    Text,
    check_picture,
    config_of,
    console,
    open_adapter,
    print_json,
    prompt_label,
    save_picture,
    working,
)
from .interventions import chosen, usage
from .prompts import token_ids

if TYPE_CHECKING:
    import numpy as np

    from ..models.llama import LlamaAttentionAdapter


def generate(
    text: Text,
    intervene: Annotated[
        list[str] | None,
        typer.Option("--intervene", "-i", help=f"May be given several times. {usage()}.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="How many tokens at most.", min=1)] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.", min=0.0)] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens that hold this probability.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws; both texts draw alike.", min=0, max=2**32 - 1)] = 0,
    output: Picture = None,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Continues a text, plain and, with --intervene, under interventions, side by side."""
    picture = check_picture(output)
    interventions = chosen(model, intervene or [])
    _check_draws(model, temperature, top_k, top_p)
    adapter = open_adapter(model, dtype, text, chat=chat)
    prompt = token_ids(adapter, text, allow_longer, chat)
    options: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, allow_longer=allow_longer)
    if temperature > 0:
        import jax

        options["key"] = jax.random.key(seed)
    runs = {"plain": (), **({", ".join(intervene): interventions} if intervene else {})}
    with working("Writing"):
        found = {name: _continue(adapter, prompt, max_new_tokens, items, options) for name, items in runs.items()}

    if as_json:
        names = ("tokens", "probabilities", "text")
        each = [{"interventions": name, **dict(zip(names, run, strict=True))} for name, run in found.items()]
        print_json({"prompt": text, "chat": chat, "runs": each})
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2))
    for name in found:
        table.add_column(TextCell(name), ratio=1, overflow="fold")
    shown = f"{prompt_label(text, chat)}\n" if chat else text
    table.add_row(*(TextCell(shown).append(added, style="bold") for _, _, added in found.values()))
    out = console(quiet=as_json)
    out.print(table)
    if interventions:
        (plain, *_), (changed, *_) = found.values()
        same = next((i for i, pair in enumerate(zip(plain, changed, strict=False)) if pair[0] != pair[1]), None)
        if same is not None:
            out.print(f"The texts part at new token {same}: {plain[same]!r}, {changed[same]!r}.", markup=False)
        else:
            out.print("The interventions changed no token.")
    if picture:
        save_picture(_draw(found), picture, as_json)


def _check_draws(model: str | None, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises for what tokens cannot be drawn by, before a model is loaded."""
    from ..decoding.sampling import sampler

    config = config_of(model)
    sampler(temperature, top_k, top_p, min_p=None, vocab_size=2**31 - 1 if config is None else config.vocab_size)


def _continue(
    adapter: LlamaAttentionAdapter, prompt: np.ndarray, n: int, interventions: Any, options: dict[str, Any]
) -> tuple[list[str], np.ndarray, str]:
    """The new tokens' texts, up to the end token, the probability that the model gave each, and what they add to the text."""
    import jax
    import numpy as np

    model, tokenizer = adapter.model, adapter.tokenizer
    assert tokenizer is not None
    ids, seen = adapter.generate(prompt, n, interventions, capture="final_norm", **options)
    new = ids[len(prompt) :]
    stops = np.atleast_1d(() if model.config.eos_token_id is None else model.config.eos_token_id)
    ends = np.flatnonzero(np.isin(new, stops))
    new = new[: ends[0] if ends.size else len(new)]
    # A token is chosen by the state of the one before it.
    states = np.asarray(seen["final_norm"])[len(prompt) - 1 :][: len(new)]
    chances = np.asarray(jax.nn.softmax(model.logits(jax.numpy.asarray(states)), axis=-1))
    tokens = adapter.str_tokens(new) if len(new) else []
    # Decoded with the prompt, as some tokenizers drop a text's first space.
    before, whole = (tokenizer.decode(some, skip_special_tokens=True) for some in (prompt, [*prompt, *new]))
    return tokens, chances[np.arange(len(new)), new], whole[len(before) :]


def _draw(found: dict[str, tuple[list[str], np.ndarray, str]]) -> Any:
    width = max(6.0, 0.28 * max(len(tokens) for tokens, *_ in found.values()))
    figure, axes = oculi_jax.visualize.panels(len(found), 1, min(width, 16.0), 3.0 * len(found))
    for ax, (name, (tokens, chances, _)) in zip(axes, found.items(), strict=True):
        if tokens:
            oculi_jax.visualize.attribution_bars(
                chances, labels=tokens, ax=ax, label="probability of the token", title=name
            )
            ax.set_ylim(0, 1)
    return figure
