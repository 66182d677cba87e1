"""`oculi capture`: chosen sites of one prompt, written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import oculi_jax

from ..sites import SITES, unknown_site
from .common import Chat, Dtype, Longer, Model, Text, check_output, config_of, console, integers, open_adapter, working
from .prompts import token_ids


def capture(
    text: Text,
    sites: Annotated[str, typer.Option(help="Site names with commas; `oculi sites` lists them.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(help="Layers, as 10,15 or 0-5; all where left out.", show_default=False)
    ] = None,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """Writes chosen sites of one prompt as a safetensors file: arrays, and axes, model and tokens as metadata."""
    output = check_output(output)
    names = [name.strip() for name in sites.split(",")]
    if unknown := [name for name in names if name not in SITES]:
        raise ValueError(unknown_site(unknown[0]))
    chosen = integers(layers, "--layers")
    inside = tuple(name for name in names if SITES[name].layered)
    outside = tuple(name for name in names if name not in inside)
    if chosen is not None and not inside:
        raise ValueError(f"--layers is given, but {sites} occurs once, outside the layers.")
    config = config_of(model)
    spec = oculi_jax.CaptureSpec
    specs = (*([spec(inside, chosen)] if inside else []), *([spec(outside)] if outside else []))
    import numpy as np

    from ..capture import readings_of

    if config is not None:
        readings_of(specs, config, 1)
    adapter = open_adapter(model, dtype, text, chat=chat)
    tokens = token_ids(adapter, text, allow_longer, chat)
    readings = readings_of(specs, adapter.model.config, len(tokens))
    with working("Running the model"):
        found = oculi_jax.forward(adapter.model, tokens, capture=specs, logits="none").activations
        arrays = {name: np.asarray(value) for name, value in found.items()}
    metadata = {
        "model": model or "tiny-facts",
        "text": text,
        "chat": json.dumps(chat),
        "tokens": json.dumps(tokens.tolist()),
        "layers": json.dumps(next((list(r.layers) for r in readings if r.site.layered), [])),
    }
    with working(f"Writing {output}"):
        oculi_jax.save(found, output, metadata=metadata)
    out = console()
    for reading in readings:
        value = arrays[reading.site.name]
        out.print(f"{reading.site.name}: {reading.site.shape} = {list(value.shape)} {value.dtype}", markup=False)
    out.print(f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB).", markup=False)
