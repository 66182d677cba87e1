"""What learnt masks share: the units that they keep, pairs to fit on and to judge on, what a masked run says, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ..arrays import AnyArray, check_host, integer, one_of, random_key
from ..backends.jax.compiled import compiled
from ..backends.jax.programs import measure
from ..capture import at_positions
from ..circuits.ablation import ablated, ablation_of, bytes_of_writes, seen
from ..circuits.circuit import KINDS, Circuit
from ..circuits.curve import Curve, faithfulness
from ..circuits.graph import Graph
from ..circuits.pairs import Pairs, check_graph_of
from ..circuits.running import masked
from ..circuits.scores import Scores
from ..circuits.trials import bytes_of_gradient
from ..metrics import of_prompt
from ..pytrees import pytree
from .controls import another, ranged, shown
from .fitting import Fit, fit
from .running import AT_ONCE
from .splitting import apart

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..metrics import MetricLike
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder

_MOST_BYTES = (
    1 << 30
)  # that are kept, of a backward pass or of corrupted runs; where there would be more, it runs again


@dataclass(frozen=True)
class Units:
    """What a mask has an entry for: the edges of a graph, its nodes, or neurons."""

    kind: str
    graph: Graph
    shape: tuple[int, ...]

    @classmethod
    def of(cls, config: DecoderConfig, kind: str, graph: Graph | None) -> Units:
        """Raises ValueError or TypeError for a kind that there is not, and a graph of another model."""
        one_of(kind, "kind", KINDS)
        graph = Graph.of(config) if graph is None else graph
        if not isinstance(graph, Graph):
            raise TypeError(f"graph is a {type(graph).__name__}, and a Graph is needed: Graph.of(model.config).")
        check_graph_of(config, graph.n_layers, graph.n_heads, "graph")
        c = config.sizes
        shapes = {"edges": graph.edges.shape, "nodes": graph.edges.shape[:1], "neurons": (c["L"], c["F"])}
        return cls(kind, graph, shapes[kind])

    @cached_property
    def places(self) -> Int[np.ndarray, " n"]:
        """Where they stand in an array of that shape."""
        return np.flatnonzero(self.graph.edges) if self.kind == "edges" else np.arange(int(np.prod(self.shape)))

    @property
    def n(self) -> int:
        return len(self.places)

    def laid(self, values: Float[AnyArray, " n"]) -> Float[Array, "..."]:
        """Values of all units in that shape, 0 where there is none."""
        flat = jnp.zeros(int(np.prod(self.shape)), values.dtype).at[self.places].set(values)
        return flat.reshape(self.shape)


class Search:
    """A fit of masks: so many seeds, and beside them one whose pairs tell it nothing.

    Of a seed the order of pairs is its own, and so are its draws. In the control each pair is asked for what another one, drawn
    once, is to say.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike | None],
        metric: MetricLike,
        units: Units,
        ablation: str | Mapping[str, ArrayLike],
        *,
        held_out: float,
        seeds: int,
        controls: bool,
        key: Array,
    ):
        check_host((model, prompts))
        clean, corrupted, mask, corrupted_mask = prompts
        pairs = Pairs.of(model, clean, corrupted, metric, mask, corrupted_mask)
        self.model, self.units = model, units
        self.seeds, self.controls = integer(seeds, "seeds", 1), controls
        split, self.key = jax.random.split(random_key(key))
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(split)).reshape(-1))
        self.held, self.rest = apart(self.rng.permutation(len(pairs.clean)), held_out, "pairs")
        self.pairs, self.judges = pairs.some(self.rest), pairs.some(self.held)
        self.other = ablation_of(model, self.pairs, units.kind, ablation)
        n_tokens = pairs.clean.shape[1]
        self.remat = bytes_of_gradient(model, units.kind, n_tokens) > _MOST_BYTES
        self.writes = None  # of the corrupted runs, the same in every step
        if self.other is None and len(self.rest) * bytes_of_writes(model, units.kind, n_tokens) <= _MOST_BYTES:
            self.writes = _writes(model, self.pairs.corrupted, self.pairs.corrupted_mask, kind=units.kind)

    @property
    def n_fits(self) -> int:
        return self.seeds + self.controls

    def fitted(self, loss: Callable[..., Array], start: Mapping[str, Float[np.ndarray, "..."]], **options: Any) -> Fit:
        """`start` is of one fit; carried beside it are the order of pairs of each fit, and whose answer each is asked for."""
        n = len(self.rest)
        asked = np.tile(np.arange(n, dtype=np.int32), (self.n_fits, 1))
        if self.controls:
            asked[-1] = another(n, self.rng)
        begun = {name: np.repeat(np.asarray(x)[None], self.n_fits, axis=0) for name, x in start.items()}
        begun["order"] = np.stack([self.rng.permutation(n) for _ in range(self.n_fits)]).astype(np.int32)
        begun["asked"] = asked
        return fit(loss, begun, np.arange(n, dtype=np.int32), key=self.key, many=1, **options)

    def pair(self, parameters: Mapping[str, Array], example: Int[Array, ""]) -> Pair:
        """The pair that an example is in a fit."""
        number = parameters["order"][example]
        return Pair(self, number, parameters["asked"][number])

    def judged(
        self, values: Float[np.ndarray, "R n"], what: Callable[[Scores], Scores | Circuit] = lambda scores: scores
    ) -> dict[str, Any]:
        """Curves, on held-out pairs, of the mean over seeds, of each seed where there are several, and of the controls.

        Args:
            values: of each fit.
            what: is judged, of scores.
        """
        each = values[: self.seeds]
        # Means too are of the pairs that were fitted to.
        instead: Any = "corrupted" if self.other is None else self.other

        def curve(row: Float[np.ndarray, " n"]) -> Curve:
            of, scores = self.judges, Scores(self.units.laid(row), self.units.graph)
            return faithfulness(
                self.model, what(scores), of.clean, of.corrupted, of.metric, ablation=instead, mask=of.mask,
                corrupted_mask=of.corrupted_mask,
            )  # fmt: skip

        controls = {}
        if self.controls:
            drawn, shuffled = self.rng.normal(size=self.units.n).astype(np.float32), values[-1].copy()
            if self.units.kind == "nodes":
                drawn[0] = shuffled[0] = np.inf  # without `input` every circuit is empty, whatever else was learnt
            controls = {"random scores": curve(drawn), "shuffled answers": curve(shuffled)}
        return {
            "curve": curve(each.mean(axis=0)), "controls": controls,
            "seeds": tuple(map(curve, each)) if len(each) > 1 else (),
        }  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A pair of prompts in a fit, by its number, and the number of the one whose answer it is asked for: but for the control, the
    same.
    """

    search: Search
    number: Int[Array, ""]
    asked: Int[Array, ""]

    @property
    def prompt(self) -> tuple[Array, Array | None]:
        """What runs: ids and mask."""
        pairs = self.search.pairs
        return self._row(pairs.clean), self._row(pairs.mask)

    def _row(self, given: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x)[self.number], given)

    def kept(self, share: Float[Array, "..."]) -> Float[Array, "T E"]:
        """The stream after the final norm of the run of which a mask keeps a share of each unit."""
        search, units, pairs = self.search, self.search.units, self.search.pairs
        instead = self._row(search.writes)
        if instead is None:
            spoilt = self._row(pairs.corrupted), self._row(pairs.corrupted_mask)
            instead = ablated(search.model, units.kind, self.prompt, spoilt, search.other, None)
        return masked(search.model, self.prompt, share, instead, units.kind, units.graph.grouped, remat=search.remat)

    def value(self, normalised: Float[Array, "T E"]) -> Float[Array, ""]:
        """The metric of a run."""
        metric = of_prompt(jax.tree.map(jnp.asarray, self.search.pairs.metric), self.asked)
        return measure(self.search.model, normalised, self.prompt[1], metric)

    def predicted(self, normalised: Float[Array, "T E"]) -> Float[Array, " V"]:
        """The log-probabilities of the next token after a run."""
        last = at_positions(normalised, 0, (-1,), self.prompt[1])[0]
        return jax.nn.log_softmax(self.search.model.logits(last))


@compiled("kind")
def _writes(model: Decoder, tokens: AnyArray, mask: AnyArray | None, *, kind: str) -> dict[str, Float[Array, "B ..."]]:
    """What each prompt's run writes."""

    def one(prompt: tuple[Array, Array | None]) -> dict[str, Array]:
        return seen(model, kind, *prompt)

    return jax.lax.map(one, (tokens, mask), batch_size=min(len(tokens), AT_ONCE))


@pytree
class LearnedScores(Scores):
    """Scores that were fitted, judged on held-out pairs beside their controls: for `faithfulness`, and for all that takes `Scores`.

    Attributes:
        values, graph: as in `Scores`; with several seeds their mean.
        each: float32 `[R, …]`, of each seed.
        curve: of circuits of these scores, on the held-out pairs.
        controls: the same of scores that should be worth nothing: `"random scores"`, and `"shuffled answers"`, fitted likewise,
            each pair to the answer of another one; of nodes both with `input` first, without which nothing is kept.
        seeds: the same of each seed's scores, where there are several.
        losses: `[steps, R]`, of the seeds.
        held_out: `[M]`, which pairs these are.

    Examples:
        >>> pairs = tokenizer(["The capital of Italy is", "The capital of France is"] * 4)["input_ids"]
        >>> measured = metrics.logit_difference([rome, paris] * 4, [paris, rome] * 4)
        >>> found = matryoshka(model, pairs, pairs[1:] + pairs[:1], measured, steps=40, key=jax.random.key(0))
        >>> found.curve.cpr > found.controls["random scores"].cpr, found.held_out.shape, found.kind
        (True, (2,), 'nodes')
        >>> found.save("nodes.json")
        >>> np.array_equal(circuits.Scores.load("nodes.json").nodes, found.nodes)
        True
    """

    each: Float[Array, "R ..."]
    curve: Curve
    controls: Mapping[str, Curve]
    seeds: tuple[Curve, ...]
    losses: Float[np.ndarray, "N R"]
    held_out: Int[np.ndarray, "M"]

    def __repr__(self) -> str:
        return f"LearnedScores({self.n} {self.kind}: {beside(self.curve, self.controls, self.seeds, 'cpr')})"


def beside(curve: Curve, controls: Mapping[str, Curve], seeds: tuple[Curve, ...], of: str) -> str:
    """A number of a curve as it prints, `"cpr"` or `"faithfulness"` of its last circuit: with its interval, each control's, and
    that of seeds where there are several.
    """
    name = {"cpr": "CPR"}.get(of, of)

    def number(curve: Curve) -> float:
        return float(np.reshape(getattr(curve, of), -1)[-1])

    def told(curve: Curve) -> str:
        if len(curve.empty) < 2:
            return f"{number(curve):.2f}"
        return ranged(jax.tree.map(lambda x: np.reshape(x, -1)[-1], curve.interval(of)))

    text = f"{name} {told(curve)} of {len(curve.empty)} held-out pairs"
    text += "".join(f"; {what} {told(other)}" for what, other in controls.items())
    return text + (f"; {len(seeds)} seeds {shown(np.array([*map(number, seeds)]))}" if seeds else "")
