"""The rows of a job as its computation takes them: ids of prompts, and ids of answers.

Imported in the functions that need it, since it imports NumPy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.dataset import Dataset, read
from ..utils.tokens import to_single_token
from .jobfile import Attribute, JobFile, Patch

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig
    from ..utils.tokens import Tokenizer


def rows_of(asked: JobFile, tokenizer: Tokenizer, config: DecoderConfig) -> Dataset:
    """The rows with the columns that are needed: ids of prompts, and of answers that are one token."""
    where = "The data" if asked.data.file is None else asked.data.file
    given: Any = read(asked.data.file) if asked.data.file is not None else asked.data.texts
    if isinstance(given, np.ndarray) and not asked.texts and not asked.answers:
        return Dataset(given)
    if not len(given):
        raise ValueError(f"{where} is empty: at least one row is needed.")
    if not isinstance(given[0], Mapping):
        if asked.data.column or asked.texts or asked.answers:
            named = asked.data.column or (*asked.texts, *asked.answers)[0]
            raise ValueError(f"{where} has no columns, and {named!r} is asked for: give a .jsonl of objects.")
        given = [{"text": row} for row in given]
    first = _first(asked, Dataset(given[:1], tokenizer, column=asked.data.column))
    rows = [_row(asked, first, row, f"{where}, row {n},", tokenizer, config) for n, row in enumerate(given)]
    return Dataset(rows, column=first)


def _first(asked: JobFile, one: Dataset) -> str:
    """The column that the model runs on."""
    if asked.data.column is not None:
        return asked.data.column
    left = [name for name in one.sequences if name not in (*asked.texts, *asked.answers)]
    if not left:
        raise ValueError(f"[data] column is missing: of {', '.join(one.columns)} none is left for the model to run on.")
    return left[0]


def _row(
    asked: JobFile, first: str, row: Any, where: str, tokenizer: Tokenizer, config: DecoderConfig
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (first, *asked.texts, *asked.answers):
        if not isinstance(row, Mapping) or name not in row:
            names = list(row) if isinstance(row, Mapping) else []
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} has no column {name!r}: it has {', '.join(names) or 'none'}.{hint}")
        value = row[name]
        if name in asked.answers:
            found[name] = _one_token(value, f"{where} {name}", tokenizer)
            continue
        ids = found[name] = np.asarray(tokenizer.encode(value) if isinstance(value, str) else value)
        if config.limit is not None and ids.size > config.limit:
            raise ValueError(
                f"{where} {name} has {ids.size} tokens, and this model was made for at most {config.limit} "
                "(max_position_embeddings)."
            )
    for name in asked.texts if isinstance(asked.what, Patch | Attribute) else ():
        if found[name].size != found[first].size:
            raise ValueError(
                f"{where} has {found[first].size} tokens in {first} and {found[name].size} in {name}: patching puts them side by "
                "side."
            )
    return found


def _one_token(value: Any, where: str, tokenizer: Tokenizer) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}, and the text of one token or its id is needed.")
    try:
        return to_single_token(tokenizer, value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
