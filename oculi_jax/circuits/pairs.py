"""Pairs of clean and corrupted prompts, checked, and in calls of prompts that run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from ..arrays import AnyArray, listing, under_trace
from ..backends import check_model, programs_of
from ..buckets import Bucket, Window, buckets_of, columns_of_a_program, weights_of, whole
from ..metrics import check_metric
from ..prompts import bucket as rung
from ..prompts import check_prompts
from ..pytrees import pytree

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder


class Pairs(NamedTuple):
    """Pairs of prompts and what is asked of them, checked.

    Attributes:
        clean, corrupted: ids `[B, T]`.
        mask, corrupted_mask: bool `[B, T]`, or both None.
        single: whether one pair was given.
        metric: as a pytree; None where nothing is measured.
        leads: for each of its leaves, whether it leads with the pairs.
    """

    clean: AnyArray
    corrupted: AnyArray
    mask: AnyArray | None
    corrupted_mask: AnyArray | None
    single: bool
    metric: Any
    leads: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        model: Decoder,
        clean: ArrayLike,
        corrupted: ArrayLike,
        metric: MetricLike | None,
        mask: ArrayLike | None,
        corrupted_mask: ArrayLike | None,
    ) -> Pairs:
        """Raises ValueError or TypeError for what can be seen to be wrong."""
        config = check_model(model)
        clean, real, single = check_prompts(config, clean, mask, ("clean", "mask"))
        given = mask if corrupted_mask is None else corrupted_mask
        names = "corrupted", "mask" if corrupted_mask is None else "corrupted_mask"
        corrupted, _, other = check_prompts(
            config, corrupted, None if given is None else np.ones(np.shape(corrupted), bool), names
        )
        if (single, clean.shape) != (other, corrupted.shape):
            shapes = (listing(x.shape[int(alone) :]) for x, alone in ((clean, single), (corrupted, other)))
            raise ValueError(
                "clean has shape {}, and corrupted {}: what is written at each token takes the place of what is written at the "
                "one in its place, so they must have one shape. Choose prompts of as many tokens.".format(*shapes)
            )
        rows = corrupted[0] if other else corrupted
        other_real = None if given is None else check_prompts(config, rows, given, names)[1]
        if real is None and other_real is not None:
            real = np.ones(clean.shape, bool)
        checked: Any = (None, ())
        if metric is not None:
            check_metric(metric, config.vocab_size, corrupted, other_real)
            checked = check_metric(metric, config.vocab_size, clean, real)
        return cls(clean, corrupted, real, other_real, single, *checked)

    def some(self, rows: Int[np.ndarray, "N"]) -> Pairs:
        """Those of some numbers."""
        leaves, tree = jax.tree.flatten(self.metric)
        metric = [x[rows] if lead else x for x, lead in zip(leaves, self.leads, strict=True)]
        mask, other = (None if x is None else x[rows] for x in (self.mask, self.corrupted_mask))
        kept = jax.tree.unflatten(tree, metric)
        return Pairs(self.clean[rows], self.corrupted[rows], mask, other, False, kept, self.leads)

    def calls(self, model: Decoder, bytes_of_prompt: Callable[[int], int], budget: int) -> Iterator[Chunk]:
        """The pairs in calls: of near lengths where masks tell them, of as many as fit into `budget`.

        Args:
            bytes_of_prompt: how many bytes a prompt of so many columns holds.
        """
        n_prompts, n_tokens = self.clean.shape
        if self.mask is None or self.single or under_trace((model, *self)):
            buckets = [whole(n_prompts, n_tokens)]
        else:
            platform, _ = programs_of(model).room(model)
            work = 2 * 4 * model.config.num_hidden_layers * sum(weights_of(model.config.sizes))
            real = np.asarray(self.mask) | np.asarray(self.corrupted_mask)
            buckets = buckets_of(real, columns_of_a_program(platform, work))
        for bucket in buckets:
            n = len(bucket.prompts)
            most = max(1, budget // max(1, bytes_of_prompt(bucket.n_tokens)))
            n_calls = -(-n // most)
            size = min(most, rung(-(-n // n_calls))) if n_calls > 1 or len(buckets) > 1 else n
            for begin in range(0, n, size):
                yield Chunk(bucket, np.arange(begin, min(begin + size, n)), size)

    def of_call(self, chunk: Chunk) -> Batch:
        """What a call is given."""
        bucket, n_tokens = chunk.bucket, self.clean.shape[1]
        all_in_order = np.array_equal(chunk.prompts, np.arange(len(self.clean)))
        if all_in_order and chunk.size == len(self.clean) and bucket.n_tokens == n_tokens:
            count = np.ones(chunk.size, np.float32)
            return Batch(self.clean, self.corrupted, self.mask, self.corrupted_mask, None, self.metric, count)
        places = np.minimum(np.arange(chunk.size) + chunk.places[0], chunk.places[-1])
        own = bucket.of(places)
        leaves, tree = jax.tree.flatten(self.metric)
        metric = [x[own.prompts] if lead else x for x, lead in zip(leaves, self.leads, strict=True)]
        window, masks = None, (None, None)
        clean, corrupted = self.clean[own.prompts], self.corrupted[own.prompts]
        if self.mask is not None:
            clean, corrupted = own.cut(np.asarray(self.clean)), own.cut(np.asarray(self.corrupted))
            masks = own.cut(np.asarray(self.mask)), own.cut(np.asarray(self.corrupted_mask))
            window = Window(own.first, np.asarray(self.mask)[own.prompts], n_tokens)
        count = (np.arange(chunk.size) < len(chunk.places)).astype(np.float32)
        return Batch(clean, corrupted, *masks, window, jax.tree.unflatten(tree, metric), count)


class Chunk(NamedTuple):
    """Pairs that run in one call: their places in a bucket, and for how many the program has room."""

    bucket: Bucket
    places: np.ndarray
    size: int

    @property
    def prompts(self) -> np.ndarray:
        """Their numbers in the set."""
        return self.bucket.prompts[self.places]


@pytree
class Batch:
    """What a call is given: `C` pairs, and how often each counts, which is not at all where there is room left."""

    clean: Any
    corrupted: Any
    mask: Any
    corrupted_mask: Any
    window: Any
    metric: Any
    count: Any


def check_graph_of(config: DecoderConfig, n_layers: int, n_heads: int, what: str) -> None:
    """ValueError where a graph is of a model of other sizes."""
    c = config.sizes
    if (c["L"], c["H"]) != (n_layers, n_heads):
        raise ValueError(
            f"{what} is of a model with {n_layers} layers of {n_heads} heads, and this one has {c['L']} of {c['H']}."
        )
