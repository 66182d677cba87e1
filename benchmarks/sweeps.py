"""Sweeps and patching beside the loops of other tools: `python benchmarks/sweeps.py [--model DIR] [--json OUT]`.

A peer runs the same work on the same prompts in this process, in turn with us; the ratio is the median of five, with its
range. A peer's loop takes half a minute, so it is timed on a fixed random tenth of the variants and scaled by their number,
and its numbers are compared with ours on these; Hugging Face's are compared on all of them, once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from table import Plan, Row, arguments, compilations, measure, verdict  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import forward, plan, sweep
from oculi_jax.backends import jax as programs
from oculi_jax.causal import activation_patching, attribution_patching
from oculi_jax.intervention import ActivationPatch, HeadAblation, PerLayer
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder.model import Decoder
from oculi_jax.models.llama import Llama
from oculi_jax.utils.tokens import load_tokenizer, to_single_token

if TYPE_CHECKING:
    from peers import HuggingFace

PROMPT = "When Mary and John went to the store this morning, John gave a drink to"
OTHER = "Then Anna and Paul sat down in the kitchen, because Paul had a letter for"  # as many tokens
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
ROUNDS = 5
TIMED = 10  # one in so many of the variants
AGREE = 1e-3  # in logits
# Ratios to be reached on two cores of a CPU; against the peers that are not here, 1.
BARS = {
    "ablation, transformer_lens": 15.0,
    "ablation, plain": 1.5,
    "patching, transformer_lens": 25.0,
    "attribution, transformer_lens": 4.0,
}
NAMES = {"torch": "Hugging Face", "transformer_lens": "TransformerLens", "nnsight": "nnsight", "pyvene": "pyvene"}


@dataclass
class Bench:
    """The model, and what the rows run it on."""

    model: Decoder
    directory: Path
    tokenizer: Any
    device: str = "cpu"  # of torch
    bars: Mapping[str, float] = field(default_factory=dict)
    peers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt, self.other, self.clean, self.corrupted = (
            np.array(self.tokenizer.encode(text), np.int32) for text in (PROMPT, OTHER, CLEAN, CORRUPTED)
        )
        mary, john, self.anna, self.paul = (
            to_single_token(self.tokenizer, name) for name in (" Mary", " John", " Anna", " Paul")
        )
        self.answer = mary, john
        self.metric = logit_difference(mary, john)

    def bar(self, name: str) -> float:
        return self.bars.get(name, 1.0)

    def peer(self, name: str) -> Any:
        """Made once, when first asked for: each holds a copy of the model."""
        from peers import PEERS

        if name not in self.peers:
            self.peers[name] = PEERS[name](self.directory, self.tokenizer, self.answer, self.device)
        return self.peers[name]

    def ablations(self, **options: Any) -> np.ndarray:
        grid = HeadAblation.grid(self.model.config)
        return np.asarray(sweep(self.model, self.prompt, grid, self.metric, progress=False, **options))

    def patching(self, site: str = "resid_pre", by: tuple[str, ...] = ("layer", "position")) -> Any:
        return jax.block_until_ready(
            activation_patching(self.model, self.clean, self.corrupted, self.metric, site=site, by=by)
        )

    def attribution(self) -> np.ndarray:
        result = attribution_patching(self.model, self.clean, self.corrupted, self.metric, sites=("z",))
        return np.asarray(result.values["z"])


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def faster(
    ours: Callable[[], np.ndarray], theirs: Callable[[], tuple[float, np.ndarray]], bar: float,
    where: Any = ..., note: str = "",
) -> Row:  # fmt: skip
    """A row of the time of `theirs` over that of `ours`, in turn, and of the largest difference of their numbers.

    Args:
        ours: gives all our numbers.
        theirs: gives the seconds of the peer's whole work and its numbers.
        bar: the ratio to be reached.
        where: which of our numbers the peer's are.
        note: to print after the row's times.
    """
    for call in (ours, theirs):  # to warm up, which compiles
        call()
    times, differences = [], []
    for _ in range(ROUNDS):
        own, mine = seconds(ours)
        other, numbers = theirs()
        times.append((own, other))
        differences.append(float(np.abs(mine[where] - numbers).max()))
    ratios = [other / own for own, other in times]
    ratio, own, other = map(statistics.median, (ratios, *zip(*times, strict=True)))
    differ = max(differences)
    text = f"{ratio:.1f} ({min(ratios):.1f}–{max(ratios):.1f}): {own:.3f} s, {other:.3g} s{note}; differ ≤ {differ:.0e}"
    return verdict(
        text, f"≥ {bar:g}; differ ≤ {AGREE:.0e}", ratio >= bar and differ <= AGREE, ratio=ratio, ratios=ratios,
        seconds=own, other_seconds=other, times=times, difference=differ, differences=differences,
    )  # fmt: skip


def some(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """A tenth of the variants of a sweep, always the same ones."""
    size = int(np.prod(shape))
    numbers = np.sort(np.random.default_rng(0).choice(size, size // TIMED, replace=False))
    return [tuple(map(int, index)) for index in zip(*np.unravel_index(numbers, tuple(shape)), strict=True)]


def loop(
    one: Callable[[int, int], float], variants: list[tuple[int, ...]], count: int, fixed: float = 0.0
) -> tuple[float, np.ndarray]:
    """Seconds of `count` variants, judged by those given, with what is done once for all of them; and the numbers."""
    spent, numbers = seconds(lambda: np.array([one(*variant) for variant in variants]))
    return fixed + spent * count / len(variants), numbers


def ablation_row(bench: Bench, name: str) -> Row:
    sizes, peer = bench.model.config.sizes, bench.peer(name)
    count, variants = sizes["L"] * sizes["H"], some((sizes["L"], sizes["H"]))
    return faster(
        bench.ablations,
        lambda: loop(partial(peer.ablate, bench.prompt.tolist()), variants, count),
        bench.bar(f"ablation, {name}"), tuple(np.array(variants).T), f" ({len(variants)} of {count} timed)",
    )  # fmt: skip


def batched_row(bench: Bench) -> Row:
    """All layers are timed, each as one batch of its heads."""
    peer: HuggingFace = bench.peer("torch")
    layers = range(bench.model.config.sizes["L"])
    return faster(
        bench.ablations,
        lambda: seconds(lambda: np.array([peer.ablate_layer(bench.prompt.tolist(), layer) for layer in layers])),
        bench.bar("ablation, batched"),
    )


def patching_row(bench: Bench, name: str) -> Row:
    """The run that is patched in is made anew each time, and counted once on both sides."""
    peer, clean, corrupted = bench.peer(name), bench.clean.tolist(), bench.corrupted.tolist()
    shape = (bench.model.config.sizes["L"], len(corrupted))
    count, variants = shape[0] * shape[1], some(shape)

    def theirs() -> tuple[float, np.ndarray]:
        spent, kept = seconds(lambda: peer.keep(clean))
        return loop(partial(peer.patch, corrupted, kept), variants, count, spent)

    note = f" ({len(variants)} of {count} timed)"
    where = tuple(np.array(variants).T)
    return faster(lambda: np.asarray(bench.patching().patched), theirs, bench.bar(f"patching, {name}"), where, note)


def attribution_row(bench: Bench, name: str, which: str = "", **options: Any) -> Row:
    peer, clean, corrupted = bench.peer(name), bench.clean.tolist(), bench.corrupted.tolist()
    return faster(
        bench.attribution,
        lambda: seconds(lambda: peer.attribute(clean, corrupted, **options)),
        bench.bar(f"attribution, {name}{which}"),
    )


def plain_row(bench: Bench) -> Row:
    """Both in one wide pass: the sweep without planning, and the `vmap` that somebody would write."""
    sizes = bench.model.config.sizes
    shape = sizes["L"], sizes["H"]
    layers, heads = (jnp.asarray(x.reshape(-1), jnp.int32) for x in np.indices(shape))

    @jax.jit
    def by_vmap(model: Llama, tokens: Any, metric: Any) -> Any:
        def one(layer: Any, head: Any) -> Any:
            return metric(forward(model, tokens, HeadAblation(layer, head), logits="last"))

        return jax.vmap(one)(layers, heads).reshape(shape)

    def against(plain: Callable[[], Any]) -> Row:
        return faster(bench.ablations, lambda: seconds(lambda: np.asarray(plain())), bench.bar("ablation, plain"))

    row = against(lambda: bench.ablations(reuse=False, batch_size=shape[0] * shape[1]))
    chosen = against(lambda: bench.ablations(reuse=False))
    written = against(lambda: by_vmap(bench.model, jnp.asarray(bench.prompt), bench.metric))
    note = f"Of batches of a size that the plan chooses: {chosen['measured']}. Of jax.vmap: {written['measured']}."
    return {**row, "note": note, "chosen": chosen, "vmap": written}


def agreement_row(bench: Bench) -> Row:
    """Every variant of three sweeps in a loop of Hugging Face's, once, untimed."""
    peer: HuggingFace = bench.peer("torch")
    clean, corrupted = bench.clean.tolist(), bench.corrupted.tolist()
    residual, z = peer.keep(clean), peer.keep_z(clean)
    heads = bench.patching("z", ("layer", "head"))
    sweeps: dict[str, tuple[np.ndarray, Callable[[int, int], float]]] = {
        "ablation": (bench.ablations(), partial(peer.ablate, bench.prompt.tolist())),
        "resid_pre": (np.asarray(bench.patching().patched), partial(peer.patch, corrupted, residual)),
        "z": (np.asarray(heads.patched), partial(peer.patch_z, corrupted, z)),
    }
    theirs = {
        name: np.array([one(*at) for at in np.ndindex(x.shape)]).reshape(x.shape) for name, (x, one) in sweeps.items()
    }
    errors = {name: float(np.abs(ours - theirs[name]).max()) for name, (ours, _) in sweeps.items()}
    recovery = np.asarray(heads.recovery)
    order = np.argsort(-np.abs(recovery), axis=None)[:4]
    largest = {
        f"L{i}H{j}": float(recovery[i, j]) for i, j in zip(*np.unravel_index(order, recovery.shape), strict=True)
    }
    return verdict(
        ", ".join(f"{name} {error:.0e}" for name, error in errors.items()), f"≤ {AGREE:.0e}", max(errors.values()) <= AGREE,
        note=f"z of one head recovers most at {', '.join(f'{name} ({x:+.2f})' for name, x in largest.items())}.",
        errors=errors, variants={name: x.size for name, x in theirs.items()}, recovery=largest,
    )  # fmt: skip


def compile_row(bench: Bench) -> Row:
    """Nothing is cached before the first; the second has other tokens, as many, and another pair of targets."""
    jax.clear_caches()
    with compilations() as first:
        bench.ablations()
    metric, grid = logit_difference(bench.anna, bench.paul), HeadAblation.grid(bench.model.config)
    assert len(bench.other) == len(bench.prompt), (len(bench.other), len(bench.prompt))
    with compilations() as second:
        sweep(bench.model, bench.other, grid, metric, progress=False)
    text = f"{len(first)} in {sum(first):.1f} s; {len(second)}"
    # None at all would mean that the listener is deaf.
    ok = 0 < len(first) <= 3 and not second
    return verdict(text, "≤ 3; 0", ok, first=len(first), second=len(second), compile_seconds=sum(first))


def compiled_bytes(*arguments: Any, **options: Any) -> int:
    """The most bytes beside the model that a sweep's compiled programs hold, by the compiler's own account."""
    held: list[int] = []
    own = programs.run_base, programs.run_variants

    def watched(program: Any) -> Any:
        def call(*given: Any, **settings: Any) -> Any:
            memory = program.lower(*given, **settings).compile().memory_analysis()
            kept = sum(x.nbytes for x in jax.tree.leaves(settings.get("base")))
            held.append(memory.temp_size_in_bytes + memory.output_size_in_bytes + kept)
            return program(*given, **settings)

        return call

    programs.run_base, programs.run_variants = map(watched, own)
    try:
        sweep(*arguments, **options)
    finally:
        programs.run_base, programs.run_variants = own
    return max(held)


def memory_row(bench: Bench) -> Row:
    """Several sweeps: other lengths, sizes and metrics, and the worst of them."""
    model, grid, metric = bench.model, HeadAblation.grid(bench.model.config), bench.metric
    captured = forward(model, bench.clean, capture="resid_pre", logits="none").activations["resid_pre"]
    layers, places = np.arange(len(captured))[:, None], np.arange(len(bench.clean))[None]
    patches = ActivationPatch("resid_pre", layers, PerLayer(captured), positions=places)
    long = np.resize(np.asarray(bench.prompt), 128)
    cases: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "heads": ((model, bench.prompt, grid, metric), {}),
        "heads, whole runs": ((model, bench.prompt, grid, metric), {"reuse": False}),
        "heads, 90 at a time": ((model, bench.prompt, grid, metric), {"batch_size": 90}),
        "9 heads, 128 tokens": ((model, long, HeadAblation(20, np.arange(9)), metric), {}),
        "9 heads, all logits": (
            (model, bench.prompt, HeadAblation(20, np.arange(9)), lambda out: out.logits[-1, 0]),
            {},
        ),
        "patches": ((model, bench.corrupted, patches, metric), {}),
    }
    figures = {name: (compiled_bytes(*a, **o), plan(*a, **o).bytes) for name, (a, o) in cases.items()}
    ratios = {name: compiled / planned for name, (compiled, planned) in figures.items()}
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    note = "; ".join(f"{name} {a / 1e6:.1f} of {b / 1e6:.1f} MB" for name, (a, b) in figures.items())
    text = f"{ratios[worst]:.2f} at worst ({worst}); {ratios['heads']:.2f} for the heads"
    return verdict(text, "within 20 %", all(0.8 <= r <= 1.2 for r in ratios.values()), note=note, ratios=ratios)


def rows(bench: Bench) -> Plan:
    sizes = bench.model.config.sizes
    heads = f"ablating {sizes['L'] * sizes['H']} heads, {len(bench.prompt)} tokens"
    residual = f"patching resid_pre, {sizes['L']} layers × {len(bench.clean)} positions"
    attribution = "attribution patching of z"
    return [
        *((f"{heads}: {NAMES[name]}'s time over ours", name, partial(ablation_row, bench, name)) for name in NAMES),
        (f"{heads}: Hugging Face's, a layer's heads as one batch", "torch", lambda: batched_row(bench)),
        (f"{heads}: of one wide pass of ours", "", lambda: plain_row(bench)),
        *((f"{residual}: {NAMES[name]}'s", name, partial(patching_row, bench, name)) for name in NAMES),
        (f"{attribution}: Hugging Face's, by autograd.grad", "torch", lambda: attribution_row(bench, "torch")),
        (f"{attribution}: TransformerLens's, by backward hooks", "transformer_lens",
         lambda: attribution_row(bench, "transformer_lens")),
        (f"{attribution}: the same, its parameters' gradients switched off", "transformer_lens",
         lambda: attribution_row(bench, "transformer_lens", ", frozen", parameters=False)),
        ("all variants: largest difference from Hugging Face's loop", "torch", lambda: agreement_row(bench)),
        ("compilations of a head sweep; of a second one", "", lambda: compile_row(bench)),
        ("compiled memory of a head sweep's programs: of the plan's figure", "", lambda: memory_row(bench)),
    ]  # fmt: skip


def main() -> None:
    args = arguments(str(__doc__))
    model = Llama.from_pretrained(args.model, dtype="float32")
    bench = Bench(model, args.model, load_tokenizer(args.model), bars=BARS)
    measure(rows(bench), f"prompts of {len(bench.prompt)} and {len(bench.clean)} tokens", args)


if __name__ == "__main__":
    main()
