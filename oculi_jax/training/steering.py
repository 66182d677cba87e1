"""Steering: a direction from two sets of prompts, to be added to the stream.

Rimsky et al. (2023), "Steering Llama 2 via Contrastive Activation Addition", arXiv:2312.06681; as a detector, Wu et al. (2025),
"AxBench", arXiv:2501.17148.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from .directions import Direction, Places, Sample, judged

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.model import Decoder


def difference_of_means(
    model: Decoder,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    layers: Places = None,
    site: str = "resid_pre",
    positions: Places = -1,
    held_out: float = 0.25,
    key: Array,
    positive_mask: ArrayLike | None = None,
    negative_mask: ArrayLike | None = None,
    controls: bool = True,
) -> Direction:
    """The mean of what positive prompts have at a site, less that of negative ones: a direction to steer by, and to detect with.

    It is made of some of the prompts, and judged on the others: whether it tells these apart, which is what its AUROC says, and
    no more than that. What it does to the model is a run under `.steer(scale)`. All layers and positions are read in one run of
    each prompt. Host function.

    Args:
        model: a model of any family.
        positive, negative: ids `[P, T]` and `[N, S]`, four prompts of each at least.
        layers: one, several, or None for all.
        site: a site of the layers with one row of features for each token, such as `resid_pre` or `mlp_out`.
        positions: at which token, or at which ones, counted among the real ones, negative from the last; None for the mean over
            all real tokens.
        held_out: the share of each kind, drawn by the key, that is kept for judging.
        key: a JAX random key: of what is held out, and of the controls.
        positive_mask, negative_mask: bool as the ids, True at real tokens.
        controls: whether to run them; without, nothing says what chance would give.

    Returns:
        A `Direction`, of the length that the difference has.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `forward` refuses.

    Examples:
        >>> italian = [tokenizer.encode(f"{x} of Italy") for x in ("The capital", "The currency", "The language", "The flag")]
        >>> french = [tokenizer.encode(f"{x} of France") for x in ("The capital", "The currency", "The language", "The flag")]
        >>> to_paris = difference_of_means(model, french, italian, layers=1, key=jax.random.key(0))
        >>> says(forward(model, ids, to_paris.steer(positions=4)))  # at Italy
        'Paris'
    """
    sample = Sample.of(model, positive, negative, (positive_mask, negative_mask), site, layers, positions)
    return judged(sample, _difference, held_out, key, controls)


def _difference(
    values: Float[np.ndarray, "N P n"], labels: Bool[np.ndarray, "K N"]
) -> tuple[Float[np.ndarray, "K P n"], Float[np.ndarray, "K P"]]:
    """Halfway between the two means the score is 0."""
    n_positive = labels.sum(axis=1, keepdims=True)
    means = [
        np.einsum("kn,npd->kpd", own / count, values)
        for own, count in ((labels, n_positive), (~labels, labels.shape[1] - n_positive))
    ]
    vector = means[0] - means[1]
    return vector, -np.einsum("kpd,kpd->kp", vector, (means[0] + means[1]) / 2)
