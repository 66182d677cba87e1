"""Prompts as users give them, checked: ids `[T]` or `[B, T]` of the functions; text, lists and arrays of the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from .arrays import AnyArray, as_array, integer, listing, on_device

if TYPE_CHECKING:
    from .models.decoder.config import DecoderConfig
    from .utils.tokens import Tokenizer


NAMES = ("tokens", "mask")


def check_tokens(tokens: ArrayLike, vocab_size: int, name: str = "tokens") -> AnyArray:
    """Ids `[T]` as int32, checked by value where the host can see them; `name` is what they were given as."""
    if isinstance(tokens, str):
        raise TypeError(
            f"{name} is text, and ids [T] are needed: encode it with the tokenizer, or give it to the adapter."
        )
    array = ids_of(tokens, name)
    if array.ndim != 1:
        hint = " Map forward over a batch with jax.vmap." if array.ndim == 2 else ""
        hint = f" It is one prompt with an axis for a batch: give {name}[0]." if array.shape[:-1] == (1,) else hint
        raise ValueError(f"{name} has shape {listing(array.shape)}, and one sequence [T] is needed.{hint}")
    if array.shape[0] == 0:
        raise ValueError(f"The prompt is empty: {name} has shape [0], and at least one token is needed.")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {array.dtype}, and integers are needed.")
    if on_device(array):
        return jax.lax.convert_element_type(array, np.int32)
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if wrong.size:
        raise ValueError(
            f"{name}[{wrong[0]}] is {array[wrong[0]]}, and this model's vocabulary has ids 0 to {vocab_size - 1}."
        )
    return array.astype(np.int32)


def ids_of(tokens: object, name: str = "tokens") -> Any:
    """An array of ids; TypeError or ValueError for a tokenizer's whole answer, and for rows of unequal lengths."""
    if isinstance(tokens, Mapping):
        if "input_ids" in tokens:
            raise TypeError(f'{name} is a dictionary, as a tokenizer returns it; give its ids: {name}["input_ids"].')
        raise TypeError(
            f"{name} is a dictionary with {', '.join(map(str, tokens)) or 'nothing in it'}, and ids are needed."
        )
    if not isinstance(tokens, str) and is_text(tokens):
        raise TypeError(f"{name} holds texts, and ids are needed: {name}, mask = oculi_jax.padded(texts, tokenizer).")
    if isinstance(tokens, list | tuple) and len({np.size(row) for row in tokens if np.ndim(row) == 1}) > 1:
        raise ValueError(
            f"{name} holds prompts of unequal lengths. Make one array of them, and a mask: {name}, mask = oculi_jax.padded(rows)."
        )
    return as_array(tokens)


def padded(
    rows: Sequence[str] | Sequence[Sequence[int]] | Sequence[np.ndarray],
    tokenizer: Tokenizer | None = None,
    *,
    length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal lengths as one array, padded on the right, and which of its tokens are real.

    Args:
        rows: texts, or lists of ids.
        tokenizer: for texts, which get the special tokens that it adds; its pad id is what padding is, else 0.
        length: how long to make them; the longest row's length for None.

    Returns:
        `tokens` int32 `[B, T]` and `mask` bool `[B, T]`, True at real tokens.

    Raises:
        ValueError: no rows, an empty one, or a `length` shorter than the longest. TypeError: texts without a tokenizer.

    Examples:
        >>> tokens, mask = padded([text, "Rome"], tokenizer)
        >>> tokens.shape, mask.sum(axis=1)
        ((2, 6), array([6, 2]))
    """
    if len(rows) == 0:
        raise ValueError("rows is empty: at least one prompt is needed.")
    found, _ = _rows([rows] if isinstance(rows, str) else rows, tokenizer, None)
    lengths = [len(row) for row in found]
    if min(lengths) == 0:
        raise ValueError("rows holds an empty prompt: at least one token is needed in each.")
    longest = max(lengths)
    length = (
        longest
        if length is None
        else integer(length, "length", longest, note=f": the longest row has {longest} tokens")
    )
    pad = getattr(tokenizer, "pad_token_id", None)
    tokens = np.full((len(found), length), 0 if pad is None else pad, np.int32)
    for row, ids in zip(tokens, found, strict=True):
        row[: len(ids)] = ids
    return tokens, np.arange(length)[None, :] < np.array(lengths)[:, None]


def warn_of_padding(tokens: np.ndarray, pad: int | None, name: str) -> None:
    """Says where rows of a batch that came without a mask begin or end with the pad id, and so may hold padding as text."""
    if pad is None or tokens.ndim != 2:
        return
    rows = np.flatnonzero((tokens[:, 0] == pad) | (tokens[:, -1] == pad))
    if rows.size:
        warnings.warn(
            f"Prompt {rows[0]} begins or ends with token {pad}, the pad id, and every token is taken for text: no {name} was "
            f"given. Where it is padding, give {name}, True at real tokens; where it is text, give {name} all True.",
            stacklevel=3,
        )


def check_mask(mask: ArrayLike | None, n_tokens: int, names: tuple[str, str] = NAMES) -> AnyArray | None:
    """bool `[T]`, or None; checked by value where the host can see it. `names` are what tokens and mask were given as."""
    name = names[1]
    if mask is None:
        return None
    array = as_array(mask)
    if array.shape != (n_tokens,):
        raise ValueError(f"{name} has shape {listing(array.shape)}, and {names[0]} [{n_tokens}].")
    if array.dtype != bool:
        raise TypeError(f"{name} has dtype {array.dtype}, and bool is needed: True at real tokens.")
    if not on_device(array) and not array.any():
        raise ValueError(f"{name} is False everywhere: there is no real token.")
    return array


def check_prompts(
    config: DecoderConfig, tokens: ArrayLike, mask: ArrayLike | None, names: tuple[str, str] = NAMES
) -> tuple[AnyArray, AnyArray | None, bool]:
    """Ids `[B, T]`, mask `[B, T]` or None, and whether one prompt `[T]` was given; `names` are what the two were given as."""
    name = names[0]
    given = tokens if isinstance(tokens, str) else ids_of(tokens, name)
    if not isinstance(given, str) and given.ndim > 2:
        hint = " padded returns two things, tokens and mask: give each by itself." if isinstance(tokens, tuple) else ""
        raise ValueError(f"{name} has shape {listing(given.shape)}, and ids [B, T] are needed.{hint}")
    if isinstance(given, str) or given.ndim != 2:
        tokens = check_tokens(tokens, config.vocab_size, name)[None]
        mask = check_mask(mask, tokens.shape[1], names)
        return tokens, None if mask is None else mask[None], True
    if not len(given):
        raise ValueError(f"{name} has shape [0, T]: there is no prompt.")
    rows = [check_tokens(row, config.vocab_size, name) for row in given]
    xp = jnp if any(map(on_device, rows)) else np
    if mask is not None:
        masks = as_array(mask)
        if masks.shape != given.shape:
            raise ValueError(f"{names[1]} has shape {listing(masks.shape)}, and {name} {listing(given.shape)}.")
        for row in masks:
            check_mask(row, given.shape[1], names)
        return xp.stack(rows), masks, False
    if xp is np:
        warn_of_padding(np.stack(rows), config.pad_token_id, names[1])
    return xp.stack(rows), None, False


# What an adapter takes: a text or several; ids `[T]` or `[B, T]`; lists of ids of unequal lengths; a chat's messages.
PromptLike: TypeAlias = str | Sequence[str] | ArrayLike | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Prompts:
    """A batch, padded on the right to a length that near lengths share.

    Attributes:
        tokens: int32 `[B, P]`, `P ≥ T`.
        mask: bool `[B, P]`, True at real tokens.
        n_tokens: `T`, what the user sees.
        single: whether one prompt was given, so that results have no batch axis.
    """

    tokens: np.ndarray
    mask: np.ndarray
    n_tokens: int
    single: bool


def bucket(n_tokens: int) -> int:
    """The padded length: the next of 1 to 8, 10, 12, 14, 16, 20, 24, …: four an octave, so at most a quarter is waste."""
    if n_tokens <= 8:
        return n_tokens
    step = 1 << ((n_tokens - 1).bit_length() - 3)
    return -(-n_tokens // step) * step


def prepare(
    prompt: PromptLike,
    tokenizer: Tokenizer | None,
    config: DecoderConfig,
    *,
    attention_mask: ArrayLike | None,
    allow_longer: bool,
    n_new: int = 0,
    exact: bool = False,
) -> Prompts:
    """Reads a prompt or a batch of prompts.

    Args:
        prompt: a text or a list of texts; or ids `[T]` or `[B, T]` as a list, a NumPy, JAX or torch array. Lists of
            unequal length are padded on the right.
        tokenizer: for texts; may be None otherwise.
        config: the model's.
        attention_mask: `[T]` or `[B, T]`, 1 or True at real tokens; only with ids.
        allow_longer: go beyond the length that the model was made for.
        n_new: how many tokens will be generated, which count towards that length.
        exact: no padding beyond the longest prompt, where nothing is compiled for a length.
    """
    rows, mask = _rows(prompt, tokenizer, attention_mask)
    together = len({len(row) for row in rows}) == 1 and (len(rows) > 1 or getattr(prompt, "ndim", 1) == 2)
    if attention_mask is None and together and not is_text(prompt):
        pad = getattr(tokenizer, "pad_token_id", None)
        warn_of_padding(np.stack(rows), config.pad_token_id if pad is None else pad, "attention_mask")
    lengths = [len(row) for row in rows]
    n_tokens = max(lengths, default=0)
    if not rows or min(lengths) == 0:
        raise ValueError("The prompt is empty: at least one token is needed.")
    tokens = np.zeros((len(rows), n_tokens if exact else bucket(n_tokens)), np.int32)
    real = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        wrong = np.flatnonzero((row < 0) | (row >= config.vocab_size))
        if wrong.size:
            raise ValueError(
                f"Token {wrong[0]} of prompt {i} is {row[wrong[0]]}, and this model's vocabulary has ids 0 to "
                f"{config.vocab_size - 1}."
            )
        tokens[i, : len(row)] = row
        real[i, : len(row)] = True if mask is None else mask[i]
    if not real.any(axis=1).all():
        raise ValueError(f"attention_mask is 0 everywhere in prompt {int(np.argmin(real.any(axis=1)))}.")
    longest, limit = int(real.sum(axis=1).max()), config.limit
    if limit is not None and longest + n_new > limit and not allow_longer:
        more = f" and {n_new} are to be generated" if n_new else ""
        raise ValueError(
            f"The prompt has {longest} tokens{more}, and this model was made for at most {limit} (max_position_embeddings). "
            "Shorten it, or pass allow_longer=True to see what it does beyond."
        )
    return Prompts(tokens, real, n_tokens, single=len(rows) == 1)


def is_text(prompt: object) -> TypeGuard[str | Sequence[str]]:
    """Whether a prompt is a text or a list of texts, rather than ids."""
    return isinstance(prompt, str) or (
        isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(text, str) for text in prompt)
    )


def is_chat(prompt: object) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether a prompt is messages of a chat: dictionaries with `role` and `content`."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in prompt)
    )


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> np.ndarray:
    """The ids of a chat by the tokenizer's own template, up to where the assistant is to speak."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("These are messages of a chat, and this tokenizer has no chat template: give text, or ids.")
    speaks = messages[-1]["role"] != "assistant"
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=speaks, return_dict=False)
    return np.asarray(ids, np.int64).reshape(-1)


def _rows(prompt: Any, tokenizer: Any, attention_mask: Any) -> tuple[list[np.ndarray], np.ndarray | None]:
    if isinstance(prompt, Mapping):
        raise TypeError("The prompt is a dictionary; give its input_ids, and its attention_mask by that name.")
    if is_chat(prompt):
        return [_chat(prompt, tokenizer)], None
    texts = [prompt] if isinstance(prompt, str) else prompt
    if is_text(texts):
        if attention_mask is not None:
            raise ValueError("attention_mask goes with ids; texts are padded, and masked, for you.")
        if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
            raise TypeError("This adapter has no tokenizer, so it takes ids, not text.")
        return [np.asarray(tokenizer.encode(text), np.int64).reshape(-1) for text in texts], None
    if (
        isinstance(prompt, list | tuple)
        and prompt
        and all(np.ndim(row) == 1 for row in prompt if not isinstance(row, str))
    ):
        if attention_mask is None:
            return [_integers(row) for row in prompt], None
        if len({len(row) for row in prompt}) > 1:
            raise ValueError("attention_mask was given with lists of unequal length; pad them, or leave it out.")
    ids = _integers(prompt)
    if ids.ndim not in (1, 2):
        raise ValueError(f"The prompt has shape {list(ids.shape)}, and ids [T] or [B, T] are needed.")
    mask = None
    if attention_mask is not None:
        given = _host(attention_mask)
        if given.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {list(given.shape)}, and the ids {list(ids.shape)}.")
        if not np.isin(given, (0, 1)).all():
            raise ValueError("attention_mask must be 1 (or True) at real tokens and 0 at padding.")
        mask = np.atleast_2d(given.astype(bool))
    return list(np.atleast_2d(ids)), mask


def _host(array: Any) -> np.ndarray:
    """A NumPy array from any library's; torch tensors may be on a device and need gradients."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    return np.asarray(array)


def _integers(values: Any | Sequence[int]) -> np.ndarray:
    ids = _host(values)
    if ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"The prompt's ids have dtype {ids.dtype}, and integers (or text) are needed.")
    return ids.astype(np.int64)
