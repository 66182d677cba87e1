"""What part of this machine's float32 matmul rate each workload reaches: `python benchmarks/rates.py [--model DIR] [--json OUT]`.

The rate is that of one large square product at full float32 precision, taken in turn with the workload in this process, and
a fraction is the median of five. A workload's operations are those of its matrix products, a multiply-add being two; of a
sweep, those of the layer evaluations that its plan names, so that work which planning spares earns nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from table import Plan, Row, arguments, measure, verdict  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from sweeps import ROUNDS, Bench, seconds

from oculi_jax import forward, plan, sweep
from oculi_jax.intervention import ActivationPatch, HeadAblation, PerLayer
from oculi_jax.models.llama import Llama
from oculi_jax.utils.tokens import load_tokenizer

BAR = 0.6  # of the rate, for the head sweep on two cores of a CPU


def square() -> tuple[Callable[[], Any], float]:
    """A product that keeps the machine busy for a good part of a second at most, and its operations."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    return lambda: product(x), 2.0 * n**3


def fraction(work: Callable[[], Any], flops: float, bar: float | None, **values: Any) -> Row:
    """A row of the rate of some work over that of the product, in turn; without a bar, of the figure alone."""
    product, product_flops = square()
    for call in (work, product, work, product):  # to warm up, which compiles
        jax.block_until_ready(call())
    own, rates = [], []
    for _ in range(ROUNDS):
        own.append(flops / seconds(lambda: jax.block_until_ready(work()))[0])
        rates.append(product_flops / seconds(lambda: jax.block_until_ready(product()))[0])
    fractions = [x / rate for x, rate in zip(own, rates, strict=True)]
    part, speed, rate = map(statistics.median, (fractions, own, rates))
    text = (
        f"{part:.2f} ({min(fractions):.2f}–{max(fractions):.2f}): {flops / 1e9:.3g} GFLOP in {flops / speed:.3f} s, "
        f"{speed / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s"
    )
    ok = bar is None or part >= bar
    return verdict(
        text, "" if bar is None else f"≥ {bar}", ok, fraction=part, fractions=fractions, flops=flops, rates=rates, **values
    )  # fmt: skip


def layer_flops(model: Llama, n_rows: float, n_keys: int) -> float:
    """Of one layer on some tokens, each of which meets all the prompt's keys."""
    c = model.config.sizes
    weights = 2 * c["E"] * c["D"] * (c["H"] + c["K"]) + 3 * c["E"] * c["F"]
    return 2.0 * n_rows * (weights + 2 * c["H"] * c["D"] * n_keys)


def forward_row(bench: Bench) -> Row:
    """With the logits of all tokens."""
    tokens, c = np.resize(bench.prompt, 128), bench.model.config.sizes
    flops = c["L"] * layer_flops(bench.model, len(tokens), len(tokens)) + 2.0 * len(tokens) * c["E"] * c["V"]
    return fraction(lambda: forward(bench.model, tokens).logits, flops, None)


def sweep_row(bench: Bench, tokens: np.ndarray, interventions: Any, least_layers: float, bar: float | None) -> Row:
    """The note counts by hand what cannot be spared: the base run, and each variant from its first edited layer and token.

    Args:
        bench: the model and the metric.
        tokens: ids `[T]`.
        interventions: of the sweep.
        least_layers: the fewest evaluations of a layer on one token that the variants need.
        bar: of the row.
    """
    planned = plan(bench.model, tokens, interventions, bench.metric)
    row = fraction(
        lambda: sweep(bench.model, tokens, interventions, bench.metric, progress=False), float(planned.flops), bar,
        layer_evaluations=planned.layer_evaluations, naive_flops=planned.naive_flops,
    )  # fmt: skip
    base = bench.model.config.sizes["L"] * len(tokens)
    least = layer_flops(bench.model, base + least_layers, len(tokens))
    note = f"{planned!r}. At least {least / 1e9:.3g} GFLOP are needed: {row['fraction'] * least / planned.flops:.2f} by these."
    return {**row, "note": note, "least_flops": least}


def ablation_row(bench: Bench, bar: float | None) -> Row:
    c, n_tokens = bench.model.config.sizes, len(bench.prompt)
    least = n_tokens * c["H"] * sum(range(1, c["L"] + 1))
    return sweep_row(bench, bench.prompt, HeadAblation.grid(bench.model.config), least, bar)


def patching_row(bench: Bench) -> Row:
    """The sweep alone: the clean run is made before."""
    n_layers, n_tokens = bench.model.config.sizes["L"], len(bench.corrupted)
    clean = forward(bench.model, bench.clean, capture="resid_pre", logits="none").activations["resid_pre"]
    layers, positions = np.arange(n_layers)[:, None], np.arange(n_tokens)[None]
    least = sum(range(1, n_layers + 1)) * sum(range(1, n_tokens + 1))
    patch = ActivationPatch("resid_pre", layers, PerLayer(clean), positions=positions)
    return sweep_row(bench, bench.corrupted, patch, least, None)


def attribution_row(bench: Bench) -> Row:
    """Two forward passes, and a reverse pass that makes the activations' gradients alone, which costs as much as one."""
    n_tokens = len(bench.corrupted)
    flops = 3 * bench.model.config.sizes["L"] * layer_flops(bench.model, n_tokens, n_tokens)
    return fraction(bench.attribution, flops, None)


def rows(bench: Bench, bar: float | None = None) -> Plan:
    """A bar is for the head sweep alone."""
    return [
        ("plain forward, 128 tokens: of the matmul rate", "", partial(forward_row, bench)),
        (f"sweep of all heads, {len(bench.prompt)} tokens", "", partial(ablation_row, bench, bar)),
        (f"sweep of resid_pre, all layers × {len(bench.corrupted)} positions", "", partial(patching_row, bench)),
        ("attribution patching of z", "", partial(attribution_row, bench)),
    ]


def main() -> None:
    args = arguments(str(__doc__))
    model = Llama.from_pretrained(args.model, dtype="float32")
    bench = Bench(model, args.model, load_tokenizer(args.model))
    measure(rows(bench, BAR), f"prompts of {len(bench.prompt)} and {len(bench.clean)} tokens", args)


if __name__ == "__main__":
    main()
