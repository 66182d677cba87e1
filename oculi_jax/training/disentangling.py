"""RAVEL's score: whether a subspace holds one attribute of a thing, and none of its others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..intervals import Interval
from ..intervention import Subspace
from .aligning import interchange_accuracy
from .controls import shown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder

    Asked: TypeAlias = tuple[ArrayLike, ArrayLike, ArrayLike]

_DRAWS = 2000


@dataclass(frozen=True, repr=False)
class Disentanglement:
    """How well a subspace holds one attribute alone.

    Attributes:
        cause: `[M]`, of each pair that asks for the attribute, 1 where it is the source's now.
        isolate: of each other attribute `[M']`, 1 where the answer is still the base's.

    Examples:
        >>> found = Disentanglement(np.ones(4), {"language": np.array([1.0, 0.0, 1.0, 1.0])})
        >>> found.score, found.interval
        (0.875, 0.875 (0.625 to 1))
        >>> found
        Disentanglement(0.88: cause 1.00 (1.00 to 1.00) of 4; language kept 0.75 (0.25 to 1.00) of 4)
    """

    cause: Float[np.ndarray, "M"]
    isolate: Mapping[str, Float[np.ndarray, "N"]]

    @property
    def score(self) -> float:
        """The mean of how often the attribute moved, and of how often others stayed, which weigh alike among themselves."""
        return float((self.cause.mean() + np.mean([kept.mean() for kept in self.isolate.values()])) / 2)

    @property
    def interval(self) -> Interval:
        """The score with its interval: pairs are drawn anew, of each attribute its own."""
        rng = np.random.default_rng(0)

        def means(x: np.ndarray) -> Float[np.ndarray, "N"]:
            return x[rng.integers(0, len(x), (_DRAWS, len(x)))].mean(axis=1)

        drawn = (means(self.cause) + np.mean([means(kept) for kept in self.isolate.values()], axis=0)) / 2
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Interval(*(jnp.float32(x) for x in (self.score, low, high)))

    def __repr__(self) -> str:
        kept = "; ".join(f"{name} kept {shown(x)} of {len(x)}" for name, x in self.isolate.items())
        return f"Disentanglement({self.score:.2f}: cause {shown(self.cause)} of {len(self.cause)}; {kept})"


def disentanglement(
    model: Decoder,
    subspace: Subspace,
    cause: Asked,
    isolate: Mapping[str, Asked],
    *,
    source_position: int | None = None,
) -> Disentanglement:
    """RAVEL's score of a subspace (Huang et al. 2024, arXiv:2402.17700): it moves one attribute, and others stay.

    Prompts are of one length; of several lengths, ask for each by itself. A subspace that keeps others in mind is found by
    `align` on both sorts of pairs together, as RAVEL's multi-task form is: labels say what is wanted of each.

    Args:
        model: a model of any family.
        subspace: says where, as in `interchange_accuracy`.
        cause: base `[B, T]`, source `[B, S]` and labels `[B]`: prompts that ask for the attribute, and what the source's has.
        isolate: name of another attribute → base, source and labels: prompts that ask for that of the base thing, sources whose
            things are others, and what the base's has.
        source_position: in source prompts, where it is another than in the base's.

    Returns:
        A `Disentanglement`.

    Raises:
        ValueError, TypeError: no other attribute; what `interchange_accuracy` refuses.

    Examples:
        >>> capitals = tokenizer(["The capital of Italy is", "The capital of France is"])["input_ids"]
        >>> languages = tokenizer(["The language of Italy is", "The language of France is"])["input_ids"]
        >>> there = Subspace("resid_pre", 3, np.eye(192), 0.0, positions=-1)  # all that the last token holds
        >>> kept = tokenizer(" Italian French")["input_ids"][1:]
        >>> cause = capitals, capitals[::-1], [paris, rome]
        >>> disentanglement(model, there, cause, {"language": (languages, languages[::-1], kept)})
        Disentanglement(0.50: cause 1.00 (1.00 to 1.00) of 2; language kept 0.00 (0.00 to 0.00) of 2)
    """
    if not isolate:
        raise ValueError("isolate is empty: without another attribute nothing says that this one is held alone.")

    def hits(asked: Asked) -> Float[np.ndarray, "M"]:
        return interchange_accuracy(model, subspace, *asked, source_position=source_position)

    return Disentanglement(hits(cause), {name: hits(asked) for name, asked in isolate.items()})
