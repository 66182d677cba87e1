"""`CausalTracer`: patching of an adapter's prompts at a few sites of every layer, and its results as lists and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from .. import prompts
from ..arrays import integer, listing
from ..intervention.context import active
from ..intervention.protocol import are_interventions
from ..pytrees import pytree, static
from ..sites import find_site
from ..sweeps.sweeping import Progress
from .noise import Noise
from .patching import patch_sites, recovery

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..adapter.adapter import LlamaAttentionAdapter
    from ..intervention.protocol import Interventions
    from ..prompts import PromptLike


@pytree
class TraceResult:
    """What `CausalTracer.trace` found. Of several prompts, every array leads with `B`.

    Attributes:
        patched: `[L, sites]`, the metric of the corrupted run with one layer's clean activation in it.
        clean, corrupted: `[]`, the metric of the two runs themselves.
        sites: their names; static.

    Examples:
        >>> found = CausalTracer(adapter).trace(text, "The capital of France is", metric)
        >>> found.recovery_matrix().shape, found.top_results(1)[0]["site"]
        ((4, 2), 'mlp_out')
        >>> [row["site"] for row in found.by_layer(3)], [row["layer"] for row in found.by_site("mlp_out")]
        (['attn_out', 'mlp_out'], [0, 1, 2, 3])
    """

    patched: Float[Array, "... L N"]
    clean: Float[Array, "..."]
    corrupted: Float[Array, "..."]
    sites: tuple[str, ...] = static()

    def _means(self) -> tuple[Array, Array, Array]:
        """The three metrics, of several prompts their means."""
        values = [jnp.asarray(x).astype(jnp.float32) for x in (self.patched, self.clean, self.corrupted)]
        patched, clean, corrupted = [jnp.mean(x, axis=0) for x in values] if self.patched.ndim > 2 else values
        return patched, clean, corrupted

    def recovery_matrix(self) -> Float[Array, "L N"]:
        """`(patched − corrupted) / (clean − corrupted)`, `[L, sites]`: 1 as the clean run, 0 as the corrupted one.

        Of several prompts, that of the metrics' means. NaN where the two runs have the same metric.
        """
        return recovery(*self._means())

    def top_results(self, k: int = 10) -> list[dict[str, Any]]:
        """The k places that recover most, best first, as `{"layer", "site", "patched", "recovery"}`. Host function.

        Raises:
            ValueError: a k below 1.
        """
        order = np.argsort(-np.asarray(self.recovery_matrix()), axis=None, kind="stable")  # NaN comes last
        rows = self._rows()
        return [rows[place] for place in order[: integer(k, "k", 1)]]

    def by_layer(self, layer: int) -> list[dict[str, Any]]:
        """The results of one layer, in the order of `sites`, as in `top_results`; ValueError for none such. Host function."""
        n_layers = self.patched.shape[-2]
        if layer not in range(n_layers):
            raise ValueError(f"layer is {layer!r}, and there are {n_layers} layers: it must be 0 to {n_layers - 1}.")
        return [row for row in self._rows() if row["layer"] == layer]

    def by_site(self, site: str) -> list[dict[str, Any]]:
        """The results of one site, first layer first, as in `top_results`; ValueError for none such. Host function."""
        name = site_name(site)
        if name not in self.sites:
            raise ValueError(f"The site {name!r} was not traced; those traced are {', '.join(self.sites)}.")
        return [row for row in self._rows() if row["site"] == name]

    def summary(self, k: int = 10) -> str:
        """The two runs' metrics and the k places that recover most, as text. Host function.

        Examples:
            >>> found = CausalTracer(adapter).trace(text, "The capital of France is", metric)
            >>> found.summary().splitlines()[0]
            '4 layers × attn_out, mlp_out; metric 10.495 clean, -8.750 corrupted'
        """
        _, clean, corrupted = map(np.asarray, self._means())
        width = max(len("site"), *map(len, self.sites))
        shown = self.top_results(k)
        lines = [
            f"{self.patched.shape[-2]} layers × {', '.join(self.sites)}; metric {clean:.3f} clean, {corrupted:.3f} corrupted",
            f"layer  {'site':<{width}}  patched  recovery",
        ]
        lines += [
            f"{row['layer']:5d}  {row['site']:<{width}}  {row['patched']:7.3f}  {row['recovery']:8.3f}" for row in shown
        ]
        return "\n".join(lines)

    def _rows(self) -> list[dict[str, Any]]:
        patched, found = np.asarray(self._means()[0]), np.asarray(self.recovery_matrix())
        return [
            {"layer": layer, "site": site, "patched": float(patched[layer, i]), "recovery": float(found[layer, i])}
            for layer in range(found.shape[0])
            for i, site in enumerate(self.sites)
        ]

    def __repr__(self) -> str:
        return f"TraceResult({', '.join(self.sites)}: patched {listing(getattr(self.patched, 'shape', ()))})"


def site_name(name: str) -> str:
    """Our name of a site; the names of oculi's first edition (`residual_pre_attn`) are the guide's with another sign."""
    name = name.replace("residual_", "residual.", 1) if isinstance(name, str) else name
    return find_site(name)[0].name


class CausalTracer:
    """Which layer's attention or MLP carries the answer: `activation_patching` in an adapter's words.

    Clean activations go into the corrupted run, one layer of one site at a time; see `activation_patching`, which has the
    other grids. Inside an `InterventionContext` of the adapter, both runs are under its interventions.

    Args:
        adapter: a `LlamaAttentionAdapter`.

    Examples:
        >>> print(CausalTracer(adapter).trace(text, "The capital of France is", metric).summary(2))
        4 layers × attn_out, mlp_out; metric 10.495 clean, -8.750 corrupted
        layer  site      patched  recovery
            0  mlp_out     9.022     0.923
            3  mlp_out     5.086     0.719
    """

    def __init__(self, adapter: LlamaAttentionAdapter):
        if not hasattr(adapter, "model") or not hasattr(adapter, "tokenizer"):
            raise TypeError(
                f"CausalTracer takes an adapter, and was given a {type(adapter).__name__}: "
                "LlamaAttentionAdapter(model, tokenizer)."
            )
        self.adapter = adapter

    def trace(
        self,
        clean: PromptLike,
        corrupted: PromptLike | Noise | Interventions,
        metric: Callable[..., Any],
        *,
        sites: Sequence[str] = ("attn_out", "mlp_out"),
        positions: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
        progress: Progress | bool | None = None,
    ) -> TraceResult:
        """Patches every layer of each site.

        Args:
            clean: a text, a list of texts, or ids `[T]` or `[B, T]`.
            corrupted: the same, of as many tokens; or a `Noise`, an intervention or a list of them, which the clean prompt
                is run under.
            metric: one of `oculi_jax.metrics`, or any function of an `Output` to a scalar.
            sites: names of the site table, or the guide's.
            positions: which tokens are patched, together: an integer, a list, bool `[T]`, or bool `[B, T]`, each prompt's
                own; None for all.
            attention_mask: of the ids' shape, 1 or True at real tokens, for both.
            allow_longer: go beyond the length that the model was made for.
            progress: as in `sweep`.

        Returns:
            A `TraceResult`, whose `patched` is `[L, sites]`, or `[B, L, sites]`.

        Raises:
            ValueError, TypeError: something that can be seen to be wrong.

        Examples:
            >>> CausalTracer(adapter).trace(text, "The capital of France is", metric)
            TraceResult(attn_out, mlp_out: patched [4, 2])
        """
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        if not sites:
            raise ValueError("sites is empty: name at least one, such as 'mlp_out'.")
        names = tuple(map(site_name, sites))
        if len(set(names)) < len(names):
            raise ValueError(f"sites names one twice: {', '.join(names)}.")
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((self.adapter.model, clean, corrupted))):
            raise TypeError("CausalTracer runs on the host; inside a trace (jit, vmap, grad) use activation_patching.")

        def read(prompt: Any) -> prompts.Prompts:
            return prompts.prepare(
                prompt, self.adapter.tokenizer, self.adapter.model.config,
                attention_mask=attention_mask, allow_longer=allow_longer,
            )  # fmt: skip

        batch = read(clean)
        other: Any = corrupted
        if not isinstance(corrupted, Noise) and not are_interventions(corrupted):
            pair = read(corrupted)
            _check_aligned(batch, pair)
            other = _ids(pair)
        mask = batch.mask[:, : batch.n_tokens]
        results = patch_sites(
            self.adapter.model, _ids(batch), other, metric, names, ("layer",),
            mask=None if mask.all() else mask[0] if batch.single else mask,
            progress=progress, background=active(self.adapter), positions=positions,
        )  # fmt: skip
        patched = jnp.stack([result.patched for result in results], axis=-1)
        return TraceResult(patched, results[0].clean, results[0].corrupted, names)


def _ids(batch: prompts.Prompts) -> np.ndarray:
    tokens = batch.tokens[:, : batch.n_tokens]
    return tokens[0] if batch.single else tokens


def _check_aligned(clean: prompts.Prompts, corrupted: prompts.Prompts) -> None:
    if len(clean.tokens) != len(corrupted.tokens):
        raise ValueError(
            f"clean holds {len(clean.tokens)} prompts and corrupted {len(corrupted.tokens)}: give them in pairs."
        )
    lengths = [batch.mask.sum(axis=1) for batch in (clean, corrupted)]
    wrong = np.flatnonzero(lengths[0] != lengths[1])
    if wrong.size:
        which = "" if clean.single else f" {wrong[0]}"
        raise ValueError(
            f"The clean prompt{which} has {lengths[0][wrong[0]]} tokens and the corrupted one {lengths[1][wrong[0]]}: the two "
            "must be aligned token by token. Choose words of as many tokens (adapter.str_tokens shows them)."
        )
    if clean.n_tokens != corrupted.n_tokens:
        raise ValueError(f"clean is padded to {clean.n_tokens} tokens and corrupted to {corrupted.n_tokens}.")
