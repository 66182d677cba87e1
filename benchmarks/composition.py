"""Composition of every pair of heads from the weights, beside its bar: `python benchmarks/composition.py [--model DIR]`.

Compiling is apart; the time is the median of several calls on an idle machine.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from oculi_jax.analysis.composition import CompositionAnalysis
from oculi_jax.models.llama import Llama

BAR = 5.0


def seconds(model: Llama) -> float:
    start = time.perf_counter()
    jax.block_until_ready(CompositionAnalysis.weight_composition(model))
    return time.perf_counter() - start


def main() -> None:
    weights = Path(__file__).parents[1] / "weights" / "SmolLM2-135M-Instruct"
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", type=Path, default=weights)
    parser.add_argument("--calls", type=int, default=5)
    args = parser.parse_args()
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        sys.exit("XLA_FLAGS asks for virtual devices, which share the cores; benchmarks do not run on them.")
    if not (args.model / "config.json").exists():
        sys.exit(f"There is no checkpoint in {args.model}: python weights/smollm2.py {args.model}")
    jax.config.update("jax_enable_compilation_cache", False)
    model, busy = Llama.from_pretrained(args.model, dtype="float32"), os.getloadavg()[0]
    first = seconds(model)
    times = [seconds(model) for _ in range(args.calls)]
    median = statistics.median(times)

    size = model.config.sizes
    layers, heads, dim, width = (size[letter] for letter in "LHDE")
    flops = 3 * layers * (layers - 1) // 2 * 2 * (heads * dim) ** 2 * width
    n = 2048
    square = jax.block_until_ready(jax.numpy.ones((n, n), np.float32))
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        product(square).block_until_ready()
        rates.append(2 * n**3 / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])

    table = Table("", f"{args.model.name}, float32", "measured", "bar", "")
    what = f"Q-, K- and V-composition of {layers * heads} × {layers * heads} heads"
    text = f"{median:.2f} s ({min(times):.2f}–{max(times):.2f}); compiling {max(first - median, 0.0):.1f} s more"
    table.add_row("1", what, text, f"≤ {BAR:g} s", "ok" if median <= BAR else "MISSED")
    note = f"1: {flops / 1e9:.0f} GFLOP at {flops / median / 1e9:.0f} GFLOP/s; a float32 matrix product runs at {rate / 1e9:.0f}."
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table, note, sep="\n")
    print(f"Load average {busy:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores: was it idle?")
    sys.exit(median > BAR)


if __name__ == "__main__":
    main()
