"""Prompts as a line gives them: one text, or `--prompts FILE`, whose rows are read and checked before a model is loaded."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from ..models.llama import LlamaAttentionAdapter

OneText = Annotated[
    str | None, typer.Argument(help="The prompt; or give a file of them with --prompts.", show_default=False)
]


def _file(lines: str) -> Any:
    help = f"A file of {lines} Numbers are then means over prompts with 95 % intervals."
    return typer.Option("--prompts", help=help, show_default=False)


OF_A_ROW = "target and against; for a row without them, --target and --against are taken."
PromptFile = Annotated[
    Path | None,
    _file(f"prompts, one a line; or a .jsonl of objects, each with a prompt and, if you like, its {OF_A_ROW}"),
]
PairFile = Annotated[
    Path | None,
    _file(
        "pairs of prompts, one a line, with a tab between clean and corrupted; or a .jsonl of objects, each with clean, corrupted "
        f"and, if you like, its {OF_A_ROW}"
    ),
]
LensFile = Annotated[
    Path | None,
    _file(
        "prompts, one a line; or a .jsonl of objects, each with a prompt and, if you like, a target, which is then followed and "
        "not the final answer."
    ),
]
# What a row may call a field besides its own name.
OTHER_NAMES = {"text": "prompt"}


@dataclass(frozen=True)
class Row:
    """One row of a file: its fields, where an option or the row gives them, and where it stands."""

    where: str
    fields: Mapping[str, str | None]

    def __getitem__(self, name: str) -> str | None:
        return self.fields.get(name)


def check_one(file: Path | None, **texts: str | None) -> None:
    """Raises unless a line gives either its texts or a file of them."""
    names = " and ".join(name.upper() for name in texts)
    given = [name.upper() for name, text in texts.items() if text is not None]
    if file is not None and given:
        raise ValueError(f"{given[0]} and --prompts are both given: give {names}, or a file of prompts.")
    if file is None and len(given) < len(texts):
        raise ValueError(f"There is no prompt: give {names}, or a file of prompts with --prompts FILE.")


def check_target(target: str | None) -> str:
    """The target, or a sentence where a line has none."""
    if target is None:
        raise ValueError("--target is missing: the answer, one token, such as --target ' Paris'.")
    return target


def read_rows(
    path: Path,
    texts: Sequence[str],
    options: Mapping[str, str | None],
    needed: Sequence[str] = (),
    option: str = "--prompts",
) -> list[Row]:
    """The rows of a file of prompts.

    Args:
        path: a `.jsonl` of objects; else each line is a text, or the texts with a tab between them.
        texts: the fields that are prompts, which each row has.
        options: the other fields, with what stands for them where a row does not give them.
        needed: those of the options that each row must have from somewhere.
        option: by which the file was given.
    """
    rows: list[Row] = []
    for number, line in enumerate(_lines(path, option), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        objects = path.suffix.lower() == ".jsonl"
        found = _object(line, where, (*texts, *options)) if objects else _columns(line, where, texts)
        fields = {**options, **found}
        for name in (*texts, *needed):
            if fields.get(name) is None:
                hint = f", or --{name} for all rows" if name in options else ""
                raise ValueError(f"{where}: there is no {name}: give it in the row of a .jsonl{hint}.")
        rows.append(Row(where, fields))
    if len(rows) < 2:
        raise ValueError(
            f"{path} holds {'one prompt' if rows else 'no prompt'}, and an interval over prompts needs at least two."
        )
    odd = next((row for row in rows if (row["against"] is None) != (rows[0]["against"] is None)), None)
    if odd is not None:
        raise ValueError(
            f"{odd.where}: against is given in some rows and not in others, and one metric is of all rows."
        )
    return rows


def _lines(path: Path, option: str) -> list[str]:
    path = path.expanduser()
    if not path.is_file():
        what = "it is a directory" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"{option} is {str(path)!r}, and {what}.")
    try:
        # Not as text: other line breaks, which Python would take for ends of lines, may stand in a prompt.
        return re.split("\r?\n", path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}."
        ) from None


def _columns(line: str, where: str, texts: Sequence[str]) -> dict[str, str]:
    parts = line.split("\t") if len(texts) > 1 else [line]
    if len(parts) != len(texts):
        raise ValueError(
            f"{where}: {len(parts) - 1} tabs, and a line is {' and '.join(texts)} with one tab between them."
        )
    return dict(zip(texts, parts, strict=True))


def _object(line: str, where: str, names: Sequence[str]) -> dict[str, str]:
    try:
        given = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        at = f": {error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}: this is no JSON{at}.") from None
    if not isinstance(given, dict):
        example = json.dumps(dict.fromkeys(names, "…"), ensure_ascii=False)
        raise ValueError(f"{where}: this is {_kind(given)}, and an object is needed: {example}.")
    found: dict[str, str] = {}
    for key, value in given.items():
        name = OTHER_NAMES.get(str(key), str(key))
        if name not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: there is no field {key!r}.{hint} There are {', '.join(names)}.")
        if name in found:
            raise ValueError(f"{where}: {key!r} is another name of {name!r}, and both are given.")
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} is {_kind(value)}, and a text is needed.")
        found[name] = value
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def said_by_user(text: str) -> list[dict[str, str]]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]


def token_ids(adapter: LlamaAttentionAdapter, text: str, allow_longer: bool, chat: bool = False) -> np.ndarray:
    """The ids `[T]` of a prompt; under `chat`, of a user's message up to where the assistant answers."""
    from ..prompts import prepare

    prompt = prepare(
        said_by_user(text) if chat else text,
        adapter.tokenizer,
        adapter.model.config,
        attention_mask=None,
        allow_longer=allow_longer,
    )
    return prompt.tokens[0, : prompt.n_tokens]
