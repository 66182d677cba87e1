"""`Store`: the results of a job, read back row by row without being read whole."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ..arrays import integer
from .chunks import IDS, OFFSETS, Chunk, file_of
from .record import read
from .streams import order

_OPEN = 64  # heads of chunks that are kept


class Store:
    """What `map_dataset` and `capture_dataset` wrote: name → `Rows`; it may be of a job that is not done yet.

    Attributes:
        directory: where it is.
        about: the job: the model's fingerprint, the data set's, what was computed, the version of this library.
        n_rows: of the data set.

    Examples:
        >>> _ = data.capture_dataset(model, ["Rome", text], "resid_post", "kept", tokenizer=tokenizer)
        >>> store = data.Store.open("kept")
        >>> store.names, store.missing
        (('resid_post.0', 'resid_post.1', 'resid_post.2', 'resid_post.3'), ())
        >>> store.layers("resid_post"), store["resid_post", 2][1].shape, store.ids[0]
        ((0, 1, 2, 3), (6, 192), array([ 0, 12], dtype=int32))
    """

    def __init__(self, directory: Path, about: dict[str, Any]):
        self.directory, self.about = directory, about
        self.n_rows, self.chunk_size = int(about["n_rows"]), int(about["chunk_size"])
        self.n_chunks = -(-self.n_rows // self.chunk_size)
        self.chunk = lru_cache(_OPEN)(self._chunk)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Store:
        """FileNotFoundError where there is none, ValueError where it is not to be understood."""
        path = Path(directory).expanduser()
        return cls(path, read(path))

    @property
    def missing(self) -> tuple[int, ...]:
        """The numbers of chunks that are not written yet."""
        return tuple(n for n in range(self.n_chunks) if not file_of(self.directory, n).exists())

    @property
    def names(self) -> tuple[str, ...]:
        """What it holds of each row or token; none where no chunk is written."""
        first = self._first()
        return () if first is None else tuple(sorted(set(first.places) - {IDS, OFFSETS}, key=_by_number))

    def describe(self, name: str) -> tuple[str, tuple[int, ...], bool]:
        """The dtype and shape of each entry of a name, and whether these are tokens rather than rows.

        Examples:
            >>> store = data.capture_dataset(model, ["Rome", text], "mlp_out", "described", tokenizer=tokenizer)
            >>> store.describe("mlp_out.3")
            ('float32', (192,), True)
        """
        first = self._first()
        if first is None or name not in first.places:
            raise KeyError(self._unknown(name))
        dtype, shape, _ = first.places[name]
        return str(dtype), shape[1:], name in first.by_token

    def layers(self, site: str) -> tuple[int, ...]:
        """The layers of a site."""
        parts = [name.rpartition(".") for name in self.names]
        return tuple(int(layer) for name, _, layer in parts if name == site and layer.isdecimal())

    def __getitem__(self, name: str | tuple[str, int]) -> Rows:
        """`store["resid_post", 3]`, a site's layer, or `store["effects"]`; KeyError where there is none."""
        full = name if isinstance(name, str) else f"{name[0]}.{name[1]}"
        if full not in self.names:
            raise KeyError(self._unknown(full))
        return Rows(self, full)

    @property
    def ids(self) -> Rows:
        """The ids of each row's tokens, int32 `[T]`."""
        return Rows(self, IDS)

    def check(self) -> None:
        """Reads everything; ValueError with what is damaged."""
        missing = self.missing
        for number in range(self.n_chunks):
            if number not in missing:
                Chunk.open(file_of(self.directory, number)).check()

    @cached_property
    def ends(self) -> Int[np.ndarray, "C"]:
        """How many tokens there are up to the end of each chunk; IndexError where one is missing."""
        return np.cumsum([self.chunk(number).places[IDS][1][0] for number in range(self.n_chunks)])

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.names, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"The store has no {name!r}, and has {', '.join(self.names) or 'nothing yet'}.{hint}"

    def _first(self) -> Chunk | None:
        """The first chunk that is written."""
        there = (n for n in range(self.n_chunks) if file_of(self.directory, n).exists())
        number = next(there, None)
        return None if number is None else self.chunk(number)

    def _chunk(self, number: int) -> Chunk:
        try:
            return Chunk.open(file_of(self.directory, number))
        except FileNotFoundError:
            raise IndexError(f"Chunk {number} of {str(self.directory)!r} is not written yet.") from None

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        there = self.n_rows - sum(min(self.chunk_size, self.n_rows - n * self.chunk_size) for n in self.missing)
        return f"Store({there} of {self.n_rows} rows: {', '.join(self.names)})"


class Rows:
    """One name of a store: a sequence of rows, each an array; those of tokens `[T, …]`, of real ones alone.

    `np.array(rows)` reads all, where they are of one shape.

    Examples:
        >>> store = data.capture_dataset(model, ["Rome", text], "resid_post", "streams", tokenizer=tokenizer)
        >>> rows = store["resid_post", 3]
        >>> len(rows), rows[-1].shape, rows.tokens().shape
        (2, (6, 192), (8, 192))
    """

    def __init__(self, store: Store, name: str):
        self._store, self._name = store, name

    def __len__(self) -> int:
        return self._store.n_rows

    def __getitem__(self, number: int) -> np.ndarray:
        """A row, read; IndexError where there is none or it is not written yet."""
        n = integer(number, "a row's number")
        if not -len(self) <= n < len(self):
            raise IndexError(f"There is no row {n}: the store has {len(self)}, from 0.")
        which, place = divmod(n % len(self), self._store.chunk_size)
        chunk = self._store.chunk(which)
        array = chunk.array(self._name)
        if self._name not in chunk.by_token:
            return np.array(array[place])
        begin, end = chunk.array(OFFSETS)[place : place + 2]
        return np.array(array[begin:end])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[n] for n in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = [self[n] for n in range(len(self))]
        if len({row.shape for row in rows}) > 1:
            raise ValueError(f"Rows of {self._name!r} are of unequal lengths, and make no array; .tokens() joins them.")
        return np.stack(rows) if dtype is None else np.stack(rows).astype(dtype)

    def tokens(self, numbers: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """What it has of all tokens of some rows (None: all), one after another, `[tokens, …]`."""
        return np.concatenate([self[int(n)] for n in (range(len(self)) if numbers is None else numbers)])

    def batches(
        self, size: int, *, key: int = 0, start: int = 0, host: int = 0, n_hosts: int = 1
    ) -> Iterator[np.ndarray]:
        """Shuffled batches without end, for whoever trains on them: `[size, …]` of tokens, or of rows; arguments as in `order`.

        Examples:
            >>> store = data.capture_dataset(model, ["Rome", text], "mlp_out", "trained on", tokenizer=tokenizer)
            >>> next(store["mlp_out", 3].batches(5)).shape
            (5, 192)
        """
        store, one = self._store, self._store.chunk(0)
        rows = np.minimum(np.arange(1, store.n_chunks + 1) * store.chunk_size, len(self))
        ends = store.ends if self._name in one.by_token else rows
        begins, (dtype, shape, _) = np.concatenate([[0], ends]), one.places[self._name]
        for places in order(int(ends[-1]), size, key=key, start=start, host=host, n_hosts=n_hosts):
            which = np.searchsorted(ends, places, side="right")
            found = np.empty((size, *shape[1:]), dtype)
            for chunk in np.unique(which):
                here = which == chunk
                found[here] = store.chunk(int(chunk)).array(self._name)[places[here] - begins[chunk]]
            yield found


def _by_number(name: str) -> tuple[str, int]:
    """Layers in their order."""
    site, _, layer = name.rpartition(".")
    return (site, int(layer)) if layer.isdecimal() else (name, -1)
