"""Optimal ablation: of each unit the constant that costs least where the unit's value was.

Li and Janson (2024), "Optimal ablation for interpretability", arXiv:2409.09951.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import AnyArray, integer, integers, number, random_key
from ..backends import check_model
from ..backends.jax.compiled import compiled
from ..intervention import Edit
from ..metrics import apply_metric, of_prompt
from ..output import Activations
from ..pytrees import pytree, static
from ..run import forward
from ..sites import SITES
from ..sweeps.running import check_progress, part_of, told
from .controls import beside, orders
from .fitting import fit
from .objective import Objective, moments
from .resuming import beside_file, path_of
from .running import AT_ONCE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.model import Decoder
    from ..sweeps.running import Progress

UNITS = ("embed", "z", "mlp_out")
# Its site, where its vector stands in the site's array, its number in `_value`, its name.
Unit: TypeAlias = tuple[str, tuple[int, ...], int, str]
_PATIENCE = 20  # measurements, of as many: none ends early, and each is where its held-out loss was lowest


@pytree
class OptimalAblation:
    """Constants that cost least, and the losses of models in which one unit is replaced by its constant, beside other ablations'.

    Attributes:
        constants: site → array: `z` `[L, H, D]`, `mlp_out` `[L, E]`, of the layers asked for, upwards; `embed` `[E]`. What
            `HeadAblation`, `PerLayer` and, of all three sites and all layers, `ablation=` of circuits take.
        units: `U` names, as in `circuits.Graph`: `a0.h1` a head, `m0` an MLP, `input` the embedding; static.
        loss: `[U, M]`, of each unit at its constant and each held-out prompt.
        by_seed: `[S]`, its mean over units and prompts for what each seed found; the first is this one.
        mean_loss, zero_loss: `loss` at its mean over the other prompts, and at zero.
        whole_loss: `[M]`, of the model as it is.
        held_out: `[M]`, which prompts these are.

    Examples:
        >>> prompts = tokenizer([f"The capital of {x} is" for x in "Italy France Spain Egypt Japan Peru Cuba Iran".split()])
        >>> settings = dict(layers=[3], steps=20, batch_size=4, key=jax.random.key(0))
        >>> found = optimal_ablation(model, prompts["input_ids"], "z", **settings)
        >>> found.constants, found.loss.shape
        ({z [1, 6, 32]}, (6, 2))
        >>> intervention = HeadAblation(3, 2, found.constants["z"][0, 2])
    """

    constants: Activations
    units: tuple[str, ...] = static()
    loss: Float[np.ndarray, "U M"]
    by_seed: Float[np.ndarray, "S"]
    mean_loss: Float[np.ndarray, "U M"]
    zero_loss: Float[np.ndarray, "U M"]
    whole_loss: Float[np.ndarray, "M"]
    held_out: Int[np.ndarray, "M"]

    def __repr__(self) -> str:
        others = {"mean": self.mean_loss, "zero": self.zero_loss}
        controls = {name: found.mean(axis=0) for name, found in others.items()} | {"whole": self.whole_loss}
        told = beside(self.loss.mean(axis=0), controls, "held-out prompts", self.by_seed)
        return f"OptimalAblation({len(self.units)} units: {told})"


def optimal_ablation(
    model: Decoder,
    tokens: ArrayLike,
    sites: str | Sequence[str] = ("z", "mlp_out"),
    *,
    layers: Sequence[int] | None = None,
    loss: MetricLike | None = None,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 0.05,
    held_out: float = 0.25,
    seeds: int = 1,
    key: Array,
    mask: ArrayLike | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> OptimalAblation:
    """Finds, for each unit by itself, the vector that costs least in its place, the same at all tokens of all prompts.

    A unit is a head (`z`), the MLP of a layer (`mlp_out`) or the embedding (`embed`). A fit begins at the unit's mean, or at zero
    where that costs less, and ends where the loss is lowest of prompts that it makes no steps on. Units of a layer are one
    program, of that layer and those behind it. Host function.

    Args:
        model: a model of any family.
        tokens: ids `[B, T]`.
        sites: which kinds of unit: `"z"`, `"mlp_out"`, `"embed"`, one or several.
        layers: of `z` and `mlp_out`; all for None.
        loss: what is to be small: one of `oculi_jax.metrics`, or any function of an `Output` to a number; None for the divergence
            KL(whole ‖ ablated) of the next token after a prompt, in nats.
        steps, batch_size: of the fits, by Adam.
        learning_rate: in units of the root mean square of what the unit varies by; it falls to 0 by a cosine.
        held_out: the share of prompts, drawn by the key, that are kept for judging. A quarter of the rest say where to stop.
        seeds: how many fits of each unit, of the same program, each with an order of prompts of its own; what the first found is
            returned.
        key: a JAX random key: of what is held out, and of the order of prompts.
        mask: bool `[B, T]`, True at real tokens.
        file: as in `fit`; each layer has one of its own beside it, `NAME.LAYER.safetensors`.
        progress: as in `fit`.

    Returns:
        An `OptimalAblation`.

    Raises:
        ValueError, TypeError: arguments that do not go together, or that `forward` refuses.

    Examples:
        >>> prompts = tokenizer([f"The capital of {x} is" for x in "Italy France Spain Egypt Japan Peru Cuba Iran".split()])
        >>> settings = dict(layers=[3], steps=20, batch_size=4, key=jax.random.key(0))
        >>> found = optimal_ablation(model, prompts["input_ids"], "mlp_out", **settings)
        >>> found.units, bool(found.loss.mean() < found.mean_loss.mean())
        (('m3',), True)
    """
    names, chosen = _asked(model, sites, layers)
    steps, batch_size = integer(steps, "steps", 1), integer(batch_size, "batch_size", 1)
    learning_rate = number(learning_rate, "learning_rate")
    check_progress(progress)
    path = path_of(file)
    begin, order = jax.random.split(random_key(key))
    objective = Objective.of(model, tokens, mask, loss, held_out, begin)
    search = _Search(objective, names, chosen, integer(seeds, "seeds", 1))
    options: Any = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    with told("Fitting constants", progress, steps * len(search.layers)) as advance:
        found = [
            search.layer(layer, order, beside_file(path, f"{layer}"), advance, **options) for layer in search.layers
        ]
    return search.joined(found)


def _asked(model: Decoder, sites: Any, layers: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The sites in the order of a graph, and the layers."""
    config = check_model(model)
    names = tuple(sites) if isinstance(sites, list | tuple) else (sites,)
    if not names or any(name not in UNITS for name in names):
        near = [y for x in names if isinstance(x, str) and x not in UNITS for y in get_close_matches(x, UNITS, 1)]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"sites is {sites!r}, and units are of {', '.join(map(repr, UNITS))}: one of these, or several.{hint}"
        )
    last = config.num_hidden_layers - 1
    chosen = (
        range(last + 1)
        if layers is None
        else sorted({integer(x, "layers", 0, last) for x in integers(layers, "layers")})
    )
    if not chosen:
        raise ValueError("layers is empty: name at least one.")
    return tuple(name for name in UNITS if name in names), tuple(chosen)


class _Search:
    """The units of several layers, each with what it holds on average and how far that varies."""

    def __init__(self, objective: Objective, names: tuple[str, ...], chosen: tuple[int, ...], seeds: int):
        self.objective, self.names, self.chosen, self.seeds = objective, names, chosen, seeds
        self.n_heads = objective.model.config.num_attention_heads
        means, spreads = moments(objective, names)
        self.means, self.spreads = jax.tree.map(np.asarray, (means, spreads))

    @property
    def layers(self) -> tuple[int, ...]:
        """Where fits begin: at layer 0 for the embedding."""
        inner = self.chosen if set(self.names) - {"embed"} else ()
        return tuple(sorted({*inner, *((0,) if "embed" in self.names else ())}))

    def units(self, layer: int) -> list[Unit]:
        """The units of a layer."""
        found: list[Unit] = []
        if "embed" in self.names and layer == 0:
            found.append(("embed", (), self.n_heads + 1, "input"))
        if "z" in self.names and layer in self.chosen:
            found += [("z", (layer, head), head, f"a{layer}.h{head}") for head in range(self.n_heads)]
        if "mlp_out" in self.names and layer in self.chosen:
            found.append(("mlp_out", (layer,), self.n_heads, f"m{layer}"))
        return found

    def layer(
        self,
        layer: int,
        key: Array,
        file: Path | None,
        advance: Callable[[int], None],
        *,
        learning_rate: float,
        **options: Any,
    ) -> dict[str, Any]:
        """What is found of the units of one layer: constants of each, and losses on what is held out."""
        import optax

        units, objective, n = self.units(layer), self.objective, self.seeds
        rows = np.arange(len(units), dtype=np.int32)
        numbers = np.array([number for *_, number, _ in units], np.int32)
        spreads = jnp.array([self.spreads[site][place] for site, place, *_ in units])
        every = self._examples(layer)
        means = self._means(units)
        ends = means, jax.tree.map(jnp.zeros_like, means)
        costs = [self._losses(every, layer, end, numbers) for end in ends]
        mean, zero = (losses[:-1, objective.seen].mean(axis=1) for losses in costs)
        begun = jax.tree.map(lambda x: jnp.where(jnp.asarray(mean <= zero)[:, None], x, 0), means)

        def constants(moved: Any, row: Any) -> dict[str, Array]:
            return {site: x[row] + spreads[row] * moved[site] for site, x in begun.items()}

        def loss(parameters: Any, of_seeds: Array) -> Array:
            example = jax.tree.map(lambda x: x[of_seeds[parameters["seed"]]], every)
            own = constants(parameters["moved"], parameters["row"])
            return _value(objective.model, objective.metric, layer, objective.logits, own, parameters["unit"], example)

        start = {"moved": jax.tree.map(lambda x: np.zeros((n, *x.shape), x.dtype), begun)}
        start |= {"row": np.tile(rows, (n, 1)), "unit": np.tile(numbers, (n, 1))}
        start["seed"] = np.repeat(np.arange(n, dtype=np.int32)[:, None], len(units), axis=1)
        found = fit(
            loss, start, objective.fitted[orders(len(objective.fitted), n, key)], key=key, many=2, stop=_PATIENCE, file=file,
            held_out=np.repeat(objective.choosing[:, None], n, axis=1), progress=part_of(advance),
            optimiser=optax.adam(optax.cosine_decay_schedule(learning_rate, options["steps"])), **options,
        )  # fmt: skip
        best = jax.vmap(lambda moved: jax.vmap(constants)(moved, rows))(found.parameters["moved"])
        every_seed = [jax.tree.map(lambda x, seed=seed: x[seed], best) for seed in range(n)]
        own = np.stack([self._losses(every, layer, x, numbers) for x in every_seed])[..., objective.held]
        beside = np.stack(costs)[..., objective.held]
        return {
            "layer": layer,
            "constants": every_seed[0],
            "own": own[:, :-1],
            "beside": beside[:, :-1],
            "whole": own[0, -1],
        }

    def _means(self, units: Sequence[Unit]) -> dict[str, Float[Array, "R n"]]:
        """Of each site the means, of one unit a row: rows of other sites' units are zero."""
        sites = dict.fromkeys(site for site, *_ in units)
        means = {site: np.zeros((len(units), self.means[site].shape[-1]), np.float32) for site in sites}
        for row, (site, place, *_) in enumerate(units):
            means[site][row] = self.means[site][place]
        return jax.tree.map(jnp.asarray, means)

    def _examples(self, layer: int) -> dict[str, Any]:
        """What enters a layer, of all prompts."""
        every = self.objective.examples(np.arange(len(self.objective.tokens)))
        resid = _entering(self.objective.model, every["tokens"], every["mask"], jnp.int32(layer))
        return {**every, "resid": resid}

    def _losses(
        self, examples: Any, layer: int, constants: dict[str, Array], numbers: Int[np.ndarray, "R"]
    ) -> Float[np.ndarray, "R B"]:
        """Of each unit on each example, and then of the model as it is."""
        objective = self.objective
        more = {site: jnp.pad(x, [(0, 1), (0, 0)]) for site, x in constants.items()}
        units = np.append(numbers, np.int32(-1))
        return np.asarray(
            _losses(objective.model, objective.metric, examples, more, units, layer=layer, logits=objective.logits)
        )

    def joined(self, found: Sequence[dict[str, Any]]) -> OptimalAblation:
        """The layers' as one."""
        n = len(self.chosen)
        shapes = {site: (n, *x.shape[1:]) if SITES[site].layered else x.shape for site, x in self.means.items()}
        arrays = {site: np.zeros(shape, np.float32) for site, shape in shapes.items()}
        for one in found:
            for row, (site, place, *_) in enumerate(self.units(one["layer"])):
                own = (self.chosen.index(place[0]), *place[1:]) if place else ()
                arrays[site][own] = one["constants"][site][row]
        own, others = (np.concatenate([one[name] for one in found], axis=1) for name in ("own", "beside"))
        return OptimalAblation(
            Activations(jax.tree.map(jnp.asarray, arrays)),
            tuple(name for one in found for *_, name in self.units(one["layer"])),
            own[0], own.mean(axis=(1, 2)), others[0], others[1], found[0]["whole"], self.objective.held,
        )  # fmt: skip


def _value(
    model: Decoder,
    metric: Any,
    layer: int,
    logits: Any,
    constants: dict[str, Array],
    unit: Array,
    example: dict[str, Any],
) -> Float[Array, ""]:
    """The loss of a run in which a unit of a layer is a constant: a head by its number, then the MLP, then the embedding.

    Any other number leaves the model as it is.
    """
    n_heads, resid = model.config.num_attention_heads, example["resid"]
    edits = []
    if "embed" in constants:
        resid = jnp.where(unit == n_heads + 1, constants["embed"][None].astype(resid.dtype), resid)
    if "z" in constants:
        head = jnp.arange(n_heads) == unit
        edits.append(Edit("z", "set", layer, head[:, None, None], constants["z"][None, None]))
    if "mlp_out" in constants:
        edits.append(Edit("mlp_out", "set", layer, (unit == n_heads)[None, None], constants["mlp_out"][None]))
    out = forward(model, example["tokens"], edits, mask=example["mask"], logits=logits, start=(layer, resid))
    return apply_metric(of_prompt(metric, example["number"]), out)


@compiled("layer", "logits")
def _losses(
    model: Decoder,
    metric: Any,
    examples: dict[str, Any],
    constants: dict[str, Float[Array, "R n"]],
    units: Int[AnyArray, "R"],
    *,
    layer: int,
    logits: str,
) -> Float[Array, "R B"]:
    """The loss of each example with each unit at its constant."""

    def of(example: dict[str, Any]) -> Float[Array, " R"]:
        def one(own: dict[str, Array], unit: Array) -> Array:
            return _value(model, metric, layer, logits, own, unit, example)

        return jax.vmap(one)(constants, jnp.asarray(units))

    found = jax.lax.map(of, examples, batch_size=min(len(examples["number"]), AT_ONCE))
    return jnp.moveaxis(found, 0, -1)


@compiled()
def _entering(model: Decoder, tokens: AnyArray, mask: AnyArray | None, layer: Array) -> Float[Array, "B T E"]:
    """`resid_pre` of a layer, of each prompt. One program for all layers."""

    def one(prompt: tuple[Array, Array | None]) -> Array:
        return forward(model, prompt[0], capture="resid_pre", mask=prompt[1], logits="none")["resid_pre"][layer]

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), AT_ONCE))
