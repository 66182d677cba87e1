"""Indirect objects: “When Mary and John went to the store, John gave a drink to”, and who gave it the other time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import integer
from ..prompts import padded
from ..utils.tokens import is_single_token, to_single_token
from .pairs import PromptPairs

if TYPE_CHECKING:
    from ..utils.tokens import Tokenizer

# What MIB makes its prompts of (Mueller et al. 2025, arXiv:2504.13151).
_MIB = json.loads(files("oculi_jax.tasks").joinpath("ioi.json").read_text(encoding="utf-8"))
_TRIES = 100  # for each pair, to find one that is not there yet


def indirect_object(
    tokenizer: Tokenizer,
    n: int,
    *,
    seed: int = 0,
    templates: Sequence[str] = _MIB["templates"],
    names: Sequence[str] = _MIB["names"],
    places: Sequence[str] = _MIB["places"],
    objects: Sequence[str] = _MIB["objects"],
) -> PromptPairs:
    """Pairs of prompts that ask for an indirect object (Wang et al. 2022, arXiv:2211.00593), from MIB's templates.

    Two people are named and one of them gives: the answer is the other one. In the corrupted prompt the other one gives, so
    that the answer is the first: MIB's `s2_io_flip`. Which of the two is named first is drawn too, and no prompt comes twice.
    Names that are not a single token after a space are not drawn, so that the two prompts of a pair differ in one token alone.

    Args:
        tokenizer: of the model.
        n: how many pairs.
        seed: of the draw.
        templates: with `{name_A}`, `{name_B}`, `{name_C}`, who gives, and perhaps `{place}` and `{object}`.
        names, places, objects: what is put there; all four are MIB's where they are not given.

    Returns:
        `PromptPairs`, padded on the right; the same for the same arguments.

    Raises:
        ValueError: fewer than two of the names are single tokens; there are not so many different prompts; a template that
            cannot be filled.

    Examples:
        >>> pairs = indirect_object(tokenizer, 4, names=("Mary", "John", "Anna"), places=("park",), objects=("key",))
        >>> print(pairs.texts[0], pairs.corrupted_texts[0].split(", ")[1], sep=" | ")
        When Anna and John were about to leave the park, John gave a key to | Anna gave a key to
    """
    n, rng = integer(n, "n", 1), np.random.default_rng(seed)

    def one_of(things: Sequence[str]) -> str:
        return things[int(rng.integers(len(things)))]

    names = _single(tokenizer, names)
    found: dict[str, tuple[str, str, str]] = {}
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        template = one_of(templates)
        one, two = (names[i] for i in rng.choice(len(names), 2, replace=False))
        giver, other = (one, two) if rng.integers(2) else (two, one)
        words = {"place": one_of(places), "object": one_of(objects)}
        text, corrupted = (_filled(template, name_A=one, name_B=two, name_C=who, **words) for who in (giver, other))
        found.setdefault(text, (corrupted, other, giver))
    if len(found) < n:
        raise ValueError(
            f"n is {n}, and only {len(found)} different prompts were found of {len(templates)} templates, {len(names)} names, "
            f"{len(places)} places and {len(objects)} objects: ask for fewer, or give more of these."
        )
    corrupted, others, givers = zip(*found.values(), strict=True)
    tokens, mask = padded(tuple(found), tokenizer)
    changed, _ = padded(corrupted, tokenizer)
    ids = (np.array([to_single_token(tokenizer, f" {name}") for name in row], np.int32) for row in (others, givers))
    return PromptPairs(tuple(found), corrupted, tokens, changed, mask, *ids)


def _single(tokenizer: Tokenizer, names: Sequence[str]) -> list[str]:
    """The names that are one token after a space."""
    found = [name for name in dict.fromkeys(names) if is_single_token(tokenizer, f" {name}")]
    if len(found) < 2:
        raise ValueError(
            f"Of {len(names)} names {len(found)} are a single token of this tokenizer, and two are needed: give names of its own."
        )
    return found


def _filled(template: str, **words: str) -> str:
    missing = [name for name in ("name_A", "name_B", "name_C") if f"{{{name}}}" not in template]
    if missing:
        raise ValueError(f"The template {template!r} has no {{{missing[0]}}}.")
    try:
        return template.format(**words)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"The template {template!r} cannot be filled with {', '.join(words)}: {error}.") from None
