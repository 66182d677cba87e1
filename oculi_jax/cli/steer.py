"""`oculi steer`: a direction from two files of prompts, judged, and written to a file that `generate` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

import oculi_jax

from ..sites import site_of
from .common import (
    Asked,
    Chat,
    Dtype,
    Json,
    Longer,
    Model,
    check_output,
    config_of,
    console,
    open_adapter,
    print_json,
    working,
)
from .prompts import Row, read_rows
from .sets import encoded

if TYPE_CHECKING:
    from ..training import Direction

_LEAST = 4  # prompts of each kind: two to fit on, and two to judge on


def _file(which: str) -> Any:
    return typer.Option(
        help=f"A file of {which}, one a line; or a .jsonl of objects, each with a prompt.", show_default=False
    )


def steer(
    positive: Annotated[Path, _file("prompts that are to be told from the others, and steered towards")],
    negative: Annotated[Path, _file("the others")],
    layer: Annotated[
        int | None,
        typer.Option(
            help="At which layer. Where it is left out all are shown, and the one in the middle is written.",
            min=0,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The safetensors file to write, of one layer's direction.", show_default=False
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="Which site: a row of features for each token.")] = "resid_pre",
    position: Annotated[
        str, typer.Option(help="At which token, from the last where negative; or mean, over all.")
    ] = "-1",
    seed: Annotated[int, typer.Option(help="Of what is held out, and of the controls.", min=0, max=2**32 - 1)] = 0,
    as_json: Json = False,
    chat: Chat = False,
    model: Model = None,
    dtype: Dtype = "auto",
    allow_longer: Longer = False,
) -> None:
    """The direction from negative prompts to positive ones: how well it tells them apart, and a file to steer with.

    The difference of their means at one place of the model, made of three quarters of the prompts and judged on the others: AUROC
    is how often a positive one is further along than a negative one. Beside it stand random directions, labels in a random order
    and a model that was never trained. `oculi generate --intervene steer:file=FILE,scale=2` adds it.
    """
    at = _position(position)
    if output is not None:
        output = check_output(output)
    rows = {name: _rows(path, name) for name, path in (("positive", positive), ("negative", negative))}
    config = config_of(model)
    if config is not None:
        site_of(site, config.sites)
        if layer is not None and layer >= config.num_hidden_layers:
            raise ValueError(f"--layer is {layer}, and this model has layers 0 to {config.num_hidden_layers - 1}.")
    texts = [str(row["prompt"]) for some in rows.values() for row in some]
    adapter = open_adapter(model, dtype, *texts, chat=chat)
    asked = Asked(0, None, as_json, chat, allow_longer)
    (first, first_mask), (second, second_mask) = (encoded(adapter, some, "prompt", asked) for some in rows.values())
    import jax

    with working("Running the model"):
        found = oculi_jax.training.difference_of_means(
            adapter.model, first, second, layers=layer, site=site, positions=at, key=jax.random.key(seed),
            positive_mask=first_mask, negative_mask=second_mask,
        )  # fmt: skip
    _show(found, as_json)
    if output is not None:
        # Not the layer whose held-out figures are best: these would then say too much of it.
        there = adapter.model.config.num_hidden_layers // 2 if layer is None else layer
        named = {"model": model or "tiny-facts", "layer": str(there), "site": site, "position": position}
        oculi_jax.save(found.at(there).steer(), output, metadata=named)
        chosen = f": layer {there}, the one in the middle; --layer says another" if layer is None else ""
        console(quiet=as_json).print(f"Wrote {output}{chosen}.", markup=False)


def _position(text: str) -> int | None:
    if text == "mean":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--position is {text!r}, and an integer or mean is needed.") from None


def _rows(path: Path, name: str) -> list[Row]:
    rows = read_rows(path, ("prompt",), {}, option=f"--{name}")
    if len(rows) < _LEAST:
        raise ValueError(
            f"{path} holds {len(rows)} prompts, and --{name} needs {_LEAST} at least: some to fit on, and some to judge on."
        )
    return rows


def _show(found: Direction, as_json: bool) -> None:
    import numpy as np

    layers = found.layers if isinstance(found.layers, tuple) else (found.layers,)
    lengths = np.atleast_1d(np.linalg.norm(np.asarray(found.vector), axis=-1))
    columns = {"AUROC": found.auroc, **found.controls}
    ends = {
        name: {end: np.atleast_1d(getattr(spread, end)) for end in ("mean", "low", "high")}
        for name, spread in columns.items()
    }
    if as_json:
        accuracy = {end: np.atleast_1d(getattr(found.accuracy, end)) for end in ("mean", "low", "high")}
        controls = {name: spread for name, spread in ends.items() if name != "AUROC"}
        where = {"site": found.site, "position": found.positions, "layers": list(layers), "length": lengths}
        print_json(
            {
                **where,
                "held_out": len(found.held_out),
                "auroc": ends["AUROC"],
                "accuracy": accuracy,
                "controls": controls,
            }
        )
    table = Table(box=None, pad_edge=False)
    for name in ("layer", *columns, "length"):
        table.add_column(name, justify="right")
    for n, layer in enumerate(layers):
        cells = [_cell(spread, n) for spread in ends.values()]
        table.add_row(str(layer), *cells, f"{lengths[n]:.3g}")
    out = console(quiet=as_json)
    out.print(table)
    where = "mean over tokens" if found.positions is None else f"position {found.positions}"
    out.print(f"{found.site}, {where}; {len(found.held_out)} held-out prompts.", markup=False)


def _cell(spread: dict[str, Any], n: int) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*(float(spread[end][n]) for end in ("mean", "low", "high")))
