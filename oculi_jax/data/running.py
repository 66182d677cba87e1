"""`Job`: what is to be made of a data set, chunk by chunk, and the one loop over these."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

from .. import __version__
from ..arrays import integer, listing, on_every_host, under_trace
from ..backends import programs_of
from ..sweeps.running import check_progress, told
from .batches import Batch, batches_of, cut, lengths_of, tokens_at_once
from .chunks import IDS, OFFSETS, Chunk, file_of, write_chunk
from .dataset import Dataset
from .hosts import Hosts, meet
from .interrupts import until_asked
from .record import FORMAT, claim, describe, refuse
from .store import Store

if TYPE_CHECKING:
    from jax.tree_util import KeyPath

    from ..backends.protocol import Model
    from ..sweeps.running import Progress
    from ..utils.tokens import Tokenizer
    from .dataset import DatasetLike

ROWS_OF_A_CHUNK = 512
# (model, batch) → a pytree of arrays that lead with the rows of the batch.
Function: TypeAlias = Callable[[Any, Batch], Any]


@dataclass(frozen=True, eq=False)
class Job:
    """What `map_dataset` and `capture_dataset` are about to do; nothing is written before `run`.

    Attributes:
        fn: of a model and a batch.
        directory: where to.
        tokens: name → the axis of tokens of what `fn` gives for each.
        chunk_size: rows of a chunk.
        record: what says which job it is.
    """

    model: Model
    dataset: Dataset
    fn: Function
    directory: Path
    tokens: Mapping[str, int]
    chunk_size: int
    record: Mapping[str, Any]

    @classmethod
    def of(
        cls, model: Model, dataset: Dataset, fn: Function, directory: str | os.PathLike[str], tokens: Mapping[str, int],
        chunk_size: int, what: Mapping[str, Any],
    ) -> Job:  # fmt: skip
        """`what` says of the record what is computed."""
        chunk_size = integer(chunk_size, "chunk_size", 1)
        record = {**what, **described(model, dataset), "format": FORMAT, "chunk_size": chunk_size}
        return cls(model, dataset, fn, Path(directory).expanduser(), tokens, chunk_size, record)

    @property
    def n_chunks(self) -> int:
        return -(-len(self.dataset) // self.chunk_size)

    @property
    def missing(self) -> list[int]:
        """The numbers of chunks of which there is no file; ValueError where the directory is another job's."""
        refuse(self.directory, self.record)
        return [number for number in range(self.n_chunks) if not file_of(self.directory, number).exists()]

    def rows_of(self, number: int) -> range:
        """The rows of a chunk."""
        return range(number * self.chunk_size, min((number + 1) * self.chunk_size, len(self.dataset)))

    def shapes(self, chunks: Sequence[int]) -> tuple[Counter[tuple[int, int]], int]:
        """How often some chunks run a batch of each shape `[B, T]`, one program for each; and how many tokens their rows have."""
        found: Counter[tuple[int, int]] = Counter()
        n_tokens, at_once = 0, _at_once(self.model)
        for number in chunks:
            rows = self.dataset.rows(self.rows_of(number))
            found.update((size, length) for size, length, _ in cut(lengths_of(self.dataset, rows), at_once))
            n_tokens += sum(len(row[self.dataset.column]) for row in rows)
        return found, n_tokens

    def run(self, progress: Progress | bool | None = None) -> Store:
        """Does what is not there yet."""
        check_progress(progress)
        claim(self.directory, self.record)
        meet(self.directory.name)
        hosts, missing = Hosts.of(self.model), []
        own = hosts.own(self.n_chunks)
        with told("Checking what is there", not callable(progress) and progress, len(own)) as advance:
            for number in own:
                missing += [] if _is_there(self.directory, number) else [number]
                advance(1)
        n_rows = sum(len(self.rows_of(number)) for number in hosts.to_run(own, self.n_chunks))
        chunks = [self.rows_of(number) for number in hosts.to_run(missing, self.n_chunks)]
        each_chunk(self.directory, chunks, self._write, progress, n_rows, hosts)
        meet(self.directory.name)
        return Store.open(self.directory)

    def _write(self, rows: range) -> None:
        number = rows.start // self.chunk_size
        arrays, by_token = self._chunk(rows)
        if number not in Hosts.of(self.model).own(self.n_chunks):
            return
        try:
            write_chunk(file_of(self.directory, number), arrays, by_token)
        except OSError as error:
            done = sum(file_of(self.directory, n).exists() for n in range(self.n_chunks))
            raise type(error)(
                f"{error} {done} of {self.n_chunks} chunks are there; the same call does the rest."
            ) from error

    def _chunk(self, numbers: range) -> tuple[dict[str, np.ndarray], list[str]]:
        """What a chunk's file holds: name → array that leads with its rows, or with their tokens; and the names of the latter."""
        rows = self.dataset.rows(numbers)
        found: dict[str, list[Any]] = {}
        lengths = np.array([len(row[self.dataset.column]) for row in rows])
        waiting: tuple[Any, Batch, np.ndarray] | None = None
        for batch, places in batches_of(self.dataset, rows, numbers.start, _at_once(self.model)):
            out = self.fn(self.model, batch)
            if waiting is not None:
                _take(found, *waiting, self.tokens, len(rows))  # while the next one runs
            waiting = out, batch, places
        assert waiting is not None
        _take(found, *waiting, self.tokens, len(rows))
        if unknown := sorted(set(self.tokens) - set(found)):
            raise ValueError(f"tokens names {unknown[0]!r}, and fn gives {', '.join(sorted(found))}.")
        arrays = {name: np.concatenate(of) if name in self.tokens else np.stack(of) for name, of in found.items()}
        arrays[IDS] = np.concatenate([row[self.dataset.column] for row in rows])
        arrays[OFFSETS] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return arrays, [IDS, *self.tokens]


def described(model: Model, dataset: Dataset) -> dict[str, Any]:
    """What a record says of a model and a data set."""
    return {
        "version": __version__, "model": describe(model), "data": dataset.fingerprint(), "columns": list(dataset.columns),
        "n_rows": len(dataset), "tokens_at_once": _at_once(model),
    }  # fmt: skip


def each_chunk(
    kept: Path, chunks: Sequence[range], do: Callable[[range], None], progress: Progress | bool | None, n_rows: int,
    hosts: Hosts,
) -> None:  # fmt: skip
    """Runs a function of some chunks' rows, one after another; Ctrl-C and SIGTERM end it between two.

    Args:
        kept: where what is done is kept.
        chunks: the rows of each.
        do: what is done with one.
        progress: as in `sweep`, of rows.
        n_rows: of all chunks of this host, of which those that are not in `chunks` are done.
        hosts: those that run together end together.
    """
    done = n_rows - sum(map(len, chunks))
    with (
        told(kept.name, progress, n_rows, done) as advance,
        until_asked(f"The job of {str(kept)!r}", hosts.largest) as ask,
    ):
        for rows in chunks:
            do(rows)
            advance(len(rows))
            ask()


def set_of(dataset: DatasetLike, tokenizer: Tokenizer | None) -> Dataset:
    """A data set of what makes one."""
    if isinstance(dataset, Dataset):
        if tokenizer is not None:
            raise ValueError("A Dataset has its own tokenizer, and another was given: Dataset(rows, tokenizer).")
        return dataset
    return Dataset(dataset, tokenizer)


def check_host(model: object, what: str) -> None:
    """TypeError under a trace."""
    if under_trace(model):
        raise TypeError(f"{what} runs on the host and was called inside a trace (jit, vmap, grad).")


def batches(model: Model, dataset: Dataset, numbers: range) -> Any:
    """The batches of some rows of a data set."""
    return batches_of(dataset, dataset.rows(numbers), numbers.start, _at_once(model))


def _at_once(model: Model) -> int:
    return tokens_at_once(programs_of(model).room(model)[0])


def _is_there(directory: Path, number: int) -> bool:
    """Whether a chunk is written and whole; one that is damaged is said to be done again."""
    try:
        Chunk.open(file_of(directory, number)).check()
    except FileNotFoundError:
        return False
    except ValueError as error:
        warnings.warn(f"{error} It is done again.", stacklevel=4)
        return False
    return True


def _take(
    found: dict[str, list[Any]], out: Any, batch: Batch, places: np.ndarray, tokens: Mapping[str, int], n_rows: int
) -> None:
    """Sorts what a batch gave into its rows' places."""
    check_rows(out, len(batch.rows))
    for path, leaf in jax.tree_util.tree_leaves_with_path(out):
        name = name_of(path)
        if name in (IDS, OFFSETS):
            raise ValueError(f"fn gives {name!r}, a name that a store has for itself; give it another.")
        values, axis = np.asarray(on_every_host(leaf)), tokens.get(name)
        if axis is not None and not (0 < axis < values.ndim and values.shape[axis] == batch.tokens.shape[1]):
            raise ValueError(
                f"fn gives {name!r} of shape {listing(values.shape)}, and by `tokens` axis {axis} of it has an entry for each of "
                f"{batch.tokens.shape[1]} tokens."
            )
        into = found.setdefault(name, [None] * n_rows)
        for row, place in enumerate(places):
            value = values[row]
            into[place] = value if axis is None else np.moveaxis(value, axis - 1, 0)[np.asarray(batch.mask[row])]


def check_rows(out: object, n_rows: int) -> None:
    """ValueError where what a function gives does not lead with the rows of a batch."""
    leaves = jax.tree_util.tree_leaves_with_path(out)
    if not leaves:
        raise ValueError("fn gives no array.")
    for path, leaf in leaves:
        if not np.ndim(leaf) or leaf.shape[0] != n_rows:
            raise ValueError(
                f"fn gives {name_of(path)!r} of shape {listing(np.shape(leaf))}, and it must lead with the {n_rows} rows of the "
                "batch."
            )


def name_of(path: KeyPath) -> str:
    """What an array of a pytree is called: keys and fields, joined by dots."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "values"
