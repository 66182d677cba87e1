"""`DecodeOptions`: what every `generate` takes besides its prompt, its length and its interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax import Array
    from numpy.typing import ArrayLike

    from ..capture import CaptureLike


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How tokens are chosen, where a text ends and what is returned beside it. Meanings as in `oculi_jax.generate`.

    `attention_mask` is that of Hugging Face's `generate`: 1 at real tokens of the ids, of which a model's or an adapter's
    may be a batch.
    """

    temperature: ArrayLike = 0.0
    top_k: int | None = None
    top_p: ArrayLike | None = None
    min_p: ArrayLike | None = None
    stop_tokens: int | Sequence[int] | None = None
    key: Array | None = None
    capture: CaptureLike = ()
    allow_longer: bool = False
    attention_mask: ArrayLike | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> DecodeOptions:
        """Of keyword arguments; TypeError for a name that is none."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            hint = " Tokens are drawn where temperature is above 0." if "do_sample" in unknown else ""
            raise TypeError(f"generate has no option {', '.join(unknown)}; there are {', '.join(known)}.{hint}")
        return cls(**given)
