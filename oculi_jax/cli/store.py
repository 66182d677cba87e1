"""`oculi store`: what a directory of results holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Json, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.store import Store


def store(
    directory: Annotated[str, typer.Argument(help="What capture_dataset or map_dataset wrote.", show_default=False)],
    check: Annotated[bool, typer.Option("--check", help="Read everything, and say what is damaged.")] = False,
    as_json: Json = False,
) -> None:
    """What a directory of results holds: how many rows, of what, from which model and data, and what is missing."""
    from ..data.store import Store

    found = Store.open(directory)
    if check:
        found.check()
    if as_json:
        arrays = {name: found.describe(name) for name in found.names}
        print_json({"about": found.about, "missing": found.missing, "arrays": arrays})
        return
    show(console(), found, "; all as they were written" if check else "")


def show(out: Console, found: Store, checked: str) -> None:
    """What a store holds, in some lines; `checked` follows what the first one says of its chunks."""
    n_missing = len(found.missing)
    whole = "all written" if not n_missing else f"{n_missing} not written yet: {_listed(found.missing)}"
    out.print(
        f"{found.n_rows} rows in {found.n_chunks} chunks of {found.chunk_size}, {whole}{checked}.", highlight=False
    )
    for name in found.names:
        dtype, shape, by_token = found.describe(name)
        axes = ["tokens" if by_token else "rows", *map(str, shape)]
        out.print(f"  {name}  {dtype} [{', '.join(axes)}]", markup=False)
    model = found.about.get("model", {})
    out.print(
        f"Model {model.get('weights')} ({model.get('backend')}, {model.get('dtype')}), data {found.about.get('data')}, "
        f"oculi_jax {found.about.get('version')}.",
        highlight=False,
    )


def _listed(numbers: tuple[int, ...]) -> str:
    """The first few of them."""
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
