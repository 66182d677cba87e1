"""Multiple choice: “The lemon is yellow. What color is the lemon? A. red B. yellow …”, and the letter of what was just said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32

from ..arrays import integer
from ..prompts import padded
from ..utils.tokens import is_single_token, to_single_token
from .pairs import PromptPairs

if TYPE_CHECKING:
    from ..utils.tokens import Tokenizer

_THINGS = json.loads(files("oculi_jax.tasks").joinpath("choices.json").read_text(encoding="utf-8"))["things"]
_COUNTERFACTUALS = ("position", "letters", "both")
_TRIES = 100  # for each pair, to find one that is not there yet


@dataclass(frozen=True, eq=False, repr=False)
class ChoicePairs(PromptPairs):
    """`PromptPairs` of a multiple choice: what is pointed at, and the letter that stands there, are two variables.

    Attributes:
        pointed: ids `[B]`: the clean prompt's letter at the place where the corrupted prompt has the right choice. That is the
            clean prompt's answer with the other's pointer; with the other's letter, its answer is that of `others`.

    Examples:
        >>> few = dict(things=(("key", "small"), ("map", "new"), ("hat", "old")), letters=("one", "two", "three", "four"))
        >>> pairs = multiple_choice(tokenizer, 4, n_choices=2, counterfactual="letters", **few)
        >>> difference = pairs.metric  # as of any pairs
        >>> (pairs.pointed == pairs.answers).all().item(), (pairs.others == pairs.answers).any().item()
        (True, False)
    """

    pointed: Int32[np.ndarray, "B"]


def multiple_choice(
    tokenizer: Tokenizer,
    n: int,
    *,
    counterfactual: str = "position",
    n_choices: int = 4,
    seed: int = 0,
    template: str = "The {object} is {color}. What color is the {object}?",
    things: Sequence[Sequence[str]] = _THINGS,
    letters: Sequence[str] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
) -> ChoicePairs:
    """Pairs of prompts that ask for the letter of a color that they name, as MIB's `copycolors_mcqa` (arXiv:2504.13151) does.

    What is right is said in the prompt (Wiegreffe et al. 2024, arXiv:2407.15018): all that is asked is to find it among the choices
    and to say its letter. A clean prompt has the first letters in order.

    Args:
        tokenizer: of the model.
        n: how many pairs.
        counterfactual: what differs in the corrupted prompt: `"position"`, the right choice and another one change places;
            `"letters"`, the choices have other letters; or `"both"`.
        n_choices: among how many colors.
        seed: of the draw.
        template: with `{object}` and `{color}`; the choices follow, a line each, and `Answer:`.
        things: objects and their colors.
        letters: those that are a single token after a space are used; twice as many as choices at least, where letters differ.

    Returns:
        `ChoicePairs`, padded on the right; the same for the same arguments.

    Raises:
        ValueError: too few letters or colors; there are not so many different prompts.

    Examples:
        >>> few = dict(things=(("key", "small"), ("map", "new"), ("hat", "old")), letters=("one", "two"))
        >>> pairs = multiple_choice(tokenizer, 2, n_choices=2, **few)
        >>> pairs.texts[0].splitlines(), pairs.corrupted_texts[0].splitlines()[1:3]
        (['The hat is old. What color is the hat?', 'one. old', 'two. new', 'Answer:'], ['one. new', 'two. old'])
    """
    n, n_choices = integer(n, "n", 1), integer(n_choices, "n_choices", 2)
    rng = np.random.default_rng(seed)
    if counterfactual not in _COUNTERFACTUALS:
        raise ValueError(
            f"counterfactual is {counterfactual!r}, and must be one of {', '.join(map(repr, _COUNTERFACTUALS))}."
        )
    if missing := [name for name in ("{object}", "{color}") if name not in template]:
        raise ValueError(f"The template {template!r} has no {missing[0]}.")
    known = [letter for letter in letters if is_single_token(tokenizer, f" {letter}")]
    needed = n_choices * (1 if counterfactual == "position" else 2)
    if len(known) < needed:
        raise ValueError(f"Of the letters {len(known)} are a single token of this tokenizer, and {needed} are needed.")
    colors = sorted({color for _, color in things})
    if len(colors) < n_choices:
        raise ValueError(f"things have {len(colors)} colors, and {n_choices} choices need as many.")
    found: dict[str, tuple[str, str, str, str]] = {}
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        thing, color = things[int(rng.integers(len(things)))]
        choices = [color, *rng.permutation([x for x in colors if x != color])[: n_choices - 1]]
        place, other = rng.permutation(n_choices)[:2]
        choices[0], choices[place] = choices[place], choices[0]
        own, theirs, changed = list(known[:n_choices]), list(known[:n_choices]), list(choices)
        if counterfactual != "position":
            theirs = list(rng.permutation(known[n_choices:])[:n_choices])
        if counterfactual != "letters":
            changed[place], changed[other] = changed[other], changed[place]
        there = place if counterfactual == "letters" else other
        asked = template.format(object=thing, color=color)
        text, corrupted = _asked(asked, own, choices), _asked(asked, theirs, changed)
        found.setdefault(text, (corrupted, own[place], theirs[there], own[there]))
    if len(found) < n:
        raise ValueError(
            f"n is {n}, and only {len(found)} different prompts were found: ask for fewer, or give more things."
        )
    corrupted_texts, *names = zip(*found.values(), strict=True)
    clean, mask = padded(tuple(found), tokenizer)
    spoilt, _ = padded(corrupted_texts, tokenizer)
    ids = (np.array([to_single_token(tokenizer, f" {name}") for name in row], np.int32) for row in names)
    return ChoicePairs(tuple(found), tuple(corrupted_texts), clean, spoilt, mask, *ids)


def _asked(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, *lines, "Answer:"])
