"""What that which is learnt is worth: `python benchmarks/learnt.py [--model DIR] [--json OUT]`.

Constants that were fitted beside means and zeros; capitals moved by rank-one edits; the Jacobian lens beside TransformerLens's, of
the same texts; and learnt scores of nodes beside gradients. All judged on prompts that were kept back.
"""

from __future__ import annotations

from table import Plan, Row, arguments, measure, verdict  # isort: skip

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from oculi_jax import embedded_model, padded, training
from oculi_jax.circuits import Scores, edge_attribution, faithfulness
from oculi_jax.metrics import bootstrap, logit_difference
from oculi_jax.models.llama import Llama
from oculi_jax.tasks import indirect_object
from oculi_jax.training import OptimalAblation, fit_jacobian_lens, matryoshka, optimal_ablation, rank_one_edit
from oculi_jax.utils.tokens import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))
from tiny_facts_text import CAPITAL, CONTINENT, CURRENCY, LANGUAGE, WORLD

N_PAIRS, STEPS = 160, 500  # of which a quarter is held out
TEXTS = (
    "The library at the end of the street had been closed for years, but every evening a light went on in its upper window.",
    "When Mary and John went to the store after school, John gave a drink to Mary, and then they all went home together by bus.",
    "There was a small museum of clocks in the old town, and its keeper wound each of them by hand on the first day of the month.",
)


def constants_row(steps: int = 200) -> Row:
    """All heads and MLPs of tiny-facts, on two phrasings of the capital, the language and the currency of every country."""
    model, tokenizer = embedded_model()
    kinds = CAPITAL, LANGUAGE, CURRENCY
    facts = [phrasing.split(" {x}")[0] for kind in kinds for phrasing in kind[:2]]
    tokens, mask = padded([fact.format(p=row[0]) for row in WORLD for fact in facts], tokenizer)
    return judged(optimal_ablation(model, tokens, mask=mask, steps=steps, key=jax.random.key(0), progress=False))


def large_constants_row(model: Any, tokenizer: Any) -> Row:
    """The units of two layers of SmolLM2, on indirect objects."""
    pairs = indirect_object(tokenizer, 48)
    settings: Any = dict(layers=[20, 28], steps=60, batch_size=8, key=jax.random.key(0), progress=False)
    return judged(optimal_ablation(model, pairs.clean, mask=pairs.mask, **settings))


def judged(found: OptimalAblation) -> Row:
    """Held out, beside mean and zero ablation: on average, and unit by unit with intervals over prompts."""
    own, mean, zero = (float(x.mean()) for x in (found.loss, found.mean_loss, found.zero_loss))
    effect = bootstrap((found.mean_loss - found.whole_loss).T)
    clear = np.asarray(effect.mean > (effect.high - effect.low) / 2)
    spreads = [bootstrap((found.loss - other).T) for other in (found.mean_loss, found.zero_loss)]
    lower = np.asarray(spreads[0].mean < 0)
    # Where a unit's constant is its mean, or zero, there is no difference and no interval.
    above = max(float(np.max(2 * x.mean / np.maximum(x.high - x.low, 1e-30))) for x in spreads)
    missed = [name for name, bad in zip(found.units, clear & ~lower, strict=True) if bad]
    where = f" (not {', '.join(missed)})" if missed else ""
    told = f"{own:.4f}; mean {mean:.4f}, zero {zero:.4f}; lower in {(clear & lower).sum()} of {clear.sum()} units"
    return verdict(
        f"{told}{where}; {above:.2f} half intervals above at most",
        "lower; in all; ≤ 1", own < min(mean, zero) and not missed and above <= 1,
        own=own, mean=mean, zero=zero, above=above, missed=missed,
    )  # fmt: skip


def edits_row() -> Row:
    """Each country of tiny-facts in an edit of its own given the next one's capital; two of five phrasings are kept back.

    What is to stay: everything about the other countries, and the edited one's continent, language and currency.
    """
    model, tokenizer = embedded_model()
    facts = [(text, 1, i in (0, 3)) for i, text in enumerate(CAPITAL)]
    facts += [
        (text, n, i == 1)
        for n, some in ((2, CONTINENT), (3, LANGUAGE), (4, CURRENCY))
        for i, text in enumerate(some[:2])
    ]
    rows = [(number, row, *fact) for number, row in enumerate(WORLD) for fact in facts]
    tokens, mask = padded([text.partition(" {x}")[0].format(p=row[0]) for _, row, text, *_ in rows], tokenizer)
    country, column, held = (
        np.array(x) for x in zip(*((number, n, back) for number, _, _, n, back in rows), strict=True)
    )
    own = np.array([tokenizer.encode(row[n])[-1] for _, row, _, n, _ in rows])
    capitals = np.array([tokenizer.encode(row[1])[-1] for row in WORLD])
    edited = np.arange(len(WORLD))[:, None]
    answers = np.where((country == edited) & (column == 1), np.roll(capitals, -1)[:, None], own)
    settings: Any = dict(layer=3, steps=60, held_out=held, mask=mask, key=jax.random.key(0))
    found = rank_one_edit(model, tokens, answers, **settings)
    facts_kept = found.hits[(country[found.held_out] == edited) & ~found.changes]
    changed, kept = float(found.changed.mean()), float(found.kept.mean())
    others = ", ".join(f"{name} {hits[found.changes].mean():.2f}" for name, hits in found.controls.items())
    told = (
        f"{changed:.2f} of {found.changed.size} ({others}); {kept:.3f} of {found.kept.size}, "
        f"of the edited countries' own {facts_kept.mean():.2f} of {facts_kept.size}"
    )
    return verdict(told, "≥ 0.9; ≥ 0.95", changed >= 0.9 and kept >= 0.95, changed=changed, kept=kept)


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
    # By more than what circuits of nothing differ by: these have 0.25, half of the last interval of sizes, as random ones do.
    above = all(x.low > spreads["random"].high + 0.01 for name, x in spreads.items() if name != "random")
    ok = first and above and apart <= 0.03
    return verdict(text, "Matryoshka first, all above random; seeds within 0.03", ok, values=values, seeds=seeds)


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    plan: Plan = [
        ("optimal ablation of each head and MLP, tiny-facts: divergence in nats, held out", "", constants_row),
        ("the same of two layers of SmolLM2, indirect objects", "", partial(large_constants_row, model, tokenizer)),
        ("every capital of tiny-facts moved by an edit of its own: held-out prompts that change, that stay", "", edits_row),
        ("the Jacobian lens of two texts: TransformerLens's", "transformer_lens",
         partial(jacobian_row, model, tokenizer, args.model)),
        (f"CPR of nodes on {N_PAIRS // 4} held-out pairs of indirect objects, {STEPS} steps", "",
         partial(ranking_row, model, tokenizer)),
    ]  # fmt: skip
    measure(plan, "What is learnt", args)


if __name__ == "__main__":
    main()
