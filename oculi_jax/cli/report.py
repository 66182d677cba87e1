"""`oculi report`: a prompt's insides as one HTML page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import oculi_jax

from .common import Chat, Dtype, Longer, Model, Text, check_output, config_of, console, open_adapter
from .effects import announce, answer, counting
from .prompts import said_by_user, token_ids

if TYPE_CHECKING:
    from ..circuits import Circuit


def report(
    text: Text,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the page goes: a name in .html.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option(help="The answer to explain, one token.", show_default="the likeliest next token"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Heads whose patterns the page holds: L17H3,L18H6.",
            show_default="all; of a large model the strongest",
        ),
    ] = None,
    circuit: Annotated[
        Path | None,
        typer.Option(
            help="A circuit of this model, as `oculi circuit -o circuit.json` writes it: the page shows it too.",
            show_default=False,
        ),
    ] = None,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """A prompt's insides as one HTML page, for a browser: lens, attention, head scores, ablations, attribution.

    The page loads nothing from anywhere, so it can be sent to others as it is.
    """
    path = check_output(output, ".html", ".htm")
    chosen = pairs(heads)
    if chosen is not None and (config := config_of(model)) is not None:
        from ..pages import measured

        # The prompt's length, which bounds how many heads a page can hold, is known when its tokens are.
        measured.check_heads(chosen, config.num_hidden_layers, config.num_attention_heads, n_tokens=1)
    drawn = None if circuit is None else _circuit(circuit, model)
    adapter = open_adapter(model, dtype, text, target, chat=chat)
    tokens = token_ids(adapter, text, allow_longer, chat)
    if target is not None:
        answer(adapter, tokens, target)
    heads_alone, metric = oculi_jax.HeadAblation.grid(adapter.model.config), oculi_jax.metrics.log_probability(0)
    announce(oculi_jax.plan(adapter.model, tokens, heads_alone, metric))
    with counting("Running the model") as progress:
        prompt = said_by_user(text) if chat else text
        page = oculi_jax.report(
            adapter,
            prompt,
            target=target,
            heads=chosen,
            circuit=drawn,
            progress=progress,
            allow_longer=allow_longer,
        )
    page.save(path)
    console().print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser.", markup=False)


def _circuit(path: Path, model: str | None) -> Circuit:
    """The circuit of a file; raises for one of another model, where the config of this one is on this disk."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--circuit is {str(path)!r}, and there is no such file.")
    found = oculi_jax.circuits.Circuit.load(path)
    if (config := config_of(model)) is not None:
        from ..pages.html import check_circuit

        check_circuit(found, config)
    return found


def pairs(text: str | None) -> list[tuple[int, int]] | None:
    """`"L17H3,L18H6"` → (layer, head) pairs; None stays None."""
    if text is None:
        return None
    found = [re.fullmatch(r"\s*L([0-9]{1,6})H([0-9]{1,6})\s*", part, re.IGNORECASE) for part in text.split(",")]
    named = [(int(match[1]), int(match[2])) for match in found if match]
    if len(named) < len(found):
        raise ValueError(f"--heads is {text!r}; write a layer and a head of each, with commas: L17H3,L18H6.")
    return named
