"""A direction that tells two kinds of prompts apart, at many places at once, judged on prompts kept back, beside its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from ..arrays import AnyArray, check_host, integer, integers, listing, random_key, share
from ..backends import check_model
from ..intervals import Interval, bootstrap
from ..intervention import Steer
from ..prompts import check_prompts
from ..pytrees import pytree, static
from ..sites import Site, site_of
from .controls import ranged, untrained
from .detection import above, auroc
from .running import captured

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

Places: TypeAlias = int | Sequence[int] | None
# Of prompts' values `[N, P, n]` at P places, and K labellings of them `[K, N]`, directions `[K, P, n]` and their biases `[K, P]`.
Estimator: TypeAlias = Callable[
    [Float[np.ndarray, "N P n"], Bool[np.ndarray, "K N"]],
    tuple[Float[np.ndarray, "K P n"], Float[np.ndarray, "K P"]],
]
DRAWS = 20  # random directions, and labellings in a random order


@pytree
class Direction:
    """A direction at a place of a model, or at several, and how well it tells held-out prompts apart, beside its controls.

    Where several layers or positions were asked for, arrays lead with them, layers first.

    Attributes:
        site: what was read.
        layers: where, as they were asked for: one, or several.
        positions: at which tokens; None for the mean over all.
        vector: `[…, n]`, over the site's last axis; towards the positive prompts. Of the length that the method gives it.
        bias: `[…]`; a prompt counts as positive where `x · vector + bias` is above 0.
        auroc: `[…]`, how often a held-out positive prompt is further along than a negative one, with its interval over prompts.
        accuracy: `[…]`, the share of held-out prompts that are on their side, with its interval.
        controls: AUROC again, `[…]`: of `"random direction"`s, the side of each chosen on the prompts that were fitted on, and of
            `"shuffled labels"`, fitted to and judged by labels in a random order (Hewitt and Liang 2019, arXiv:1909.03368), each
            a mean over 20 draws with what 95 % of them have; of the same method in an `"untrained model"`, with its interval over
            prompts.
        held_out: `[M]`, the rows that were kept back, of the positive prompts and the negative ones after them.

    Examples:
        >>> cities, countries = ["Rome", "Paris", "Madrid", "Vienna"] * 2, ["Italy", "France", "Spain", "Austria"] * 2
        >>> positive, negative = ([tokenizer.encode(f"People in {x}") for x in words] for words in (cities, countries))
        >>> found = difference_of_means(model, positive, negative, layers=[1, 2], key=jax.random.key(0))
        >>> found.auroc.mean, found.vector.shape, found.at(2).vector.shape
        (Array([1., 1.], dtype=float32), (2, 192), (192,))
        >>> sweep(model, ids, found.steer(0.5), metric).shape  # steered at layer 1, and at layer 2
        (2,)
    """

    site: str = static()
    layers: int | tuple[int, ...] = static()
    positions: int | tuple[int, ...] | None = static()
    vector: Float[AnyArray, "... n"]
    bias: Float[AnyArray, "..."]
    auroc: Interval
    accuracy: Interval
    controls: Mapping[str, Interval]
    held_out: Int[np.ndarray, "M"]

    def at(self, layer: int, position: int | None = None) -> Direction:
        """The direction of one place, where there are several.

        Raises:
            ValueError: a place that was not asked for.
        """
        place: list[int] = []
        for what, given, there in (("layer", layer, self.layers), ("position", position, self.positions)):
            if not isinstance(there, tuple):
                if given != there and not (what == "position" and given is None):
                    raise ValueError(f"{what} is {given}, and this direction was read at {there}.")
            elif given not in there:
                raise ValueError(f"{what} is {given}, and this direction was read at {listing(there)}.")
            else:
                place.append(there.index(given))
        parts = self.vector, self.bias, self.auroc, self.accuracy, self.controls
        vector, bias, areas, accuracy, controls = jax.tree.map(lambda x: x[tuple(place)], parts)
        here = position if isinstance(self.positions, tuple) else self.positions
        return Direction(self.site, layer, here, vector, bias, areas, accuracy, controls, self.held_out)

    def steer(self, scale: ArrayLike = 1.0, positions: object = None) -> Steer:
        """Adds `scale` times the vector where it was read; of several places, a family of interventions, for `sweep` or `generate`.

        Args:
            scale: a number; compare the vector's length with the stream's.
            positions: which tokens; None for all.
        """
        layers = np.asarray(self.layers)
        if isinstance(self.positions, tuple):
            layers = layers[..., None]
        return Steer(layers if layers.ndim else self.layers, self.vector, scale, self.site, positions)

    def scores(self, values: Float[ArrayLike, "... n"]) -> Float[Array, "..."]:
        """How far along the direction of one place values are: above 0 for what counts as positive.

        Args:
            values: `[…, n]`, of the site that was read: a capture's layer `[T, E]`, or one token of many prompts.

        Raises:
            ValueError: a direction of several places, of which `at` gives one; or values of another width.

        Examples:
            >>> positive, negative = ([tokenizer.encode(f"The capital of {x}") for x in words.split()]
            ...                       for words in ("China Japan Iran Iraq", "France Spain Austria Norway"))
            >>> asian = difference_of_means(model, positive, negative, layers=1, key=jax.random.key(0))
            >>> there = [forward(model, x, capture="resid_pre")["resid_pre"][1, -1] for x in (positive[0], negative[0])]
            >>> asian.scores(np.stack(there)) > 0
            Array([ True, False], dtype=bool)
        """
        if np.ndim(self.bias):
            raise ValueError("These are directions of several places: at(layer, position) gives the one to score by.")
        values = jnp.asarray(values)
        if values.shape[-1:] != self.vector.shape:
            raise ValueError(
                f"values has shape {listing(values.shape)}, and must end in the {len(self.vector)} of {self.site}."
            )
        return jnp.einsum("...n,n->...", values, self.vector, precision="highest") + self.bias

    def __repr__(self) -> str:
        shape = np.shape(self.bias)
        head = f"{self.site}, AUROC on {len(self.held_out)} held-out prompts"

        def line(place: tuple[int, ...]) -> str:
            own, controls = jax.tree.map(lambda x: x[place], (self.auroc, self.controls))
            others = "".join(f"; {name} {ranged(spread)}" for name, spread in controls.items())
            return f"{self._name(place)}: {ranged(own)}{others}"

        lines = [line(place) for place in np.ndindex(*shape)]
        return f"Direction({head}; {lines[0]})" if not shape else "\n  ".join([f"Direction({head}", *lines]) + ")"

    def _name(self, place: tuple[int, ...]) -> str:
        left = list(place)
        layer = self.layers[left.pop(0)] if isinstance(self.layers, tuple) else self.layers
        position = self.positions[left.pop(0)] if isinstance(self.positions, tuple) else self.positions
        return f"layer {layer}, {'mean over tokens' if position is None else f'position {position}'}"


@dataclass(frozen=True)
class Sample:
    """Prompts of two kinds, and the places where they are to be read.

    Attributes:
        prompts: ids `[B, T]` and mask of the positive ones, and of the negative ones.
        layers, positions: as they were asked for; `axes` is what they make.
    """

    model: Decoder
    prompts: tuple[tuple[AnyArray, AnyArray | None], ...]
    site: str
    layers: int | tuple[int, ...]
    positions: int | tuple[int, ...] | None

    @classmethod
    def of(
        cls,
        model: Decoder,
        positive: ArrayLike,
        negative: ArrayLike,
        masks: Sequence[ArrayLike | None],
        site: str,
        layers: Places,
        positions: Places,
    ) -> Sample:
        config = check_model(model)
        check_host((model, positive, negative))
        check_site(site, config)
        many = range(config.num_hidden_layers) if layers is None else layers
        last = config.num_hidden_layers - 1
        chosen = (
            integer(many, "layers", 0, last)
            if isinstance(many, int | np.integer)
            else tuple(integer(x, "layers", 0, last) for x in integers(many, "layers"))
        )
        at = None if positions is None else integers(positions, "positions")
        at = at[0] if at is not None and isinstance(positions, int | np.integer) else at
        if () in (chosen, at):
            raise ValueError(f"{'layers' if chosen == () else 'positions'} is empty: name one at least.")
        for what, some in (("layers", chosen), ("positions", at)):
            if isinstance(some, tuple) and len(set(some)) < len(some):
                raise ValueError(f"{what} holds {listing(some)}: each once is enough.")
        prompts = []
        for ids, mask, what in zip((positive, negative), masks, ("positive", "negative"), strict=True):
            tokens, real, one = check_prompts(config, ids, mask, (what, f"{what}_mask"))
            if one or len(tokens) < 4:
                raise ValueError(
                    f"{what} has shape {listing(np.shape(ids))}, and prompts [B, T] are needed, four at least: some to fit on, and "
                    "some to judge on."
                )
            prompts.append((tokens, real))
        return cls(model, tuple(prompts), site, chosen, at)

    @property
    def axes(self) -> tuple[int, ...]:
        return tuple(len(x) for x in (self.layers, self.positions) if isinstance(x, tuple))

    @property
    def labels(self) -> Bool[np.ndarray, "N"]:
        n, m = (len(tokens) for tokens, _ in self.prompts)
        return np.arange(n + m) < n

    def values(self, model: Decoder) -> Float[np.ndarray, "N P n"]:
        """What a model has at the places, of the positive prompts and then of the negative ones."""
        layers = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        at = (self.positions,) if isinstance(self.positions, int) else self.positions
        found = [
            captured(model, ids, mask, self.site, layers, "mean" if at is None else at) for ids, mask in self.prompts
        ]
        values = np.concatenate([np.asarray(x, np.float64) for x in found])
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3)))
        if wrong.size:
            n = len(self.prompts[0][0])
            what, row = ("positive", wrong[0]) if wrong[0] < n else ("negative", wrong[0] - n)
            why = "is it shorter than that? Positions count real tokens" if at else "are the model's weights finite?"
            where = f"positions {listing(at)}" if at else "its tokens"
            raise ValueError(f"{what}[{row}] has no finite values at {where}: {why}.")
        return values.reshape(len(values), -1, values.shape[-1])


def check_site(name: str, config: DecoderConfig) -> Site:
    """A site of the layers that holds one row of features a token, else ValueError."""
    site = site_of(name, config.sites)
    if not site.layered or len(site.axes) != 2 or site.axes[-1] in "TS":
        why = "it has heads" if site.head_axis else "it has not" if site.layered else "it lies outside the layers"
        raise ValueError(
            f"site is {name!r}, and a site of the layers with one row of features for each token is needed: {why}."
        )
    return site


def judged(sample: Sample, estimator: Estimator, held_out: float, key: Array, controls: bool) -> Direction:
    """Fits a direction on some of the prompts, and judges it, and its controls, on the others."""
    first, second, third, fourth = jax.random.split(random_key(key), 4)
    labels = sample.labels
    held = _split(labels, held_out, first)
    values = sample.values(sample.model)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    # In a random order there are as many of each kind to fit on, and to judge on.
    given = np.repeat(labels[None], 1 + DRAWS * controls, axis=0)
    for row, own in zip(given[1:], jax.random.split(second, DRAWS), strict=False):
        for part, k in zip((held, rest), jax.random.split(own), strict=True):
            row[part] = labels[part][np.asarray(jax.random.permutation(k, len(part)))]
    vectors, biases = estimator(values[rest], given[:, rest])
    scores = np.einsum("npd,kpd->knp", values[held], vectors) + biases[:, None]
    own = labels[held]
    hits = (scores[0] > 0) == own[:, None]
    found: dict[str, Interval] = {}
    if controls:
        found["random direction"] = _over(_of_random(values, labels, rest, held, third))
        shuffled = zip(scores[1:], given[1:, held], strict=True)
        found["shuffled labels"] = _over(np.stack([_areas(x[y], x[~y]) for x, y in shuffled]))
        blank = sample.values(untrained(sample.model, fourth))
        vector, bias = estimator(blank[rest], labels[None, rest])
        blind = np.einsum("npd,pd->np", blank[held], vector[0]) + bias[0]
        found["untrained model"] = auroc(blind[own], blind[~own])
    parts = (vectors[0].astype(np.float32), biases[0].astype(np.float32), auroc(scores[0][own], scores[0][~own]),
             bootstrap(hits.astype(np.float32)), found)  # fmt: skip
    vector, bias, areas, accuracy, beside = jax.tree.map(
        lambda x: jnp.asarray(x).reshape(*sample.axes, *x.shape[1:]), parts
    )
    return Direction(sample.site, sample.layers, sample.positions, vector, bias, areas, accuracy, beside, held)


def _split(labels: Bool[np.ndarray, "N"], held_out: float, key: Array) -> Int[np.ndarray, "M"]:
    """Rows to keep back: the same share of both kinds, two at least."""
    part = share(held_out, "held_out", "prompts")
    held = []
    for kind, own in zip((True, False), jax.random.split(key), strict=True):
        rows = np.flatnonzero(labels == kind)
        n = min(max(2, round(part * len(rows))), len(rows) - 2)
        held.append(rows[np.asarray(jax.random.permutation(own, len(rows)))[:n]])
    return np.sort(np.concatenate(held))


def _of_random(
    values: Float[np.ndarray, "N P n"], labels: Bool[np.ndarray, "N"], rest: np.ndarray, held: np.ndarray, key: Array
) -> Float[np.ndarray, "K P"]:
    """The areas under the curve of random directions, each turned so that it is above ½ on the prompts that are fitted on."""
    drawn = np.asarray(jax.random.normal(key, (DRAWS, *values.shape[1:])), np.float64)
    scores = np.einsum("npd,kpd->knp", values, drawn)

    def areas(rows: np.ndarray) -> np.ndarray:
        own = labels[rows]
        return np.stack([_areas(x[rows][own], x[rows][~own]) for x in scores])

    there = areas(held)
    return np.where(areas(rest) >= 0.5, there, 1 - there)


def _areas(positive: Float[np.ndarray, "A P"], negative: Float[np.ndarray, "B P"]) -> Float[np.ndarray, " P"]:
    return np.array([above(x, y).mean() for x, y in zip(positive.T, negative.T, strict=True)])


def _over(draws: Float[np.ndarray, "K P"]) -> Interval:
    """A mean over draws, and what 95 % of them have."""
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return Interval(*(np.asarray(x, np.float32) for x in (draws.mean(axis=0), low, high)))  # type: ignore[arg-type]
