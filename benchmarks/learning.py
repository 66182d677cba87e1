"""What learning an intervention costs: `python benchmarks/learning.py [--model DIR] [--json OUT]`.

A step of an alignment search in SmolLM2-135M, beside the gradient that it cannot do without; thirty fits as one program; and what
constants that were fitted cost beside means and zeros.
"""

from __future__ import annotations

from table import Plan, Row, arguments, measure, side_by_side, verdict  # isort: skip

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import embedded_model, forward, padded
from oculi_jax.intervention import Steer
from oculi_jax.metrics import bootstrap
from oculi_jax.models.llama import Llama
from oculi_jax.tasks import indirect_object
from oculi_jax.training import OptimalAblation, alignment, fit, optimal_ablation
from oculi_jax.training.fitting import check_parameters
from oculi_jax.training.interchanges import prepare
from oculi_jax.training.steps import Loss, Now, Programs
from oculi_jax.utils.tokens import load_tokenizer

LAYER, N, RANK = 20, 16, 8


def step_row(model: Any, tokenizer: Any) -> Row:
    """One step at layer 20 of 16 pairs of indirect objects, and forward and backward of the layers from there on."""
    import optax

    pairs = indirect_object(tokenizer, N)
    found = prepare(
        model, pairs.clean, pairs.corrupted, np.asarray(pairs.answers), LAYER, "resid_pre", -1, None,
        (pairs.mask, pairs.mask),
    )  # fmt: skip
    examples = {**found.examples(np.arange(N)), "shuffled": jnp.asarray(pairs.others)}
    drawn = np.random.default_rng(0).normal(size=(found.width, RANK)).astype(np.float32)
    begun, _ = check_parameters({"basis": drawn, "shuffled": np.int32(0)}, 0)
    now = jax.eval_shape(lambda: Now(jnp.int32(0), jax.random.key(0), None))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    loss = Loss.of(alignment.search_loss(model, "resid_pre", LAYER, -1), begun, example, now)
    programs = Programs.of(loss, optax.adam(1e-2), begun, N, data=examples, schedules=None, key=jax.random.key(0))
    order, state = np.arange(N, dtype=np.int32)[None], programs.state(begun.trained)

    def step() -> None:
        nonlocal state
        state, losses = programs.block(state, order, 0, 1)
        jax.block_until_ready(losses)

    @jax.jit
    def slopes(model: Any, examples: Any) -> Any:
        def value(resid: jax.Array) -> jax.Array:
            def one(resid: jax.Array, example: Any) -> jax.Array:
                logits = forward(
                    model, example["tokens"], mask=example["mask"], logits="last", start=(LAYER, resid)
                ).logits
                assert logits is not None
                return jax.nn.logsumexp(logits) - logits[example["label"]]

            return jnp.mean(jax.vmap(one)(resid, examples))

        return jax.value_and_grad(value)(examples["resid"])

    return side_by_side(step, lambda: jax.block_until_ready(slopes(model, examples)), bar=1.3, pairs=9)


def seeds_row() -> Row:
    """Thirty directions on tiny-facts as one program, beside single fits: ten times the time of three. Both compile."""
    model, tokenizer = embedded_model()
    texts = [f"The capital of {country} is" for country in ("Italy", "France", "Spain", "Norway")]
    tokens = np.array([tokenizer.encode(text) for text in texts])
    target = tokenizer.encode("Paris")[-1]

    def loss(vector: jax.Array, ids: jax.Array) -> jax.Array:
        logits = forward(model, ids, Steer(2, vector), logits="last").logits
        assert logits is not None
        return jax.nn.logsumexp(logits) - logits[target]

    starts = np.random.default_rng(0).normal(size=(30, model.config.hidden_size)).astype(np.float32)
    settings: Any = dict(steps=100, batch_size=4, key=jax.random.key(0), progress=False)
    begin = time.perf_counter()
    together = fit(loss, starts, tokens, many=1, **settings).parameters
    middle = time.perf_counter()
    alone = np.stack([fit(loss, start, tokens, **settings).parameters for start in starts[:3]])
    share = (middle - begin) / (10 * (time.perf_counter() - middle))
    apart = float(np.abs(np.asarray(together)[:3] - alone).max())
    return verdict(
        f"{share:.2f}×; {apart:.1e} apart", "≤ 0.3×; 1e-4", share <= 0.3 and apart <= 1e-4, ratio=share, apart=apart
    )


def constants_row(steps: int = 200) -> Row:
    """All heads and MLPs of tiny-facts, on two phrasings of the capital, the language and the currency of every country."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
    import tiny_facts_text as text  # type: ignore[import-not-found]

    model, tokenizer = embedded_model()
    kinds = text.CAPITAL, text.LANGUAGE, text.CURRENCY
    facts = [phrasing.split(" {x}")[0] for kind in kinds for phrasing in kind[:2]]
    tokens, mask = padded([fact.format(p=row[0]) for row in text.WORLD for fact in facts], tokenizer)
    return judged(optimal_ablation(model, tokens, mask=mask, steps=steps, key=jax.random.key(0), progress=False))


def large_constants_row(model: Any, tokenizer: Any) -> Row:
    """The units of three layers of SmolLM2, on indirect objects."""
    pairs = indirect_object(tokenizer, 96)
    settings: Any = dict(layers=[5, 15, 25], steps=60, batch_size=8, key=jax.random.key(0), progress=False)
    return judged(optimal_ablation(model, pairs.clean, mask=pairs.mask, **settings))


def judged(found: OptimalAblation) -> Row:
    """Held out, beside mean and zero ablation: on average, and unit by unit with intervals over prompts."""
    own, mean, zero = (float(x.mean()) for x in (found.loss, found.mean_loss, found.zero_loss))
    effect = bootstrap((found.mean_loss - found.whole_loss).T)
    clear = np.asarray(effect.mean > (effect.high - effect.low) / 2)
    spreads = [bootstrap((found.loss - other).T) for other in (found.mean_loss, found.zero_loss)]
    lower = np.asarray(spreads[0].mean < 0)
    above = max(float(jnp.max(2 * x.mean / (x.high - x.low))) for x in spreads)
    missed = [name for name, bad in zip(found.units, clear & ~lower, strict=True) if bad]
    where = f" (not {', '.join(missed)})" if missed else ""
    told = f"{own:.4f}; mean {mean:.4f}, zero {zero:.4f}; lower in {(clear & lower).sum()} of {clear.sum()} units"
    return verdict(
        f"{told}{where}; {above:.2f} half intervals above at most",
        "lower; in all; ≤ 1", own < min(mean, zero) and not missed and above <= 1,
        own=own, mean=mean, zero=zero, above=above, missed=missed,
    )  # fmt: skip


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    plan: Plan = [
        (f"a step of an alignment search, layer {LAYER}, {N} prompts: of forward and backward of the last layers", "",
         partial(step_row, model, tokenizer)),
        ("30 fits as one program, tiny-facts, 100 steps: of as many single ones", "", seeds_row),
        ("optimal ablation of each head and MLP, tiny-facts: divergence in nats, held out", "", constants_row),
        ("the same of three layers of SmolLM2, indirect objects", "", partial(large_constants_row, model, tokenizer)),
    ]  # fmt: skip
    measure(plan, "Learning interventions", args)


if __name__ == "__main__":
    main()
