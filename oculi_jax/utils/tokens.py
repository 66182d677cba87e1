"""Between text and token ids, for any tokenizer of Hugging Face's. The one door to `transformers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..prompts import PromptLike


class Tokenizer(Protocol):
    """What is asked of a tokenizer: text to ids and back, as any of Hugging Face's does it."""

    def encode(self, text: str, /, *args: Any, **kwargs: Any) -> Sequence[int]: ...
    def decode(self, ids: Any, /, *args: Any, **kwargs: Any) -> str: ...


def load_tokenizer(source: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The tokenizer beside a checkpoint (`transformers.AutoTokenizer`), never running code that comes with it.

    Raises:
        OSError: there is none, or none that can be used.

    Examples:
        >>> _ = tokenizer.save_pretrained("checkpoint")
        >>> load_tokenizer("checkpoint").encode(text) == ids
        True
    """
    from transformers import AutoTokenizer

    local = Path(source).is_dir()
    try:
        return AutoTokenizer.from_pretrained(
            os.fspath(source), revision=revision, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types here
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"There is no usable tokenizer in {os.fspath(source)!r}: {reason}") from error


def _need(tokenizer: Tokenizer | None) -> Any:
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "decode"):
        raise TypeError(f"A tokenizer is needed for text, and a {type(tokenizer).__name__} was given.")
    return tokenizer


def to_single_token(tokenizer: Tokenizer | None, text: str) -> int:
    """The id of a text that is exactly one token; ValueError otherwise, with the tokens that it is.

    Examples:
        >>> tokenizer.decode([to_single_token(tokenizer, " Rome")])
        'Rome'
    """
    known = _need(tokenizer)
    ids = known.encode(text, add_special_tokens=False)
    if len(ids) > 1 and text.startswith(" "):  # a tokenizer that puts a space before every text has one too many then
        bare = known.encode(text[1:], add_special_tokens=False)
        ids = bare if len(bare) == 1 and text_of(known, bare[0]) == text else ids
    if len(ids) != 1:
        pieces = [text_of(known, i) for i in ids]
        hint = ""
        if text and not text.startswith(" ") and len(known.encode(" " + text, add_special_tokens=False)) == 1:
            hint = f" {' ' + text!r}, with a space before it, is one."
        elif text.startswith(" ") and len(known.encode(text[1:], add_special_tokens=False)) == 1:
            hint = f" {text[1:]!r}, without the space before it, is one."
        raise ValueError(f"{text!r} is not one token but {len(ids)}: {pieces}.{hint}")
    if unknown_words(tokenizer, text):
        raise ValueError(f"{text!r} is not in the vocabulary of the model, which would read it as {known.unk_token!r}.")
    return int(ids[0])


def is_single_token(tokenizer: Tokenizer | None, text: str) -> bool:
    """Whether a text is exactly one token of the vocabulary."""
    try:
        to_single_token(tokenizer, text)
    except ValueError:
        return False
    return True


def unknown_words(tokenizer: Tokenizer | None, text: str) -> list[str]:
    """The parts of a text for which the tokenizer has no token but its unknown one, in order."""
    known = _need(tokenizer)
    unknown = getattr(known, "unk_token_id", None)
    ids = known.encode(text, add_special_tokens=False)
    if unknown is None or unknown not in ids or not getattr(known, "is_fast", False):
        return []
    spans = known(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    words = [text[start:stop].strip() for i, (start, stop) in zip(ids, spans, strict=True) if i == unknown]
    return [word for word in words if word and word != known.unk_token]


def str_tokens(tokenizer: Tokenizer | None, text_or_ids: PromptLike) -> list[str]:
    """The text of each token, of a text (with the special tokens that the tokenizer adds) or of ids `[T]` or `[1, T]`.

    A space that is part of a token is part of its text, also the first one's, which decoding drops with some tokenizers.

    Raises:
        ValueError: ids of another shape. TypeError: no tokenizer.

    Examples:
        >>> str_tokens(tokenizer, text)
        ['<s>', ' The', ' capital', ' of', ' Italy', ' is']
    """
    known = _need(tokenizer)
    ids = known.encode(text_or_ids) if isinstance(text_or_ids, str) else np.asarray(text_or_ids)
    ids = np.asarray(ids)
    ids = ids[0] if ids.ndim == 2 and ids.shape[0] == 1 else ids
    if ids.ndim != 1:
        raise ValueError(f"str_tokens takes one text or ids [T], and was given an array {list(ids.shape)}.")
    return [text_of(known, int(i)) for i in ids]


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token, with the space that is part of it.

    Llama 1's and 2's tokenizers drop the first space of what they decode, so the token is decoded twice over, and the second
    time is taken.
    """
    known: Any = tokenizer
    # Old tokenizers clean spaces before punctuation away, unless told not to.
    options = {"clean_up_tokenization_spaces": False} if hasattr(known, "clean_up_tokenization_spaces") else {}
    once, twice = (known.decode([int(token)] * n, **options) for n in (1, 2))
    return twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once


def continuation(tokenizer: Tokenizer | None, prompt: str, new: ArrayLike) -> str:
    """What new ids `[T]` add to a prompt: decoding all beyond decoding the prompt, as some tokenizers drop a text's first space."""
    known = _need(tokenizer)
    before = list(known.encode(prompt))
    whole = known.decode([*before, *np.asarray(new).tolist()], skip_special_tokens=True)
    return whole[len(known.decode(before, skip_special_tokens=True)) :]


def first_difference(tokenizer: Tokenizer | None, one: str | Sequence[int], other: str | Sequence[int]) -> int | None:
    """The first position at which two prompts' tokens differ; None where they are the same.

    Where one is the start of the other, that is the length of the shorter.

    Examples:
        >>> first_difference(tokenizer, text, "The capital of France is")
        4
    """
    known = _need(tokenizer)
    a, b = (known.encode(text) if isinstance(text, str) else list(map(int, text)) for text in (one, other))
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))
