"""Sweeps of sets of prompts beside Hugging Face's over a padded batch: `python benchmarks/sets.py [--model DIR] [--json OUT]`.

The peer pads the set on the left and runs it once for each head, under one hook, with the logits of the last token alone; it is
timed on a fixed tenth of the heads and scaled. The machine's rates are of products as large as the model's own, measured beside
each round. About twenty minutes on two cores.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from table import Plan, Row, arguments, compilations, hugging_face, measure, verdict  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from sweeps import seconds, some

from oculi_jax import forward, padded, plan, sweep
from oculi_jax.intervention import ActivationPatch, HeadAblation, PerLayer, Steer
from oculi_jax.metrics import kl_divergence, logit_difference
from oculi_jax.models.llama import Llama

ROUNDS = 3
AGREE = 1e-4  # in logits
# Times faster than the peer, where a product of JAX's runs at 0.9 of torch's rate or more; else in proportion.
FASTER, OF_TORCH = 3.5, 0.9
SHARED_FASTER = 5.0
RATE = 0.7


@dataclass
class Bench:
    """The model, its peer, and a set of ragged prompts."""

    model: Llama
    directory: Any
    hf: Any = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(9, 25, 40)
        vocab = self.model.config.vocab_size
        self.rows = [rng.integers(0, vocab, n) for n in self.lengths]
        start = rng.integers(0, vocab, 8)  # half of the mean length
        self.sharing = [np.concatenate([start, row[8:]]) for row in self.rows]
        self.a, self.b = rng.integers(0, vocab, 40), rng.integers(0, vocab, 40)
        self.metric = logit_difference(self.a, self.b)
        self.grid = HeadAblation.grid(self.model.config)

    def ours(self, rows: Any) -> np.ndarray:
        tokens, mask = padded(rows)
        return np.asarray(sweep(self.model, tokens, self.grid, self.metric, mask=mask, progress=False))

    def theirs(self, rows: Any) -> tuple[float, np.ndarray, Any]:
        """Seconds of all heads, the scores `[B, n]` of those that were run, and which these are."""
        import torch

        self.hf = hugging_face(self.directory) if self.hf is None else self.hf
        longest, sizes = max(map(len, rows)), self.model.config.sizes
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
        for row, own in enumerate(rows):
            ids[row, longest - len(own) :], mask[row, longest - len(own) :] = torch.from_numpy(own), 1
        heads = some((sizes["L"], sizes["H"]))

        def one(layer: int, head: int) -> np.ndarray:
            def zero(_: Any, inputs: Any) -> Any:
                z = inputs[0].clone()
                z[..., head * sizes["D"] : (head + 1) * sizes["D"]] = 0
                return (z,)

            hook = self.hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
            with torch.inference_mode():
                logits = self.hf(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
            hook.remove()
            return (logits[range(len(rows)), self.a] - logits[range(len(rows)), self.b]).numpy()

        one(*heads[0])
        spent, found = seconds(lambda: np.stack([one(*head) for head in heads], axis=1))
        return spent * sizes["L"] * sizes["H"] / len(heads), found, tuple(np.array(heads).T)


def product(of_torch: bool) -> float:
    """Operations a second of products as a layer has them, 512 × 576 × 1536."""
    shape = 512, 576, 1536
    x, w = np.ones(shape[:2], np.float32), np.ones((shape[2], shape[1]), np.float32)
    call: Callable[[], Any]
    if of_torch:
        import torch

        a, b = torch.from_numpy(x), torch.from_numpy(w)
        call = lambda: torch.nn.functional.linear(a, b)  # noqa: E731
    else:
        run = jax.jit(lambda a, b: jnp.einsum("te,fe->tf", a, b, precision="highest"))
        call = partial(run, *jax.device_put((x, w)))

    def many() -> None:
        for _ in range(50):
            out = call()
        jax.block_until_ready(out)

    many()
    return 50 * 2.0 * np.prod(shape) / min(seconds(many)[0] for _ in range(5))


def real_flops(bench: Bench, rows: Any) -> float:
    """Of real tokens × layers that can change, without attention's own."""
    c = bench.model.config.sizes
    weights = 2 * c["E"] * c["D"] * (c["H"] + c["K"]) + 3 * c["E"] * c["F"]
    return 2.0 * weights * sum(map(len, rows)) * c["H"] * sum(range(1, c["L"] + 1))


def set_row(bench: Bench, rows: Any, bar: float, rate_bar: float | None) -> Row:
    """The time of the peer over ours, and which part of the machine's rate real tokens reach."""
    bench.ours(rows)
    ratios, parts, rates, differ = [], [], [], 0.0
    for _ in range(ROUNDS):
        rate = product(False)
        rates.append((rate, product(True)))
        own, found = seconds(partial(bench.ours, rows))
        other, numbers, where = bench.theirs(rows)
        ratios.append(other / own)
        parts.append(real_flops(bench, rows) / own / rate)
        differ = max(differ, float(np.abs(found[:, *where] - numbers).max()))
    ratio, part, of_torch = (statistics.median(x) for x in (ratios, parts, [a / b for a, b in rates]))
    bar = bar * min(1.0, of_torch / OF_TORCH)
    text = (
        f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f}): {own:.0f} s, {other:.0f} s; {part:.2f} of "
        f"{statistics.median(a for a, _ in rates) / 1e9:.0f} GFLOP/s, which is {of_torch:.2f} of torch's; differ ≤ {differ:.0e}"
    )
    ok = ratio >= bar and differ <= 10 * AGREE and (rate_bar is None or part >= rate_bar)
    need = f"≥ {bar:.1f}" + ("" if rate_bar is None else f"; ≥ {rate_bar}")
    return verdict(text, need, ok, ratios=ratios, parts=parts, rates=rates, difference=differ)


def plan_row(bench: Bench) -> Row:
    """Six sweeps of different kinds, warm: what `plan` says over what the clock says."""
    model, c = bench.model, bench.model.config.sizes
    short, long = padded(bench.rows[:6]), bench.rows[3]
    run = forward(model, long, capture="resid_pre", logits="none").activations["resid_pre"]
    layers, vector = np.arange(c["L"])[:, None], np.ones(c["E"], np.float32)
    one = logit_difference(5, 7)
    cases = {
        "a set's heads": (short[0], HeadAblation(layers, np.arange(3)[None]), one, short[1]),
        "heads": (long, bench.grid, one, None),
        "patches": (
            long,
            ActivationPatch("resid_pre", layers, PerLayer(run), positions=np.arange(len(long))[None]),
            one,
            None,
        ),
        "strengths": (long, Steer(20, vector, np.linspace(0, 2, 64)), one, None),
        "all logits": (long, HeadAblation(10, np.arange(9)), kl_divergence(np.zeros(c["V"], np.float32)), None),
        "one variant of a set": (short[0], HeadAblation(3, 2), one, short[1]),
    }
    ratios = {}
    for name, (tokens, family, metric, mask) in cases.items():
        said = plan(model, tokens, family, metric, mask=mask).seconds
        call = partial(sweep, model, tokens, family, metric, mask=mask, progress=False)
        call()
        ratios[name] = said / statistics.median(seconds(lambda call=call: np.asarray(call()))[0] for _ in range(3))
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return verdict(text, "0.5 to 2", all(0.5 <= ratio <= 2 for ratio in ratios.values()), ratios=ratios)


def single_row(bench: Bench) -> Row:
    """Every effect of a fifth of the prompts, of each length, beside single runs; and prompts in another order."""
    found = bench.ours(bench.rows)

    def run(model: Llama, tokens: Any, layer: Any, head: Any) -> Any:
        return forward(model, tokens, HeadAblation(layer, head), logits="last").logits

    alone = jax.jit(jax.vmap(run, in_axes=(None, None, 0, 0)))
    chosen = np.argsort(bench.lengths, kind="stable")[::5]
    c, worst = bench.model.config.sizes, 0.0
    layers, heads = (x.reshape(-1) for x in np.indices((c["L"], c["H"])))
    for row in chosen:
        for part in np.array_split(np.arange(len(layers)), 6):
            logits = np.asarray(alone(bench.model, np.asarray(bench.rows[row]), layers[part], heads[part]))
            own = logits[:, bench.a[row]] - logits[:, bench.b[row]]
            worst = max(worst, float(np.abs(found[row].reshape(-1)[part] - own).max()))
    order = np.random.default_rng(1).permutation(40)
    tokens, mask = padded([bench.rows[i] for i in order])
    metric = logit_difference(bench.a[order], bench.b[order])
    with compilations() as compiled:
        turned = np.asarray(sweep(bench.model, tokens, bench.grid, metric, mask=mask, progress=False))
    moved = float(np.abs(turned - found[order]).max())
    text = f"single runs {worst:.0e}, other order {moved:.0e}; {len(compiled)} compilations of another set"
    return verdict(text, f"≤ {AGREE:.0e}; 0", max(worst, moved) <= AGREE and not compiled, worst=worst, moved=moved)


def rows(bench: Bench) -> Plan:
    heads = "40 ragged prompts of 9–24 tokens × 270 heads"
    return [
        (f"{heads}: Hugging Face's time over ours; real tokens' part of the rate", "torch",
         lambda: set_row(bench, bench.rows, FASTER, RATE)),
        ("the same, of which all begin with the same 8 tokens", "torch",
         lambda: set_row(bench, bench.sharing, SHARED_FASTER, None)),
        ("what plan says over the clock", "", lambda: plan_row(bench)),
        (f"{heads}: largest difference", "", lambda: single_row(bench)),
    ]  # fmt: skip


def main() -> None:
    args = arguments(str(__doc__))
    bench = Bench(Llama.from_pretrained(args.model, dtype="float32"), args.model)
    measure(rows(bench), "sets of prompts", args)


if __name__ == "__main__":
    main()
