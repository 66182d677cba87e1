"""`PromptPairs`: what a task makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Bool, Int32

from ..metrics import logit_difference

if TYPE_CHECKING:
    from ..metrics import LogitDifference


@dataclass(frozen=True, eq=False, repr=False)
class PromptPairs:
    """Prompts, each beside one that differs in what the answer hangs on, token by token.

    Attributes:
        texts, corrupted_texts: of the B prompts.
        clean, corrupted: their ids `[B, T]`, int32, padded on the right.
        mask: bool `[B, T]`, True at real tokens, of both prompts of a pair.
        answers, others: ids `[B]`: what the clean prompt is answered with, and the corrupted one.

    Examples:
        >>> pairs = indirect_object(tokenizer, 6, names=("Mary", "John", "Anna"), places=("park",), objects=("key",))
        >>> pairs, len(pairs[:4]), pairs.clean.shape == pairs.mask.shape
        (PromptPairs(6 pairs of 19 tokens), 4, True)
        >>> difference = pairs.metric  # the logit of each answer over the other
    """

    texts: tuple[str, ...]
    corrupted_texts: tuple[str, ...]
    clean: Int32[np.ndarray, "B T"]
    corrupted: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    answers: Int32[np.ndarray, "B"]
    others: Int32[np.ndarray, "B"]

    @property
    def metric(self) -> LogitDifference:
        """`logit_difference(answers, others)` of the last token: positive where a prompt has its answer."""
        return logit_difference(self.answers, self.others)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, some: slice) -> Self:
        """Some of the pairs, to score on those and to judge on others."""
        if not isinstance(some, slice):
            raise TypeError(f"PromptPairs are cut by a slice, such as pairs[:40], and {some!r} was given.")
        return type(self)(*(x[some] for x in vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} pairs of {self.clean.shape[1]} tokens)"
