"""What learning an intervention costs: `python benchmarks/learning.py [--model DIR] [--json OUT]`.

A step of an alignment search in SmolLM2-135M, beside the gradient that it cannot do without, and thirty fits as one program.
"""

from __future__ import annotations

from table import Plan, Row, arguments, compilations, measure, side_by_side, verdict  # isort: skip

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import embedded_model, forward
from oculi_jax.intervention import Steer
from oculi_jax.models.llama import Llama
from oculi_jax.tasks import indirect_object
from oculi_jax.training import DAS, fit
from oculi_jax.training.fitting import check_parameters
from oculi_jax.training.interchanges import Pairs, prepare
from oculi_jax.training.searching import search_loss
from oculi_jax.training.steps import Loss, Now, Programs
from oculi_jax.utils.tokens import load_tokenizer

LAYER, N, RANK = 20, 16, 8


def programs_of(found: Pairs, examples: Any, bases: Any) -> tuple[Programs, dict[str, Any]]:
    """The steps of alignment searches from bases `[R, n, r]`, as one program, and the state that they begin with."""
    import optax

    n = len(bases)
    start = {"own": {"basis": bases}, "place": np.zeros(n, np.int32), "shuffled": np.zeros(n, np.int32)}
    begun, _ = check_parameters(start, 1)
    now = jax.eval_shape(lambda: Now(jnp.int32(0), jax.random.key(0), None))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    loss = Loss.of(search_loss(DAS(RANK), found, None), begun, example, now)
    fixed = {"data": examples, "schedules": None, "key": jax.random.key(0)}
    programs = Programs.of(loss, optax.adam(1e-2), begun, len(examples["tokens"]), **fixed)
    return programs, programs.state(begun.trained)


def pairs_at(model: Any, tokenizer: Any, n: int, layers: Any) -> list[tuple[Pairs, Any]]:
    """Indirect objects as they are at each layer, and as the examples of a fit."""
    pairs = indirect_object(tokenizer, n)
    given = np.asarray(pairs.answers), layers, "resid_pre", -1, None, (pairs.mask, pairs.mask)
    found = prepare(model, pairs.clean, pairs.corrupted, *given)
    return [(own, {**own.examples(np.arange(n)), "shuffled": jnp.asarray(pairs.others)}) for own in found]


def step_row(model: Any, tokenizer: Any) -> Row:
    """One step at layer 20 of 16 pairs of indirect objects, and forward and backward of the layers from there on."""
    ((found, examples),) = pairs_at(model, tokenizer, N, LAYER)
    drawn = np.random.default_rng(0).normal(size=(1, found.width, RANK)).astype(np.float32)
    programs, state = programs_of(found, examples, drawn)
    order = np.arange(N, dtype=np.int32)[None]

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


def layers_row(model: Any, tokenizer: Any) -> Row:
    """Thirty fits, five layers × six seeds, three steps of eight pairs: a program a layer, beside single fits. Compiling apart."""
    order, rng = np.tile(np.arange(8, dtype=np.int32), (3, 1)), np.random.default_rng(0)
    together, single, apart, compiled = 0.0, 0.0, 0.0, 0
    for found, examples in pairs_at(model, tokenizer, 8, range(25, 30)):
        bases = rng.normal(size=(6, found.width, RANK)).astype(np.float32)
        ends: list[Any] = []
        for programs, every in ((programs_of(found, examples, bases)[0], [bases]),
                                (programs_of(found, examples, bases[:1])[0], list(bases[:, None]))):  # fmt: skip
            for number, some in enumerate((every[0], *every)):  # the first compiles
                state = programs.state([jnp.asarray(some)])
                with compilations() as heard:
                    begin = time.perf_counter()
                    state, _ = jax.block_until_ready(programs.block(state, order, 0, 3))
                    took = time.perf_counter() - begin
                if not number:
                    compiled += len(heard) if len(every) == 1 else 0
                    continue
                ends.append(np.linalg.qr(np.asarray(state["trained"][0]))[0])
                together, single = (together + took, single) if len(every) == 1 else (together, single + took)
        apart = max(apart, float(np.abs(ends[0] - np.concatenate(ends[1:])).max()))
    share = together / single
    ok = share <= 1.1 and apart <= 1e-4 and compiled == 5
    told = (
        f"{share:.2f}×: {together:.1f} s, {single:.1f} s; subspaces {apart:.1e} apart; {compiled} programs of 5 layers"
    )
    return verdict(told, "≤ 1.1×; 1e-4; one a layer", ok, ratio=share, apart=apart, compiled=compiled)


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


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    plan: Plan = [
        (f"a step of an alignment search, layer {LAYER}, {N} prompts: of forward and backward of the last layers", "",
         partial(step_row, model, tokenizer)),
        ("30 fits of SmolLM2, a program a layer: of as many single ones", "", partial(layers_row, model, tokenizer)),
        ("30 fits as one program, tiny-facts, 100 steps: of as many single ones", "", seeds_row),
    ]  # fmt: skip
    measure(plan, "What fits cost", args)


if __name__ == "__main__":
    main()
