"""Arithmetic: “Q: How much is 27 plus 45? A: ”, and the same question of other numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import integer
from ..prompts import padded
from ..utils.tokens import unknown_words
from .pairs import PromptPairs

if TYPE_CHECKING:
    from ..utils.tokens import Tokenizer

_TEMPLATES = {"addition": "Q: How much is {a} plus {b}? A: ", "subtraction": "Q: How much is {a} minus {b}? A: "}
_TRIES = 200  # for each pair, to find one that is not there yet


def arithmetic(
    tokenizer: Tokenizer,
    n: int,
    *,
    operation: str = "addition",
    digits: int = 2,
    template: str | None = None,
    seed: int = 0,
) -> PromptPairs:
    """Pairs of prompts that ask for a sum or a difference of two numbers, as MIB's `arithmetic` does (arXiv:2504.13151).

    The corrupted prompt is of two other numbers, MIB's `random` counterfactual, so that its answer begins with another token: that
    first token is what `answers` and `others` hold, since tokenizers cut numbers. Both prompts of a pair have as many tokens.
    Differences are not negative.

    Args:
        tokenizer: of the model.
        n: how many pairs.
        operation: `"addition"` or `"subtraction"`.
        digits: of each number, the first of which is not 0.
        template: with `{a}` and `{b}`; MIB's for None.
        seed: of the draw.

    Returns:
        `PromptPairs`, padded on the right; the same for the same arguments.

    Raises:
        ValueError: no such operation; a tokenizer that does not know the digits, or that joins the answer to the prompt's last
            token; there are not so many different prompts.

    Examples:
        >>> arithmetic(tokenizer, 4)  # of a model that can count
        Traceback (most recent call last):
        ValueError: This tokenizer does not know '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'.
    """
    n, digits = integer(n, "n", 1), integer(digits, "digits", 1, 9)
    rng = np.random.default_rng(seed)
    if operation not in _TEMPLATES:
        raise ValueError(f"operation is {operation!r}, and must be {' or '.join(map(repr, _TEMPLATES))}.")
    asked = _TEMPLATES[operation] if template is None else template
    if missing := [name for name in ("{a}", "{b}") if name not in asked]:
        raise ValueError(f"The template {asked!r} has no {missing[0]}.")
    if unknown := [digit for digit in "0123456789" if unknown_words(tokenizer, digit)]:
        raise ValueError(f"This tokenizer does not know {', '.join(map(repr, unknown))}.")
    low, high = 10 ** (digits - 1), 10**digits

    def drawn() -> tuple[str, Sequence[int], int]:
        """A prompt, its ids and the first token of its answer."""
        a, b = (int(x) for x in rng.integers(low, high, 2))
        if operation == "subtraction":
            a, b = max(a, b), min(a, b)
        text = asked.format(a=a, b=b)
        ids, whole = (tokenizer.encode(x) for x in (text, f"{text}{a + b if operation == 'addition' else a - b}"))
        if whole[: len(ids)] != ids:
            raise ValueError(
                f"This tokenizer joins the end of {text!r} and the answer: give a template that ends in another way."
            )
        return text, ids, whole[len(ids)]

    found: dict[str, tuple[str, int, int]] = {}
    for _ in range(_TRIES * n):
        if len(found) == n:
            break
        (text, ids, answer), (other, others, wrong) = drawn(), drawn()
        if answer != wrong and len(ids) == len(others):
            found.setdefault(text, (other, answer, wrong))
    if len(found) < n:
        raise ValueError(
            f"n is {n}, and only {len(found)} different prompts were found: ask for fewer, or for more digits."
        )
    corrupted, *ids = zip(*found.values(), strict=True)
    clean, mask = padded(tuple(found), tokenizer)
    spoilt, _ = padded(corrupted, tokenizer)
    return PromptPairs(tuple(found), tuple(corrupted), clean, spoilt, mask, *(np.array(x, np.int32) for x in ids))
