"""What the guide's chapters cost, beside Hugging Face: `python benchmarks/guide.py [--model DIR] [--json OUT]`.

Decoding alternates with Hugging Face's `generate`, in one process, once both are warm; ratios are of tokens a second.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from table import Plan, Row, arguments, hugging_face, installed, measure, verdict  # isort: skip

import jax
import numpy as np

from oculi_jax import generate
from oculi_jax.analysis import AttributionMethods, CompositionAnalysis
from oculi_jax.intervention import HeadAblation
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

FRANCE = "The capital of France is"
N_NEW = 64
HEADS = [(layer, head) for layer in (4, 11, 17, 23) for head in (0, 3, 5, 8)]  # sixteen


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def their_ids(hf: Any, ids: list[int], ablate: tuple[int, int] | None = None) -> list[int]:
    """Hugging Face's greedy continuation, with one head's output zeroed by a hook where one is named."""
    import torch

    handles = []
    if ablate is not None:
        layer, head = ablate
        dim = hf.config.head_dim

        def zero(_: Any, args: Any) -> Any:
            z = args[0].clone()
            z[..., head * dim : (head + 1) * dim] = 0
            return (z,)

        handles.append(hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero))
    try:
        with torch.no_grad():
            out = hf.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=N_NEW, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return out[0, len(ids) :].tolist()


def decoding_row(ours: Callable[[], Any], theirs: Callable[[], Any], bar: float, n_ours: int, pairs: int) -> Row:
    """Tokens a second of ours over theirs, alternating; the two must write the same."""
    wrote = np.atleast_2d(ours()).tolist() == np.atleast_2d(theirs()).tolist()
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    ratios = [other / own for own, other in times]
    ratio, own, other = map(statistics.median, (ratios, *zip(*times, strict=True)))
    text = (
        f"{ratio:.2f} ({min(ratios):.2f}–{max(ratios):.2f}): {n_ours / own:.1f} and {n_ours / other:.1f} tokens/s, "
        f"{'the same' if wrote else 'DIFFERENT'} ids"
    )
    return verdict(
        text, f"≥ {bar}", ratio >= bar and wrote, ratio=ratio, ratios=ratios, seconds=own, other_seconds=other
    )


def one_row(model: Llama, hf: Any, ids: list[int]) -> Row:
    return decoding_row(
        lambda: generate(model, ids, N_NEW, stop_tokens=()), lambda: their_ids(hf, ids), 1.2, N_NEW, pairs=9
    )


def sixteen_row(model: Llama, hf: Any, ids: list[int]) -> Row:
    layers, heads = np.array(HEADS).T
    return decoding_row(
        lambda: generate(model, ids, N_NEW, HeadAblation(layers, heads), stop_tokens=()),
        lambda: [their_ids(hf, ids, head) for head in HEADS],
        7.0, len(HEADS) * N_NEW, pairs=3,
    )  # fmt: skip


def composition_row(model: Llama) -> Row:
    """Compiling is apart."""
    first = seconds(lambda: CompositionAnalysis.weight_composition(model))
    times = [seconds(lambda: CompositionAnalysis.weight_composition(model)) for _ in range(5)]
    median = statistics.median(times)
    size = model.config.sizes
    pairs = size["L"] * (size["L"] - 1) // 2
    rate = 3 * pairs * 2 * (size["H"] * size["D"]) ** 2 * size["E"] / median
    text = f"{median:.2f} s ({min(times):.2f}–{max(times):.2f}); compiling {max(first - median, 0):.1f} s more"
    return verdict(text, "≤ 5 s", median <= 5, seconds=median, note=f"{rate / 1e9:.0f} GFLOP/s.")


def completeness_row(adapter: LlamaAttentionAdapter) -> Row:
    """The worst of four attributions: parts of the answer's logit that are missing, over the logit."""
    full, model = adapter.capture_full(FRANCE), adapter.model
    token, weights = adapter.to_single_token(" Paris"), model.lm_head.weight
    results = [
        AttributionMethods.direct_logit_attribution(full.residual, weights, token),
        AttributionMethods.component_attribution(full.residual, full.mlp, weights, token),
        AttributionMethods.head_attribution(full.attention, model, token, residual=full.residual),
        AttributionMethods.neuron_attribution(full.mlp, model, token, residual=full.residual),
    ]
    worst = max(abs(float(r.completeness_error) / float(r.details["logit"])) for r in results)  # type: ignore[arg-type]
    return verdict(f"{worst:.1e}", "≤ 1e-3", worst <= 1e-3, error=worst)


def main() -> None:
    args = arguments(str(__doc__))
    from oculi_jax.utils.tokens import load_tokenizer

    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    hf = hugging_face(args.model) if installed("torch") else None
    ids = tokenizer.encode(FRANCE)
    plan: Plan = [
        ("Q-, K- and V-composition of all pairs of heads, from the weights", "", lambda: composition_row(model)),
        (f"greedy decoding of {N_NEW} tokens: of Hugging Face's tokens/s", "torch", lambda: one_row(model, hf, ids)),
        ("sixteen ablated decodes in one program: of Hugging Face's, one after another", "torch",
         lambda: sixteen_row(model, hf, ids)),
        ("what attribution misses of the logit", "", lambda: completeness_row(LlamaAttentionAdapter(model, tokenizer))),
    ]  # fmt: skip
    measure(plan, f"prompt of {len(ids)} tokens", args)


if __name__ == "__main__":
    main()
