"""`Batch`: rows of a chunk that run together; a chunk is cut into them by the lengths of its own rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from ..arrays import AnyArray
from ..prompts import bucket, padded
from ..pytrees import pytree, static
from ..sweeps.planning import MOST_ROWS, MOST_ROWS_ELSEWHERE

if TYPE_CHECKING:
    from .dataset import Dataset


def tokens_at_once(platform: str) -> int:
    """How many tokens run together, by the platform alone, so that the same programs run anywhere.

    As many as in a sweep; beside a CPU half of that, since nobody asks here how much memory is free.
    """
    return MOST_ROWS.get(platform, MOST_ROWS_ELSEWHERE // 2)


@pytree
class Batch:
    """Rows that run together, of one length and a number that the length decides: few programs run a whole set.

    Where fewer rows are left, the last one is repeated; whatever is made of these is dropped.

    Attributes:
        rows: their numbers in the data set, int32 `[B]`.
        columns: name → `[B]` of numbers, or ids int32 `[B, T]`, padded on the right, of one `T` for all columns.
        masks: name → bool `[B, T]`, True at real tokens, of the columns of ids.
        weights: float32 `[B]`: 1 for a row, 0 for a repeated one.
        column: the name of the one that models run on. Static.

    Examples:
        >>> def lengths(model, batch):
        ...     assert batch.tokens.shape == batch.mask.shape
        ...     return {"clean": batch.mask.sum(axis=1), "other": batch.mask_of("other").sum(axis=1)}
        >>> rows = [{"text": text, "other": "Rome"}, {"text": "Rome", "other": "Rome is in"}]
        >>> store = data.map_dataset(model, rows, lengths, "lengths", tokenizer=tokenizer)
        >>> np.array(store["clean"]).tolist(), np.array(store["other"]).tolist()
        ([6, 2], [2, 4])
    """

    rows: Int[AnyArray, "B"]
    columns: Mapping[str, AnyArray]
    masks: Mapping[str, Bool[AnyArray, "B T"]]
    weights: AnyArray
    column: str = static()

    @property
    def tokens(self) -> Int[AnyArray, "B T"]:
        return self.columns[self.column]

    @property
    def mask(self) -> Bool[AnyArray, "B T"]:
        return self.masks[self.column]

    def __getitem__(self, name: str) -> AnyArray:
        """A column; KeyError where there is none."""
        return self.columns[name]

    def mask_of(self, name: str) -> Bool[AnyArray, "B T"]:
        """Which tokens of a column are real; KeyError where it is no column of ids."""
        return self.masks[name]


def lengths_of(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> Int[np.ndarray, "C"]:
    """How many tokens each row has in the longest of its columns."""
    return np.array([max(len(row[name]) for name in dataset.sequences) for row in rows])


def cut(lengths: Int[np.ndarray, "C"], at_once: int) -> list[tuple[int, int, Int[np.ndarray, "P"]]]:
    """How the rows of a chunk run: how many together, at which padded length, and which; the longest first.

    A function of lengths alone, so that the programs of a whole job can be known before it runs.
    """
    order, begin, found = np.argsort(-lengths, kind="stable"), 0, []
    while begin < len(order):
        length = bucket(int(lengths[order[begin]]))
        size = min(rows_of(length, at_once), 1 << (len(order) - 1).bit_length())
        found.append((size, length, order[begin : begin + size]))
        begin += size
    return found


def rows_of(length: int, at_once: int) -> int:
    """How many rows of a length run together: a power of two, so that what is left over wastes little."""
    return 1 << max(0, (at_once // length).bit_length() - 1)


def batches_of(
    dataset: Dataset, rows: list[dict[str, Any]], first: int, at_once: int
) -> Iterator[tuple[Batch, Int[np.ndarray, "P"]]]:
    """The batches of a chunk's rows, and the places of theirs in the chunk."""
    for size, length, places in cut(lengths_of(dataset, rows), at_once):
        filled = np.concatenate([places, np.repeat(places[-1:], size - len(places))])
        columns, masks = _columns(dataset, [rows[place] for place in filled], length)
        weights = (np.arange(size) < len(places)).astype(np.float32)
        yield Batch((first + filled).astype(np.int32), columns, masks, weights, dataset.column), places


def _columns(
    dataset: Dataset, rows: Sequence[Mapping[str, Any]], length: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns of some rows, those of ids padded on the right `[B, T]`; and their masks."""
    values: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for name in dataset.columns:
        column = [row[name] for row in rows]
        if name in dataset.sequences:
            values[name], masks[name] = padded(column, length=length)
        else:
            values[name] = np.asarray(column)
    return values, masks
