"""`oculi doctor`: whether what this machine's devices compute can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..embedded import embedded_directory
from .common import Dtype, Json, Model, check_model, console, keep_programs, print_json, working

if TYPE_CHECKING:
    from ..trust import Finding

_FLAGS = """
On a GPU programs of oculi_jax are compiled with an option that halves the time of decoding and of short prompts. For a jax.jit of \
your own around them, set it before Python starts:
export XLA_FLAGS="$XLA_FLAGS {}\""""
_WRONG = """
jaxlib 0.10.2 computes some programs wrongly on a CPU. Those of oculi_jax.circuits are compiled with an option that prevents \
it. For a jax.jit of your own, take another version of jaxlib, or set it before Python starts:
export XLA_FLAGS="$XLA_FLAGS {}\""""


def doctor(
    model: Model = None,
    dtype: Dtype = "auto",
    device: Annotated[
        str | None, typer.Option(help="Only this one: gpu, tpu, cuda, mps or cpu.", show_default="all that are here")
    ] = None,
    as_json: Json = False,
) -> None:
    """Whether what this machine's devices compute can be trusted: each site of one prompt beside the CPU's float32.

    In float32 and in the model's dtype. Exits with 1 where something is wrong.
    """
    check_model(model)
    from .. import trust as checks
    from ..utils.devices import CPU_OPTIONS, GPU_OPTIONS, GPUS, flags, get_device_info

    keep_programs()
    here = checks.devices()
    names = sorted({name for _, name in here})
    wanted = [(backend, name) for backend, name in here if device in (None, name)]
    if device is not None and not wanted:
        raise ValueError(
            f"device is {device!r}, and to compare with JAX's CPU there is {', '.join(names) or 'none'} here."
        )
    out = console(quiet=as_json)
    info = get_device_info()
    out.print(_machine(info))
    if info["platform"] in GPUS:
        out.print(_FLAGS.format(flags(GPU_OPTIONS)), markup=False, soft_wrap=True)
    if CPU_OPTIONS:
        out.print(_WRONG.format(flags(CPU_OPTIONS)), markup=False, soft_wrap=True)
    if not wanted:
        out.print(
            "JAX has the CPU alone here, and torch is not installed: there is nothing to compare. The CPU is what the tests "
            "compare with Hugging Face's own Llama."
        )
        if as_json:
            print_json({})
        return
    source = embedded_directory() if model is None else model
    by_kind: dict[tuple[str, ...], Finding] = {}
    for kind in ("float32", dtype):
        for backend, name in wanted:
            if (backend, name, kind) not in by_kind:
                with working(f"Running {backend} on {name} in {kind}"):
                    one = checks.examine(source, backend, name, kind)
                by_kind[backend, name, one.dtype] = one
    found = list(by_kind.values())
    out.print(
        "\nError of the worst row over its largest value, and the layer where it is largest; ✗ where a row, or in half precision "
        "the mean of rows, is further off than the CPU's own arithmetic explains:"
    )
    out.print(_table(found))
    out.print()
    if as_json:
        print_json(
            {f"{one.backend} {one.device} {one.dtype}": {"verdict": one.verdict, "errors": one.errors} for one in found}
        )
    for one in found:
        out.print(one.sentence, markup=False)
    if any(one.verdict in ("wrong", "failed") for one in found):
        raise typer.Exit(1)


def _machine(info: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in info.items():
        shown = f"{value / 1e9:.1f} GB" if name.endswith("_bytes") and value is not None else str(value)
        table.add_row(name.removesuffix("_bytes").replace("_", " "), shown)
    return table


def _table(found: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("site")
    for one in found:
        table.add_column(f"{one.backend} {one.device}\n{one.dtype}", justify="right")
    for site in next((one.errors for one in found if one.errors), ()):
        table.add_row(site, *(_cell(one, site) for one in found))
    return table


def _cell(one: Finding, site: str) -> str:
    if site not in one.errors:
        return "—"
    errors, excess = one.errors[site], one.excess[site]
    off = excess.max() > 1
    layer = int((excess if off else errors).argmax())
    return f"{errors[layer]:.1e}{f' L{layer}' if len(errors) > 1 else ''}{' ✗' if off else ''}"
