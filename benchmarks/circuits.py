"""Edges, circuits and estimates on MIB's indirect objects: `python benchmarks/circuits.py [--model DIR] [--json OUT]`.

What each method of attribution is worth on SmolLM2-135M, beside exact effects and MIB's own numbers; and what scores of all
edges, and curves, cost beside plain gradients and plain forwards.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from table import Plan, Row, arguments, measure, side_by_side, verdict  # isort: skip

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import SHAPES
from safetensors.numpy import load_file, save_file

from oculi_jax import Edit, forward, rules
from oculi_jax.causal import attribution_patching, verify
from oculi_jax.circuits import Circuit, Curve, Graph, Scores, edge_attribution, edges, faithfulness
from oculi_jax.circuits.pairs import Batch
from oculi_jax.metrics import check_metric, logit_difference
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig
from oculi_jax.tasks import PromptPairs, indirect_object
from oculi_jax.utils.tokens import load_tokenizer
from tests.tiny import tiny_llama

N_PAIRS = 40  # to score on; as many others to judge on
FEW = 20


def given(pairs: PromptPairs) -> dict[str, Any]:
    return dict(clean=pairs.clean, corrupted=pairs.corrupted, metric=pairs.metric, mask=pairs.mask)


def edges_row(model: Any, pairs: PromptPairs) -> Row:
    """All edges by EAP, beside the gradient with respect to the embeddings."""

    @jax.jit
    def slopes(model: Any, tokens: jax.Array, mask: jax.Array, metric: Any) -> jax.Array:
        def one(tokens: jax.Array, mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            def value(added: jax.Array) -> jax.Array:
                pushed = Edit("embed", "add", None, value=added)
                logits = forward(model, tokens, pushed, mask=mask, logits="last").logits
                return (logits[..., a] - logits[..., b]).sum()

            return jax.grad(value)(jnp.zeros((len(tokens), model.config.hidden_size)))

        return jax.vmap(one)(tokens, mask, *metric)

    answers = np.asarray(pairs.answers), np.asarray(pairs.others)
    return side_by_side(
        lambda: jax.block_until_ready(edge_attribution(model, **given(pairs)).values),
        lambda: jax.block_until_ready(slopes(model, pairs.clean, pairs.mask, answers)),
        bar=3.0, pairs=3,
    )  # fmt: skip


def curve_row(model: Any, pairs: PromptPairs, scores: Scores) -> Row:
    """Ten sizes, beside as many plain forwards of the same prompts."""

    def plain() -> None:
        for _ in range(10):
            jax.block_until_ready(last_logits(model, pairs.clean, pairs.mask))

    return side_by_side(lambda: faithfulness(model, scores, **given(pairs)), plain, bar=4.0, pairs=1)


@jax.jit
def last_logits(model: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Of the last real token of each prompt, `[B, V]`."""
    return jax.vmap(lambda *row: forward(model, row[0], mask=row[1], logits="last").logits)(tokens, mask)


def methods_of(model: Any, pairs: PromptPairs) -> dict[str, Scores]:
    """What the board of MIB compares, scored on some pairs."""
    graph = Graph.of(model.config)
    drawn = np.random.default_rng(0).normal(size=graph.edges.shape).astype(np.float32)
    return {
        "random": Scores(jnp.asarray(drawn * graph.edges), graph),
        "EAP": edge_attribution(model, **given(pairs)),
        "EAP-IG": edge_attribution(model, **given(pairs), steps=5),
        "RelP": edge_attribution(model, **given(pairs), rules=rules.relp(model.config)),
    }


def mib_row(model: Any, methods: dict[str, Scores], pairs: PromptPairs, of: str) -> Row:
    """CPR of circuits chosen by signed score, or CMD of those chosen by magnitude."""

    def curve(scores: Scores) -> Curve:
        return faithfulness(model, scores, **given(pairs), absolute=of == "cmd")

    found = {name: curve(scores).interval(of) for name, scores in methods.items()}
    mean = {name: float(spread.mean) for name, spread in found.items()}
    text = ", ".join(f"{name} {x.mean:.3f} ({x.low:.3f} to {x.high:.3f})" for name, x in found.items())
    if of == "cpr":
        return verdict(text, "EAP-IG above random", mean["EAP-IG"] > mean["random"], values=mean)
    return verdict(text, "EAP-IG < 0.1", mean["EAP-IG"] < 0.1, values=mean)


def completeness_row(model: Any, pairs: PromptPairs) -> Row:
    """What the input's edges have together, beside the difference of the metric, summed over pairs, at 5, 20 and 100 steps."""
    rows = np.arange(len(pairs))
    clean, corrupted = (
        np.asarray(last_logits(model, x, pairs.mask))[rows, [pairs.answers, pairs.others]]
        for x in (pairs.clean, pairs.corrupted)
    )
    difference = ((clean[0] - clean[1]) - (corrupted[0] - corrupted[1])).mean()
    errors = {}
    for steps in (5, 20, 100):
        scores = edge_attribution(model, **given(pairs), steps=steps)
        errors[steps] = abs(float(scores.nodes[0]) / float(difference) - 1)
    text = ", ".join(f"{error:.2%} at {steps}" for steps, error in errors.items())
    return verdict(text, "≤ 1 % at 100", errors[100] <= 0.01, values={str(k): v for k, v in errors.items()})


def pearson_row(model: Any, pairs: PromptPairs, site: str) -> Row:
    """Estimates beside exact patches of every entry that differs, each pair's correlation, and their mean."""
    own = rules.relp(model.config), rules.gim(model.config), rules.grad_drop(model.config)
    ways: dict[str, dict[str, Any]] = {
        "gradient": {}, "×IG": dict(steps=10), "GradDrop": dict(rules=own[2]), "RelP": dict(rules=own[0]),
        "GIM": dict(rules=own[1]),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ways}
    for row, real in enumerate(pairs.mask):
        metric = logit_difference(pairs.answers[row], pairs.others[row])
        tokens = pairs.clean[row], pairs.corrupted[row]
        guesses = {
            name: attribution_patching(model, *tokens, metric, site, mask=real, **way) for name, way in ways.items()
        }
        guesses["GradDrop"] = guesses["GradDrop"].grad_drop()
        entries = verify(
            guesses["gradient"], model, *tokens, metric, mask=real, top=10**9, sample=0, progress=False
        ).entries
        exact = np.array([entry["exact"] for entry in entries])
        places = [tuple(entry[k] for k in ("layer", "head", "position") if k in entry) for entry in entries]
        for name, guess in guesses.items():
            values = np.asarray(guess.values[site])
            each = np.array([values[place] for place in places])
            other = exact if guess.signed else np.abs(exact)
            found[name].append(float(np.corrcoef(each, other)[0, 1]))
    mean = {name: float(np.mean(each)) for name, each in found.items()}
    ends = {name: np.std(each) / len(each) ** 0.5 * 1.96 for name, each in found.items()}
    text = ", ".join(f"{name} {mean[name]:.3f} ± {ends[name]:.3f}" for name in ways)
    ok = mean["RelP"] > mean["gradient"] if site == "mlp_out" else None
    return verdict(text, "RelP above the gradient" if ok is not None else "reported", ok is not False, values=mean)


def peer_row(tokenizer: Any) -> Row:
    """Edges, and random circuits, of a model with grouped heads, beside TransformerLens's of the equal one without."""
    from peers import TransformerLens, mib_name

    model, answers, rng = tiny_llama(), (3, 17), np.random.default_rng(0)
    graph, metric = Graph.of(model.config), logit_difference(*answers)
    clean = rng.integers(0, model.config.vocab_size, (3, 9)).astype(np.int32)
    corrupted = clean.copy()
    corrupted[:, 2:4] = clean[:, [3, 1]]
    with TemporaryDirectory() as folder:
        grouped, own = Path(folder) / "grouped", Path(folder) / "own"
        model.save_pretrained(grouped)
        ungroup(grouped, own)
        peer = TransformerLens(own, tokenizer, answers, "cpu")
    worst, places = 0.0, {}
    # Theirs differentiates at the second of a pair, the corrupted one.
    runs: dict[Literal["corrupted", "clean"], Any] = {"corrupted": (clean, corrupted), "clean": (corrupted, clean)}
    for at, pair in runs.items():
        theirs = np.zeros(graph.edges.shape)
        for edge, score in peer.edges(*pair).items():
            places[edge] = graph.edge(mib_name(edge))
            theirs[places[edge]] += score if at == "corrupted" else -score
        ours = edge_attribution(model, clean, corrupted, metric, at=at).values
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    masks = graph.edges & (rng.random((3, *graph.edges.shape)) < np.array([0.3, 0.5, 0.8])[:, None, None])
    chosen, first = [Circuit(graph, edges=mask) for mask in masks], (clean[:1], corrupted[:1])
    curve = faithfulness(model, chosen, *first, metric).faithfulness
    kept = [[edge for edge, place in places.items() if mask[place]] for mask in masks]
    apart = float(np.abs(curve - [peer.faithfulness(*first, some) for some in kept]).max())
    text = f"{worst:.1e} of the largest; circuits {apart:.1e} of the difference"
    return verdict(text, "≤ 1e-4; 1e-3", worst <= 1e-4 and apart <= 1e-3, edges=worst, circuits=apart)


def ungroup(source: Path, target: Path) -> None:
    """Writes a checkpoint of the same function, in which every query head has keys and values of its own."""
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    n_heads, n_groups = config["num_attention_heads"], config["num_key_value_heads"]
    for name, x in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            heads = x.reshape(n_groups, -1, *x.shape[1:])
            tensors[name] = heads.repeat(n_heads // n_groups, axis=0).reshape(-1, *x.shape[1:])
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config | {"num_key_value_heads": n_heads}))


def memory_row() -> Row:
    """EAP-IG of one prompt at the shape of Llama 3.1 8B, by the compiler's account; float32, beside the weights."""
    n_tokens, config = 20, LlamaConfig.from_dict(SHAPES["8B"])
    params = {row.name: jax.ShapeDtypeStruct(row.shape, jnp.float32) for row in parameter_table(config)}
    ids = np.arange(n_tokens, dtype=np.int32)[None]
    metric, _ = check_metric(logit_difference(3, 4), config.vocab_size, ids, None)
    batch = Batch(ids, ids[:, ::-1].copy(), None, None, None, metric, np.ones(1, np.float32))

    def scores(params: Any, batch: Batch) -> jax.Array:
        model, graph = Llama(config, params), Graph.of(config)
        return edges._scores(model, batch, None, graph=graph, steps=5, path="inputs", at="clean", remat=False)

    memory = jax.jit(scores).lower(params, batch).compile().memory_analysis()
    assert memory is not None
    held = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
    return verdict(f"{held:.2f} GB", "≤ 3 GB", held <= 3, gigabytes=held)


def main() -> None:
    args = arguments(str(__doc__))
    model, tokenizer = Llama.from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    pairs = indirect_object(tokenizer, 2 * N_PAIRS)
    some, others, few = pairs[:N_PAIRS], pairs[N_PAIRS:], pairs[:FEW]
    methods = methods_of(model, some)
    plan: Plan = [
        (f"all {methods['EAP'].graph.n_edges} edges, {N_PAIRS} pairs: of the gradient to the embeddings", "",
         partial(edges_row, model, some)),
        (f"faithfulness, 10 sizes × {N_PAIRS} pairs: of as many plain forwards", "",
         partial(curve_row, model, others, methods["EAP"])),
        ("edges and random circuits of a tiny model with grouped heads: from TransformerLens's of the equal one without",
         "transformer_lens", partial(peer_row, tokenizer)),
        ("EAP-IG at 8B shape, T = 20: memory beside float32 weights", "", memory_row),
        (f"CPR by signed score, {N_PAIRS} other pairs", "", partial(mib_row, model, methods, others, "cpr")),
        (f"CMD by magnitude, {N_PAIRS} other pairs", "", partial(mib_row, model, methods, others, "cmd")),
        (f"EAP-IG's input edges beside the metric's difference, {FEW} pairs", "", partial(completeness_row, model, few)),
        (f"heads by position: correlation with exact effects, {FEW} pairs", "", partial(pearson_row, model, few, "z")),
        (f"MLPs by position: correlation with exact effects, {FEW} pairs", "", partial(pearson_row, model, few, "mlp_out")),
    ]  # fmt: skip
    measure(plan, "MIB's indirect objects", args)


if __name__ == "__main__":
    main()
