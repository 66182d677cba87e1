"""What learning an intervention costs: `python benchmarks/learning.py [--model DIR] [--json OUT]`.

A step of an alignment search in SmolLM2-135M, beside the gradient that it cannot do without; thirty fits as one program; what
learnt scores of nodes are worth beside gradients, and constants that were fitted beside means and zeros; and the Jacobian lens
beside TransformerLens's, fitted to the same texts.
"""

from __future__ import annotations

from table import Plan, Row, arguments, compilations, measure, side_by_side, verdict  # isort: skip

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import embedded_model, forward, padded, training
from oculi_jax.circuits import Scores, edge_attribution, faithfulness
from oculi_jax.intervention import Steer
from oculi_jax.metrics import bootstrap, logit_difference
from oculi_jax.models.llama import Llama
from oculi_jax.tasks import indirect_object
from oculi_jax.training import DAS, OptimalAblation, fit, fit_jacobian_lens, matryoshka, optimal_ablation
from oculi_jax.training.fitting import check_parameters
from oculi_jax.training.interchanges import Pairs, prepare
from oculi_jax.training.searching import search_loss
from oculi_jax.training.steps import Loss, Now, Programs
from oculi_jax.utils.tokens import load_tokenizer

LAYER, N, RANK = 20, 16, 8
N_PAIRS, STEPS = 160, 500  # of which a quarter is held out
TEXTS = (
    "The library at the end of the street had been closed for years, but every evening a light went on in its upper window.",
    "When Mary and John went to the store after school, John gave a drink to Mary, and then they all went home together by bus.",
    "There was a small museum of clocks in the old town, and its keeper wound each of them by hand on the first day of the month.",
)


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


def jacobian_row(model: Any, tokenizer: Any, directory: Path) -> Row:
    """The Jacobian lens of two of three texts, the third being kept back, and TransformerLens's of the same two."""
    from peers import TransformerLens
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    bridge = TransformerLens(directory, tokenizer, (0, 1), "cpu").bridge.eval()
    rows = [np.asarray(bridge.to_tokens(text)[0]) for text in TEXTS]
    tokens, mask = padded(rows, tokenizer)
    begin = time.perf_counter()
    own = fit_jacobian_lens(model, tokens, mask=mask, key=jax.random.key(0), controls=False, progress=False)
    middle = time.perf_counter()
    texts = [text for i, text in enumerate(TEXTS) if i not in own.held_out]
    theirs = JacobianLens.fit(bridge, texts, corpus="two texts", show_progress=False)
    seconds, other = middle - begin, time.perf_counter() - middle
    assert isinstance(own.lens, training.JacobianLens)
    found = np.asarray(own.lens.matrix)[:-1]
    want = np.stack([theirs.jacobians[layer].numpy() for layer in range(len(found))])
    apart = float((np.abs(found - want).max(axis=(1, 2)) / np.abs(want).max(axis=(1, 2))).max())
    said = f"{apart:.1e} of a matrix's largest entry; {seconds:.0f} s with compiling, {other:.0f} s"
    return verdict(said, "≤ 1e-3", apart <= 1e-3, apart=apart, seconds=seconds, other_seconds=other)


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
    text += f"; three seeds {apart:.3f} apart; shuffled answers {found.controls['shuffled answers'].cpr:.2f}"
    first = values["Matryoshka"] == max(values.values())
    ok = first and all(x > values["random"] for name, x in values.items() if name != "random") and apart <= 0.03
    return verdict(text, "Matryoshka first, all above random; seeds within 0.03", ok, values=values, seeds=seeds)


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    plan: Plan = [
        (f"a step of an alignment search, layer {LAYER}, {N} prompts: of forward and backward of the last layers", "",
         partial(step_row, model, tokenizer)),
        ("30 fits of SmolLM2, a program a layer: of as many single ones", "", partial(layers_row, model, tokenizer)),
        ("30 fits as one program, tiny-facts, 100 steps: of as many single ones", "", seeds_row),
        ("optimal ablation of each head and MLP, tiny-facts: divergence in nats, held out", "", constants_row),
        ("the same of three layers of SmolLM2, indirect objects", "", partial(large_constants_row, model, tokenizer)),
        ("the Jacobian lens of two texts: TransformerLens's", "transformer_lens",
         partial(jacobian_row, model, tokenizer, args.model)),
        (f"CPR of nodes on {N_PAIRS // 4} held-out pairs of indirect objects, {STEPS} steps", "",
         partial(ranking_row, model, tokenizer)),
    ]  # fmt: skip
    measure(plan, "Learning interventions", args)


if __name__ == "__main__":
    main()
