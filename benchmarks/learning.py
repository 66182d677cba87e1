"""What learning an intervention costs: `python benchmarks/learning.py [--model DIR] [--json OUT]`.

A step of an alignment search in SmolLM2-135M, beside the gradient that it cannot do without; thirty fits as one program; and what
learnt scores of nodes are worth beside gradients.
"""

from __future__ import annotations

from table import Plan, Row, arguments, measure, side_by_side, verdict  # isort: skip

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import embedded_model, forward
from oculi_jax.circuits import Scores, edge_attribution, faithfulness
from oculi_jax.intervention import Steer
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import Llama
from oculi_jax.tasks import indirect_object
from oculi_jax.training import alignment, fit, matryoshka
from oculi_jax.training.fitting import check_parameters
from oculi_jax.training.interchanges import prepare
from oculi_jax.training.steps import Loss, Now, Programs
from oculi_jax.utils.tokens import load_tokenizer

LAYER, N, RANK = 20, 16, 8
N_PAIRS, STEPS = 160, 500  # of which a quarter is held out


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


def ranking_row(model: Any, tokenizer: Any) -> Row:
    """CPR of circuits of nodes on held-out pairs, with bootstrap intervals: learnt by three seeds, and by others' scores."""
    pairs = indirect_object(tokenizer, N_PAIRS)
    given: Any = dict(mask=pairs.mask, steps=STEPS, seeds=3, key=jax.random.key(0))
    found = matryoshka(model, pairs.clean, pairs.corrupted, pairs.metric, **given)

    def some(rows: np.ndarray) -> dict[str, Any]:
        metric = logit_difference(pairs.answers[rows], pairs.others[rows])
        return dict(clean=pairs.clean[rows], corrupted=pairs.corrupted[rows], metric=metric, mask=pairs.mask[rows])

    rest, judges = some(np.setdiff1d(np.arange(N_PAIRS), found.held_out)), some(found.held_out)
    curves = {"Matryoshka": found.curve}
    for name, steps in (("EAP-IG", 5), ("gradient", 1)):
        scores = edge_attribution(model, **rest, steps=steps)
        curves[name] = faithfulness(model, Scores(scores.nodes, scores.graph), **judges)
    curves["random"] = found.controls["random scores"]
    spreads = {name: curve.interval("cpr") for name, curve in curves.items()}
    values = {name: curve.cpr for name, curve in curves.items()}
    seeds = [curve.cpr for curve in found.seeds]
    apart = max(seeds) - min(seeds)
    text = ", ".join(f"{name} {x.mean:.2f} ({x.low:.2f} to {x.high:.2f})" for name, x in spreads.items())
    text += f"; three seeds {apart:.3f} apart; exchanged pairs {found.controls['exchanged pairs'].cpr:.2f}"
    first = values["Matryoshka"] == max(values.values())
    ok = first and all(x > values["random"] for name, x in values.items() if name != "random") and apart <= 0.03
    return verdict(text, "Matryoshka first, all above random; seeds within 0.03", ok, values=values, seeds=seeds)


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    plan: Plan = [
        (f"a step of an alignment search, layer {LAYER}, {N} prompts: of forward and backward of the last layers", "",
         partial(step_row, model, tokenizer)),
        ("30 fits as one program, tiny-facts, 100 steps: of as many single ones", "", seeds_row),
        (f"CPR of nodes on {N_PAIRS // 4} held-out pairs of indirect objects, {STEPS} steps", "",
         partial(ranking_row, model, tokenizer)),
    ]  # fmt: skip
    measure(plan, "Learning interventions", args)


if __name__ == "__main__":
    main()
