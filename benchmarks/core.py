"""The core's promises in numbers, each beside its bar: `python benchmarks/core.py [--model DIR] [--json OUT]`.

Times are medians. Two things that are compared alternate, A B A B, in one process once both are warm, and their ratio
is the median over the pairs, with its range. A row whose peer is not installed says so and counts as not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from table import HUB_ID, Plan, Row, arguments, compilations, hugging_face, installed, measure, side_by_side, verdict  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from loading import in_a_fresh_process

from oculi_jax import CaptureConfig, CaptureSpec, MLPConfig, ResidualConfig, forward
from oculi_jax import intervention as iv
from oculi_jax.models.decoder.model import Decoder
from oculi_jax.models.llama import Llama

N_TOKENS = 128
GUIDE = tuple(
    sorted({site for config in (CaptureConfig(), ResidualConfig(), MLPConfig()) for site in config.fields().values()})
)
# On this one a massive activation forms in mid-text, and float32 itself is far from float64: for the note below row 1.
HARBOUR = (
    "The harbour town had two lighthouses. The older one, of grey stone, stood on the cliff and had not been lit for "
    "forty years; the newer one, a thin white tower at the end of the pier, was lit every evening by a machine that "
    "nobody had to look after. Children were told that the old keeper still climbed the stairs at dusk, and looked "
    "across the water at the light which had replaced his own. One winter a storm took the pier, the white tower and "
    "the machine, and that same night every ship at sea reported a light"
)


def run(model: Decoder, tokens: np.ndarray, **options: Any) -> Any:
    return jax.block_until_ready(forward(model, tokens, **options))


def compiled(model: Llama, tokens: np.ndarray, **options: Any) -> Any:
    return jax.jit(lambda model, tokens: forward(model, tokens, **options)).lower(model, tokens).compile()


def parity_row(model: Llama, hf: Any, tokenizer: Any) -> Row:
    """Every site of every layer by the measure of the tests: a row's largest error over its largest value."""
    from exact import float64_sites

    from tests.prompts import PROMPTS
    from tests.reference import reference_sites
    from tests.tolerances import LOGITS, ROW, parity

    def far(ours: dict[str, Any], theirs: dict[str, Any], real: np.ndarray) -> tuple[float, str, float]:
        errors = parity({site: ours[site] for site in model.config.sites}, ours["logits"], theirs, real)
        worst = max(model.config.sites, key=errors.__getitem__)
        return errors[worst], worst, errors["logits"]

    def both(text: str, padding: int) -> tuple[Any, ...]:
        tokens = np.array([tokenizer.pad_token_id] * padding + tokenizer(text).input_ids, np.int32)
        real = np.arange(len(tokens)) >= padding
        mask = real if padding else None
        out = forward(model, tokens, capture=tuple(model.config.sites), mask=mask)
        return {**out.activations, "logits": out.logits}, reference_sites(hf, tokens, mask), real, tokens, mask

    def noise(text: str, padding: int = 0) -> str:
        ours, theirs, real, tokens, mask = both(text, padding)
        exact = float64_sites(hf, tokens, mask)
        figures = {"ours from theirs": (ours, theirs), "theirs from float64": (theirs, exact), "ours": (ours, exact)}
        return ", ".join(f"{name} {far(a, b, real)[0]:.1e}" for name, (a, b) in figures.items())

    errors = [far(*both(*prompt)[:3]) for prompt in PROMPTS]
    number = max(range(len(errors)), key=lambda i: errors[i][0])
    error, site, _ = errors[number]
    logits = max(error[2] for error in errors)
    note = f"float32's own noise, on the worst of the five: {noise(*PROMPTS[number])}; on an ill-conditioned one: {noise(HARBOUR)}."
    return verdict(
        f"{error:.1e} at {site}; logits {logits:.1e}", f"≤ {ROW:.0e}; logits ≤ {LOGITS:.0e}",
        error <= ROW and logits <= LOGITS, note=note, row_error=error, logit_error=logits, site=site, prompts=errors,
    )  # fmt: skip


def plain_row(model: Decoder, hf: Any, tokens: np.ndarray, bar: float = 0.65) -> Row:
    import torch

    hf.set_attn_implementation("sdpa")
    ids = torch.tensor(tokens)[None].long()
    theirs = torch.no_grad()(lambda: hf(ids, use_cache=False).logits)
    row = side_by_side(lambda: run(model, tokens), theirs, bar)
    # Every parameter multiplies once a token but the embedding, which is looked up; tied, it multiplies as unembedding.
    used = model.n_params - (0 if model.unembed is None else model.embed[...].size)
    n = 2048
    square = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    matmul = side_by_side(lambda: product(square).block_until_ready(), lambda: None, 1.0)
    rate, own = 2 * n**3 / matmul["seconds"], 2 * len(tokens) * used / row["seconds"]
    note = f"A float32 matrix product runs at {rate / 1e9:.0f} GFLOP/s here; our forward at {own / rate:.0%} of it."
    return {**row, "note": note, "matmul_flops": rate, "forward_flops": own}


def everything_row(model: Llama, directory: Path, tokenizer: Any, tokens: np.ndarray) -> Row:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    hf = hugging_face(directory)  # of its own: the bridge changes the modules that it wraps
    bridge: Any = TransformerBridge.boot_transformers(HUB_ID, hf_model=hf, tokenizer=tokenizer, device="cpu")
    ids = torch.tensor(tokens)[None].long()
    theirs = torch.no_grad()(lambda: bridge.run_with_cache(ids))
    row = side_by_side(lambda: run(model, tokens, capture=tuple(model.config.sites)), theirs, 0.7, pairs=11)
    note = (
        f"One run keeps {len(model.config.sites)} stacked sites of ours, {len(theirs()[1])} tensors of TransformerLens."
    )
    return {**row, "note": note}


def interventions(model: Llama) -> Iterator[tuple[bool, Any]]:
    """Ten kinds, eleven of each and whether it is the first: layers, heads, positions, strengths of many types."""
    sizes = model.config.sizes
    generator = np.random.default_rng(0)
    vector = generator.standard_normal(sizes["E"], dtype=np.float32)
    kinds: tuple[Callable[..., Any], ...] = (
        lambda layer, head, where, x: iv.HeadAblation(layer=layer, head=head, replacement=x),
        lambda layer, head, where, x: iv.QScaler(layer=layer, head=head, alpha=x),
        lambda layer, head, where, x: iv.KScaler(layer=layer, kv_head=head % sizes["K"], alpha=x),
        lambda layer, head, where, x: iv.SpectraScaler(layer=layer, head=head, alpha=abs(x)),
        lambda layer, head, where, x: iv.Steer(layer=layer, vector=vector, scale=x, positions=where),
        lambda layer, head, where, x: iv.DirectionAblation("resid_mid", layer, vector, positions=where),
        lambda layer, head, where, x: iv.ActivationPatch("z", layer, x, head=head, positions=where),
        lambda layer, head, where, x: iv.AttentionKnockout(layer=layer, head=head, query=where, key=head),
        lambda layer, head, where, x: iv.Ablation("act", layer, index=100 * int(head)),
        lambda layer, head, where, x: iv.Edit("attn_out", "scale", layer, value=x),
    )
    whole, real = (int, np.int32, np.int64, np.uint8), (float, np.float32, np.float64, np.float16)
    for make in kinds:
        for i in range(11):
            layer, head = (whole[i % 4](generator.integers(sizes[letter])) for letter in "LH")
            where = (i, -1 - i, [i, 3], np.int64(i), [-1], list(range(i + 1)))[i % 6]
            x = (i + 1, np.int32(i + 1))[i % 2] if i % 3 == 0 else real[i % 4](generator.normal())
            yield i == 0, make(layer, head, where, x)


def recompile_row(model: Llama, tokens: np.ndarray) -> Row:
    """The first of each kind compiles, the others must not; a listener that hears no first one would prove nothing."""
    firsts, others = [], []
    with compilations() as heard:
        for first, intervention in interventions(model):
            heard.clear()
            run(model, tokens[:16], interventions=intervention, logits="last")
            (firsts if first else others).append(len(heard))
    text = f"{sum(others)} in {len(others)} calls (at least {min(firsts)} in a first one)"
    return verdict(text, "0", sum(others) == 0 and min(firsts) > 0, compiles=sum(others), first_compiles=firsts)


def capture_bytes_row(model: Llama, tokens: np.ndarray) -> Row:
    """Output and temporary bytes of the compiled programs."""

    def size(*capture: CaptureSpec) -> int:
        memory = compiled(model, tokens, capture=capture).memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    one = size(CaptureSpec("pattern", (5, 6))) - size(CaptureSpec("pattern", (5,)))
    every = size(CaptureSpec("pattern")) - size()
    text = f"1/{every / max(one, 1):.1f}: {one / 1e6:.2f} MB, {every / 1e6:.2f} MB"
    return verdict(text, "≤ 1/25", 0 < one * 25 <= every, one_layer_bytes=one, all_layers_bytes=every)


def compile_row(model: Llama, tokens: np.ndarray) -> Row:
    """Tracing, lowering and compiling with nothing cached, in memory or on disk."""
    times = []
    for _ in range(3):
        jax.clear_caches()
        start = time.perf_counter()
        compiled(model, tokens, capture=GUIDE)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return verdict(f"{seconds:.2f} s ({min(times):.2f}–{max(times):.2f})", "≤ 2 s", seconds <= 2, seconds=seconds)


def load_row() -> Row:
    """Peak memory of loading, in a process of its own, over the bytes of the parameters."""
    if not Path("/proc/self/status").exists():
        return verdict("needs Linux's /proc", "", None)
    found = in_a_fresh_process()
    more, size = found["peak"] - found["before"], found["parameters"]
    text = f"{more / size:.3f}: {more / 1e9:.3f} GB, {size / 1e9:.3f} GB"
    return verdict(text, "≤ 1.15", more <= 1.15 * size, ratio=more / size, **found)


def main() -> None:
    args = arguments(str(__doc__))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, dtype="float32")
    hf = hugging_face(args.model) if installed("torch") else None
    tokens = np.resize(np.array(tokenizer(HARBOUR).input_ids, np.int32), N_TOKENS)

    def against_plain(bar: float, **options: Any) -> Row:
        return side_by_side(lambda: run(model, tokens, **options), lambda: run(model, tokens), bar)

    early = CaptureSpec("resid_post", (2,))
    plan: Plan = [
        ("every site and the logits: from Hugging Face's", "torch", lambda: parity_row(model, hf, tokenizer)),
        ("plain forward: of Hugging Face's time", "torch", lambda: plain_row(model, hf, tokens)),
        ("the guide's full capture: of a plain forward's time", "", lambda: against_plain(1.4, capture=GUIDE)),
        ("every site captured: of TransformerLens run_with_cache's time", "transformer_lens",
         lambda: everything_row(model, args.model, tokenizer, tokens)),
        ("compilations after the first of a kind of intervention", "", lambda: recompile_row(model, tokens)),
        ("patterns of one layer more: of all layers' bytes", "", lambda: capture_bytes_row(model, tokens)),
        ("resid_post of layer 2 alone: of a plain forward's time", "",
         lambda: against_plain(0.2, capture=early, logits="none")),
        ("first compile of the full capture", "", lambda: compile_row(model, tokens)),
        ("peak memory of loading 1B in bfloat16: of its parameters' bytes", "", load_row),
    ]  # fmt: skip
    measure(plan, f"1×{N_TOKENS}", args)


if __name__ == "__main__":
    main()
