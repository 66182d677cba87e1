"""`sum_dataset`: sums over a whole data set, and the file in which they are kept for going on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from ..arrays import wide
from ..backends import find_model
from ..sweeps.running import check_progress, told
from ..utils.files import read_tensors, write_aside, write_tensors
from .hosts import Hosts, meet
from .record import differences, named
from .running import (
    ROWS_OF_A_CHUNK,
    Function,
    batches,
    check_host,
    check_rows,
    described,
    each_chunk,
    name_of,
    set_of,
)

if TYPE_CHECKING:
    from ..backends.protocol import Model, ModelLike
    from ..sweeps.running import Progress
    from ..utils.tokens import Tokenizer
    from .dataset import Dataset, DatasetLike

FORMAT = "oculi_jax sums 1"


def sum_dataset(
    model: ModelLike,
    dataset: DatasetLike,
    fn: Function,
    *,
    tokenizer: Tokenizer | None = None,
    file: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
) -> Any:
    """The sum over all rows of what a function gives of each, kept on the devices until a chunk is done. Host function.

    With a `file`, the sums so far are written there after every chunk of 512 rows: whole, or as they were before. Ctrl-C and
    SIGTERM then end after the chunk at hand, and the same call goes on. Without one nothing is kept, and they end at once.

    Under `jax.distributed`, as in `map_dataset`, every host sums its own chunks and has the sum of all; host i of n keeps its own
    in a file of its own, `NAME-i-of-n`.

    Args:
        fn: as in `map_dataset`; sums over tokens it makes itself, with `batch.mask`.
        file: a safetensors file to go on from, where it is there; one of another job is refused.
        about: as in `map_dataset`, for the file.
        model, dataset, tokenizer, progress: as in `map_dataset`.

    Returns:
        What `fn` gives without its axis of rows: NumPy arrays, float64.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; another job's file. OSError: what
            cannot be written.

    Examples:
        >>> def stream(model, batch):
        ...     spec = CaptureSpec("resid_post", [2], [-1])
        ...     run = jax.vmap(lambda ids, mask: forward(model, ids, mask=mask, capture=spec)["resid_post"][0, 0])
        ...     return run(batch.tokens, batch.mask), np.ones(len(batch.rows))
        >>> total, n = data.sum_dataset(model, ["Rome", text], stream, tokenizer=tokenizer, file="sums.safetensors")
        >>> (total / n).shape, n
        ((192,), array(2.))
    """
    given, found = set_of(dataset, tokenizer), find_model(model)
    check_progress(progress)
    check_host(model, "sum_dataset")
    hosts = Hosts.of(found)
    own, shared = _own_chunks(len(given), hosts)
    kept = None
    if file is not None and hosts.together:
        raise ValueError(
            "The model's devices are of several hosts, which have no file of sums between them: leave file out."
        )
    if file is not None:
        what = {"function": named(fn), "about": dict(about or {}), **described(found, given)}
        kept = _Kept.of(file, {**what, "format": FORMAT, "host": jax.process_index(), "n_hosts": jax.process_count()})
    sums, done = ({}, 0) if kept is None else kept.read()
    part: Any = None

    def add(rows: range) -> None:
        nonlocal done, part
        part = _sum(found, given, fn, rows)
        for name, x in _by_name(part).items():
            sums[name] = np.asarray(sums.get(name, 0) + np.asarray(x, np.float64))
        done += 1
        if kept is not None:
            kept.write(sums, done)

    if shared:
        meet("sum_dataset")
    n_rows = sum(map(len, own))
    if kept is not None:
        each_chunk(kept.path, own[done:], add, progress, n_rows, hosts)
    else:
        with told("sum_dataset", progress, n_rows) as advance:
            for rows in own:
                add(rows)
                advance(len(rows))
    like = _sum(found, given, fn, own[0]) if part is None else part  # all was there, as names alone
    total = jax.tree.unflatten(jax.tree.structure(like), [sums[name] for name in _by_name(like)])
    return jax.tree.map(_of_all_hosts, total) if shared else total


def _own_chunks(n_rows: int, hosts: Hosts) -> tuple[list[range], bool]:
    """The rows of each chunk that this host runs; and whether hosts share them, or run together, or there are too few."""
    chunks = [range(n, min(n + ROWS_OF_A_CHUNK, n_rows)) for n in range(0, n_rows, ROWS_OF_A_CHUNK)]
    shared = 1 < jax.process_count() <= len(chunks) and not hosts.together
    return ([chunks[number] for number in hosts.own(len(chunks))] if shared else chunks), shared


def _sum(model: Model, dataset: Dataset, fn: Function, rows: range) -> Any:
    """The sum over some rows."""
    found: Any = None
    for batch, _ in batches(model, dataset, rows):
        out = fn(model, batch)
        check_rows(out, len(batch.rows))
        found = _add(found, out, batch.weights)
    return found


def _by_name(values: Any) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}


@dataclass(frozen=True)
class _Kept:
    """The file of a host's sums.

    Attributes:
        path: where.
        job: what says which sums they are.
    """

    path: Path
    job: Mapping[str, Any]

    @classmethod
    def of(cls, file: str | os.PathLike[str], job: Mapping[str, Any]) -> _Kept:
        path = Path(file).expanduser()
        if job["n_hosts"] > 1:
            path = path.with_name(f"{path.stem}-{job['host']}-of-{job['n_hosts']}{path.suffix}")
        return cls(path, json.loads(json.dumps(job)))

    def read(self) -> tuple[dict[str, np.ndarray], int]:
        """The sums by name, and of how many chunks they are; ValueError where the file is another job's or none's."""
        if not self.path.exists():
            return {}, 0
        arrays, metadata = read_tensors(self.path)
        try:
            about = json.loads(metadata["about"])
            there, done = about["job"], int(about["done"])
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{str(self.path)!r} holds no sums of a job: give another file.") from None
        if differs := differences(there, self.job):
            raise ValueError(f"{str(self.path)!r} holds the sums of another job: {'; '.join(differs)}.")
        return arrays, done

    def write(self, sums: Mapping[str, np.ndarray], done: int) -> None:
        about = json.dumps({"job": self.job, "done": done}, sort_keys=True)
        with write_aside(self.path) as aside:
            write_tensors(aside, sums, {"about": about}, name=self.path)


def _of_all_hosts(own: np.ndarray) -> np.ndarray:
    """The sum over hosts, whose float64 travels as what JAX keeps."""
    halves = np.stack([own.astype(np.float32), (own - own.astype(np.float32)).astype(np.float32)])
    return multihost_utils.process_allgather(halves).astype(np.float64).sum(axis=(0, 1))


@jax.jit
def _add(total: Any, values: Any, weights: Array) -> Any:
    """Values `[B, …]` of the rows that count, added up."""

    def of(x: Array) -> Array:
        x = x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
        counts = weights.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.sum(jnp.where(counts > 0, x, jnp.zeros((), x.dtype)), axis=0)

    found = jax.tree.map(of, jax.tree.map(jnp.asarray, values))
    return found if total is None else jax.tree.map(jnp.add, total, found)
