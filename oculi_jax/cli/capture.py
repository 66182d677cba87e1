"""`oculi capture`: chosen sites of one prompt, written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer

from ..adapter.files import save
from ..capture import CaptureSpec, readings_of
from ..prompts import prepare
from ..run import forward
from ..sites import SITES, unknown_site
from .common import Dtype, Longer, Model, Text, check_output, console, integers, open_adapter, working


def capture(
    text: Text,
    sites: Annotated[str, typer.Option(help="Site names with commas; `oculi sites` lists them.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The safetensors file to write.", show_default=False)],
    layers: Annotated[
        str | None, typer.Option(help="Layers, as 10,15 or 0-5; all where left out.", show_default=False)
    ] = None,
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
    specs = (*([CaptureSpec(inside, chosen)] if inside else []), *([CaptureSpec(outside)] if outside else []))
    adapter = open_adapter(model, dtype, text)
    prompt = prepare(text, adapter.tokenizer, adapter.model.config, attention_mask=None, allow_longer=allow_longer)
    tokens = prompt.tokens[0, : prompt.n_tokens]
    readings = readings_of(specs, adapter.model.config, prompt.n_tokens)
    with working("Running the model"):
        found = jax.block_until_ready(forward(adapter.model, tokens, capture=specs, logits="none").activations)
    metadata = {
        "model": model or "tiny-facts",
        "text": text,
        "tokens": json.dumps(tokens.tolist()),
        "layers": json.dumps(next((list(r.layers) for r in readings if r.site.layered), [])),
    }
    with working(f"Writing {output}"):
        save(found, output, metadata=metadata)
    out = console()
    for reading in readings:
        value = np.asarray(found[reading.site.name])
        out.print(f"{reading.site.name}: {reading.site.shape} = {list(value.shape)} {value.dtype}", markup=False)
    out.print(f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB).", markup=False)
