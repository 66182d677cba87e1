"""`Dataset`: rows of text or ids, and whatever goes with them, numbered from 0 and cut by number alone."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from ..utils.tokens import Tokenizer

# Texts; ids; dictionaries; a file of any of those; or a Hugging Face data set.
DatasetLike: TypeAlias = "Dataset | str | os.PathLike[str] | Sequence[Any] | np.ndarray"
_FILES = (".txt", ".jsonl", ".npy")
_HASHED_AT_ONCE = 1 << 12  # rows


class Dataset:
    """A set of rows. What they are is looked at when they are read; a file of ids is never held whole.

    Args:
        source: a list of texts, or of ids of any lengths; ids `[N, T]`; a list of dictionaries of texts, ids and numbers; a
            Hugging Face `datasets.Dataset`; or a file: `.txt`, a text a line; `.jsonl`, a row a line; `.npy`, ids `[N, T]`, which
            is memory-mapped.
        tokenizer: for texts.
        column: of dictionaries, the one that models run on; None for the first that is text or ids.

    Raises:
        OSError: a file that cannot be read. ValueError, TypeError: rows that are no such thing, with the number of the row.

    Examples:
        >>> rows = [{"text": "Rome is in", "answer": 3}, {"text": "The capital of Italy is", "answer": 5}]
        >>> dataset = data.Dataset(rows, tokenizer)
        >>> dataset, dataset.rows([1])[0]["text"].shape
        (Dataset(2 rows of text, answer), (6,))
        >>> dataset.fingerprint() == data.Dataset(rows[:1], tokenizer).fingerprint()
        False
    """

    def __init__(self, source: DatasetLike, tokenizer: Tokenizer | None = None, *, column: str | None = None):
        given: Any = read(source) if isinstance(source, str | os.PathLike) else source
        if isinstance(given, Mapping):
            raise TypeError("A data set is rows: give a list of dictionaries, and not a dictionary of lists.")
        if not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
            raise TypeError(f"A data set is a list, an array or a file, and a {type(given).__name__} was given.")
        if not len(given):
            raise ValueError("The data set is empty: at least one row is needed.")
        self._rows, self._tokenizer = given, tokenizer
        first = self._raw([0])[0]
        self._named = isinstance(first, Mapping)
        self.columns: tuple[str, ...] = tuple(first) if isinstance(first, Mapping) else ("tokens",)
        values = first if isinstance(first, Mapping) else {"tokens": first}
        self.sequences = tuple(name for name in self.columns if isinstance(values[name], str) or np.ndim(values[name]))
        if not self.sequences:
            raise ValueError(f"Row 0 has {', '.join(self.columns)}, of which none is a text or ids.")
        if column is not None and column not in self.sequences:
            near = difflib.get_close_matches(str(column), self.sequences, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"column is {column!r}, and can be {' or '.join(map(repr, self.sequences))}.{hint}")
        self.column = self.sequences[0] if column is None else column

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Dataset({len(self)} rows of {', '.join(self.columns)})"

    def rows(self, numbers: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Some rows, each a dictionary: of ids int32 `[T]` for texts and ids, of numbers for others."""
        return [self._row(int(n), row) for n, row in zip(numbers, self._raw(numbers), strict=True)]

    def fingerprint(self) -> str:
        """A hash of all rows, and of what the tokenizer makes of the first ones."""
        found = hashlib.sha256()
        for begin in range(0, len(self), _HASHED_AT_ONCE):
            if isinstance(self._rows, np.ndarray):
                found.update(self._rows[begin : begin + _HASHED_AT_ONCE].astype(np.int64).tobytes())
                continue
            for row in self._raw(range(begin, min(begin + _HASHED_AT_ONCE, len(self)))):
                found.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
        for row in self.rows(range(min(len(self), 8))):
            found.update(np.concatenate([row[name] for name in self.sequences]).astype(np.int64).tobytes())
        found.update(f"{self.columns} {self.column}".encode())
        return found.hexdigest()[:32]

    def _raw(self, numbers: Iterable[int]) -> list[Any]:
        return [self._rows[int(number)] for number in numbers]

    def _row(self, number: int, row: Any) -> dict[str, Any]:
        """A row as `rows` gives it."""
        if isinstance(row, Mapping) != self._named:
            is_named = "is" if isinstance(row, Mapping) else "is not"
            raise TypeError(f"Row {number} of the data set {is_named} a dictionary of columns, unlike row 0.")
        values = row if self._named else {"tokens": row}
        if missing := set(self.columns) ^ set(values):
            raise ValueError(
                f"Row {number} of the data set has not the columns of row 0: {', '.join(sorted(missing))}."
            )
        found: dict[str, Any] = {}
        for name, value in values.items():
            where = f"Row {number} of the data set" + (f", {name}," if self._named else "")
            found[name] = self._ids(value, where) if name in self.sequences else _number(value, where)
        return found

    def _ids(self, value: Any, where: str) -> np.ndarray:
        if isinstance(value, str):
            if self._tokenizer is None:
                raise TypeError(f"{where} is a text, and the data set has no tokenizer: Dataset(…, tokenizer).")
            value = self._tokenizer.encode(value)
        ids = np.asarray(value)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TypeError(f"{where} is an array {list(ids.shape)} of {ids.dtype}, and a text or ids [T] are needed.")
        if not ids.size:
            raise ValueError(f"{where} is empty: at least one token is needed.")
        return ids.astype(np.int32)


def read(source: str | os.PathLike[str]) -> Any:
    """What a file holds: lines, or a memory-mapped array."""
    path = Path(source).expanduser()
    if path.suffix not in _FILES:
        raise ValueError(f"A data set's file ends in {', '.join(_FILES)}, and {str(path)!r} does not.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if path.suffix == ".npy":
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no array that NumPy can map: {error}") from None
        if found.ndim != 2 or found.dtype.kind not in "iu":
            raise ValueError(f"{str(path)!r} holds {found.dtype} {list(found.shape)}, and ids [N, T] are needed.")
        return found
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8: {error}.") from None
    if path.suffix == ".txt":
        return [line for line in lines if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r}, line {number}, is not JSON: {error}") from None
    return rows


def _number(value: Any, where: str) -> Any:
    if not isinstance(value, bool | int | float | np.number | np.bool_):
        raise TypeError(f"{where} is a {type(value).__name__}, and in row 0 it is a number.")
    return value


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else repr(value)
