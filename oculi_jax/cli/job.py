"""`oculi job`: a job over a data set, from a file."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import oculi_jax

from ..embedded import embedded_directory
from .common import check_model, console, keep_programs, working
from .hosts import join
from .interventions import read_line
from .jobfile import Capture, JobFile, Mesh, ModelTable, read_job
from .store import show

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.running import Job
    from .computations import Work

EVERY = 60.0  # seconds between two lines on what is done, where there is no terminal for a bar


def job(
    config: Annotated[Path, typer.Argument(help="The file of the job, in TOML.", show_default=False)],
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would do, and do nothing.")] = False,
) -> None:
    """Runs a job over a data set from a file: model, data, what to compute, where to. A second start does what is missing.

    The file has the tables [model], [data] and [store], and one of [capture], [sweep], [patch], [attribute] and [curve]. Under
    Slurm, Open MPI and on TPU pods every process runs this same line, and the hosts share the work.
    """
    asked = read_job(config)
    check_model(asked.model.source)
    if isinstance(asked.what, Capture):
        for line in asked.what.intervene:
            read_line(line)
    join()
    from .computations import work_of
    from .jobrows import rows_of

    model, tokenizer = _opened(asked.model)
    with working("Reading the data"):
        work = work_of(asked, rows_of(asked, tokenizer, model.config), model)
    import jax

    out = console(quiet=jax.process_index() > 0)
    _announce(out, asked, work)
    if plan:
        return
    try:
        with _plain_warnings():
            store = work.job.run(_teller(work.job))
    except (KeyboardInterrupt, SystemExit) as end:
        n_missing = len(work.job.missing)
        out.print(f"{work.job.n_chunks - n_missing} of {work.job.n_chunks} chunks are there.")
        raise SystemExit(130 if isinstance(end, KeyboardInterrupt) else end.code) from None
    show(out, store, "")


def _opened(asked: ModelTable) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    keep_programs()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    source = embedded_directory() if asked.source is None else asked.source
    tokenizer = oculi_jax.load_tokenizer(source, revision=asked.revision)
    mesh = None if asked.mesh is None else _mesh(asked.mesh)
    return oculi_jax.from_pretrained(source, dtype=asked.dtype, revision=asked.revision, mesh=mesh), tokenizer


def _mesh(asked: Mesh) -> Any:
    """This host's own devices, arranged; those of all hosts where the mesh is of as many."""
    import jax
    from jax.sharding import AxisType

    n, here, everywhere = asked.data * asked.model, jax.local_devices(), jax.devices()
    if n == len(everywhere):
        here = everywhere
    if min(asked.data, asked.model) < 1 or n > len(here):
        all_hosts = f", and all hosts {len(everywhere)}" if len(everywhere) > len(here) else ""
        raise ValueError(
            f"[model] mesh is {asked.data} × {asked.model} devices, and this host has {len(here)}{all_hosts}: a mesh is of some "
            "devices of each host, or of all devices of all."
        )
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((asked.data, asked.model), ("data", "model"), types, devices=here[:n])


def _announce(out: Console, asked: JobFile, work: Work) -> None:
    """Says what will be done."""
    import jax

    job, missing = work.job, work.job.missing
    out.print(
        f"{asked.kind} of {asked.model.source or 'tiny-facts'} ({job.model.dtype}) over {_n(len(job.dataset), 'row')}, to "
        f"{str(job.directory)!r}.",
        markup=False,
    )
    out.print(f"{_n(job.n_chunks, 'chunk')} of {_n(job.chunk_size, 'row')}: {job.n_chunks - len(missing)} there.")
    if not missing:
        return
    with working("Planning"):
        shapes, n_tokens = job.shapes(missing)
        seconds = sum(times * work.plan(*shape).seconds for shape, times in shapes.items()) / jax.process_count()
    n_rows = sum(len(job.rows_of(number)) for number in missing)
    size = _bytes(work.bytes(n_rows, n_tokens))
    hosts = f" on each of {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    out.print(f"To do: {_n(n_rows, 'row')} of {_n(n_tokens, 'token')}; {size} will be written.")
    out.print(f"About {_time(seconds)}{hosts}, and compiling for batches of {_n(len(shapes), 'shape')}.")


def _teller(job: Job) -> Callable[[int, int], None] | None:
    """A line now and then on what is done; None on a terminal, where there is a bar."""
    from ..data.hosts import Hosts
    from ..utils.progress import Pace

    if console(error=True).is_terminal:
        return None
    hosts, missing = Hosts.of(job.model), set(job.missing)
    own = hosts.to_run(hosts.own(job.n_chunks), job.n_chunks)
    sizes = {number: len(job.rows_of(number)) for number in own}
    pace = Pace(sum(sizes.values()), sum(size for number, size in sizes.items() if number not in missing))
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        pace.done = done
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
            console(error=True).print(f"{done} of {total} rows, {pace}")

    return tell


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as sentences, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: console(error=True).print(str(message), markup=False)
        yield


def _n(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _bytes(n: float) -> str:
    power = min(4, int(math.log10(max(n, 1))) // 3)
    return f"{n / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
