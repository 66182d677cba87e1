"""Sweeps: a row is the single run, whatever was reused; plans that count by hand; prompts, padding, meshes, compilations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from oculi_jax import forward, plan, sweep
from oculi_jax.backends import jax as programs
from oculi_jax.buckets import whole as all_columns
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    HeadAblation,
    KScaler,
    PerLayer,
    PerPrompt,
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.metrics import kl_divergence, log_probability, logit_difference, probability
from oculi_jax.sweeps.grouping import make_plan
from oculi_jax.sweeps.planning import Cost, SweepPlan
from oculi_jax.sweeps.reach import Reach

from .compilations import compilations
from .margins import assert_leads
from .tiny import prompt, tiny_config, tiny_llama
from .tolerances import GRADIENT, LOGITS, ROUTES

MODEL = tiny_llama()
L, H, T, E, D = 3, 4, 11, 24, 6
IDS = prompt(T)
RNG = np.random.default_rng(0)
METRIC = logit_difference(3, 5)
OTHER = {
    site: np.asarray(x) for site, x in forward(MODEL, prompt(T, 1), capture=("resid_pre", "z")).activations.items()
}
VECTOR = RNG.normal(size=E).astype(np.float32)
VECTORS = RNG.normal(size=(5, E)).astype(np.float32)
LAYERS, HEADS = np.arange(L)[:, None], np.arange(H)[None, :]
PLACES = np.array([0, 4, 9])  # each is a program, where what precedes it is reused


def near(a: Any, b: Any, tolerance: float = ROUTES) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def add_rows(x: Any, value: Any) -> Any:
    return x + value[: x.shape[0]]


# Name → the sweep, its axes, and the single intervention at a place of them.
FAMILIES: dict[str, tuple[Any, tuple[int, ...], Callable[..., Any]]] = {
    "heads": (HeadAblation.grid(MODEL.config), (L, H), lambda layer, h: HeadAblation(layer, h)),
    "means": (
        HeadAblation.grid(MODEL.config, PerLayer(OTHER["z"].mean(axis=2))), (L, H),
        lambda layer, h: HeadAblation(layer, h, OTHER["z"].mean(axis=2)[layer, h]),
    ),
    "layers and places": (
        ActivationPatch("resid_pre", LAYERS, PerLayer(OTHER["resid_pre"]), positions=PLACES[None]), (L, 3),
        lambda layer, t: ActivationPatch("resid_pre", layer, OTHER["resid_pre"][layer], positions=PLACES[t]),
    ),
    "heads and places": (
        ActivationPatch("z", LAYERS[..., None], PerLayer(OTHER["z"]), HEADS[:, ::3, None], np.eye(T, dtype=bool)[PLACES][None, None]), (L, 2, 3),
        lambda layer, h, t: ActivationPatch("z", layer, OTHER["z"][layer, 3 * h], head=3 * h, positions=[PLACES[t]]),
    ),
    "vectors": (
        Steer(1, VECTORS, np.array([1.0, -2.0, 0.5, 4.0, 3.0])), (5,),
        lambda i: Steer(1, VECTORS[i], (1.0, -2.0, 0.5, 4.0, 3.0)[i]),
    ),
    "strengths and places": (
        Steer(np.array([2, 0]), VECTOR, np.linspace(-3, 3, 4)[:, None], positions=np.array([-1, 3])), (4, 2),
        lambda i, j: Steer((2, 0)[j], VECTOR, np.linspace(-3, 3, 4)[i], positions=(-1, 3)[j]),
    ),
    "direction": (
        DirectionAblation("resid_mid", np.arange(L), PerLayer(OTHER["resid_pre"][:, 5]), positions=[4, -2]), (L,),
        lambda layer: DirectionAblation("resid_mid", layer, OTHER["resid_pre"][layer, 5], positions=[4, -2]),
    ),
    "edges": (
        AttentionKnockout(1, 2, np.array([[4], [7], [10]]), np.arange(4)), (3, 4),
        lambda q, k: AttentionKnockout(1, 2, 4 + 3 * q, k),
    ),
    "neurons": (Ablation("act", np.arange(L)[:, None], np.arange(0, 40, 8)), (L, 5), lambda i, j: Ablation("act", i, 8 * j)),
    "keys": (KScaler(np.arange(L), 1, np.full(L, 3.0)), (L,), lambda i: KScaler(i, 1, 3.0)),
    "pair": (
        [QScaler(0, 1, 2.0), SpectraScaler(LAYERS, HEADS, 3.0)], (L, H),
        lambda i, j: [QScaler(0, 1, 2.0), SpectraScaler(i, j, 3.0)],
    ),
    "two that vary": (
        [HeadAblation(np.arange(L), 0), Steer(np.array([2, 1, 0]), VECTOR)], (L,),
        lambda i: [HeadAblation(i, 0), Steer(2 - i, VECTOR)],
    ),
    "tables": (
        Blend("z", 1.0 - np.eye(L * H, dtype=np.float32).reshape(L * H, L, H)), (L * H,),
        lambda i: HeadAblation(i // H, i % H),
    ),
    "embeddings": (Edit("embed", "scale", None, True, np.ones((1, 1))), (), lambda: Edit("embed", "scale", None, True, 1.0)),
    "last norm": (Ablation("final_norm", None, np.arange(6)), (6,), lambda i: Ablation("final_norm", None, i)),
    "what lets tokens look ahead": (
        [Edit("allowed", "set", 1, (np.indices((1, T, T))[1] == 2) & (np.indices((1, T, T))[2] == 9), True),
         Steer(1, VECTOR, np.linspace(1, 8, 8), positions=np.full(8, 9))], (8,),
        lambda i: [Edit("allowed", "set", 1, (np.indices((1, T, T))[1] == 2) & (np.indices((1, T, T))[2] == 9), True),
                   Steer(1, VECTOR, np.linspace(1, 8, 8)[i], positions=9)],
    ),
    "a function of all tokens": (
        Edit("mlp_out", "apply", np.arange(L).repeat(4), (np.arange(T) >= 8)[:, None], OTHER["resid_pre"][0], add_rows), (4 * L,),
        lambda i: Edit("mlp_out", "apply", i // 4, (np.arange(T) >= 8)[:, None], OTHER["resid_pre"][0], add_rows),
    ),
    "masks": (
        Edit("mlp_out", "set", np.arange(L), (np.arange(T) == np.array([3, 9, 20])[:, None])[..., None]), (L,),
        lambda i: Edit("mlp_out", "set", i, (np.arange(T) == (3, 9, 20)[i])[:, None]),
    ),
    "embedding of tokens": (Steer(None, VECTOR, np.ones(T), "embed", np.arange(T)), (T,),
                            lambda t: Steer(None, VECTOR, 1.0, "embed", t)),
}  # fmt: skip


def singles(axes: tuple[int, ...], make: Callable[..., Any], tokens: Any = IDS, mask: Any = None) -> np.ndarray:
    """The metric of one `forward` for each variant: nothing shared, nothing reused."""
    found = np.empty(axes, np.float32)
    for place in np.ndindex(axes):
        found[place] = METRIC(forward(MODEL, tokens, make(*place), mask=mask))
    return found


@functools.cache
def single_runs(name: str) -> np.ndarray:
    """`singles` of a family, once for all tests."""
    return singles(*FAMILIES[name][1:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_the_single_run(name: str) -> None:
    family, axes, _ = FAMILIES[name]
    expected = single_runs(name)
    whole = sweep(MODEL, IDS, family, METRIC, reuse=False)
    assert whole.shape == axes and whole.dtype == np.float32
    near(whole, expected)
    # Small calls make it worth while to reuse layers and tokens, also for a model as small as this one.
    if plan(MODEL, IDS, family, METRIC, batch_size=2).reuse:
        near(sweep(MODEL, IDS, family, METRIC, batch_size=2), expected)


@pytest.mark.quick
def test_what_is_reused_is_what_nothing_before_it_changed() -> None:
    """The plans of the families above, so that the test above is known to have gone that way."""
    reused = {name: plan(MODEL, IDS, family, METRIC, batch_size=2) for name, (family, *_) in FAMILIES.items()}
    whole = {name for name, planned in reused.items() if not planned.reuse}
    assert whole == {
        "tables",
        "embeddings",
        "embedding of tokens",
        "direction",
        "keys",
        "two that vary",
    }  # the last: too few
    for name in ("what lets tokens look ahead", "a function of all tokens"):
        assert reused[name].reuse and {call.n_rows for call in reused[name].calls} == {T}, name
    for name in ("layers and places", "heads and places", "edges"):
        assert len({call.n_rows for call in reused[name].calls}) > 1, name
    assert {(call.start, call.n_rows) for call in reused["last norm"].calls} == {(L, T)}
    # An edit of a token that is not there changes nothing, and needs no layer.
    assert max(call.start for call in reused["masks"].calls) == L


@pytest.mark.parametrize("name", ["heads", "strengths and places", "edges"])
def test_padding_changes_nothing(name: str) -> None:
    """On any side, of one width, so that the sides share their programs."""
    family, expected = FAMILIES[name][0], single_runs(name)
    for side in ((3, 0), (0, 3), (2, 1)):
        tokens = np.pad(IDS, side, constant_values=60)
        mask = np.pad(np.ones(T, bool), side)
        for options in ({"batch_size": 2}, {"reuse": False}):
            found = sweep(MODEL, tokens, family, METRIC, mask=mask, **options)
            np.testing.assert_allclose(found, expected, ROUTES, ROUTES, err_msg=f"{side} {options}")


def test_prompts_are_their_single_runs_each_with_its_own_targets() -> None:
    lengths = (T, 7, 9)
    tokens, mask = np.zeros((3, T), np.int32), np.zeros((3, T), bool)
    for row, n in enumerate(lengths):
        where = slice(T - n, None) if row == 1 else slice(n)
        tokens[row, where], mask[row, where] = prompt(n, row), True
    family, axes, make = FAMILIES["strengths and places"]
    targets = np.array([[3, 9, 11], [5, 4, 60]])
    expected = np.empty((3, *axes), np.float32)
    for row, n in enumerate(lengths):  # padded on the right, whatever side it is on above, so that all share a program
        alone, real = np.pad(prompt(n, row), (0, T - n)), np.arange(T) < n
        for place in np.ndindex(axes):
            single = forward(MODEL, alone, make(*place), mask=real)
            expected[row][place] = logit_difference(*map(int, targets[:, row]))(single)
    for options in ({"batch_size": 2}, {}):
        near(sweep(MODEL, tokens, family, logit_difference(*targets), mask=mask, **options), expected)


def test_any_function_of_an_output_is_a_metric_and_a_result_may_be_a_tree() -> None:
    def metric(out: Any) -> dict[str, Any]:
        return {"all": out.logits, "top": jnp.argmax(out.logits[-1])}

    found = sweep(MODEL, IDS, HeadAblation.grid(MODEL.config), metric, batch_size=4)
    assert found["all"].shape == (L, H, T, 61) and found["top"].dtype == jnp.int32
    single = forward(MODEL, IDS, HeadAblation(1, 2))
    near(found["all"][1, 2], single.logits, LOGITS)
    assert_leads(single.logits[-1])
    assert found["top"][1, 2] == jnp.argmax(single.logits[-1])
    padded = sweep(MODEL, np.pad(IDS, (0, 2)), HeadAblation(1, np.arange(H)), lambda out: jnp.sum(out.mask),
                   mask=np.arange(T + 2) < T)  # fmt: skip
    assert (padded == T).all()


def test_an_id_that_only_the_device_can_see_gives_nan_for_every_variant() -> None:
    assert np.isnan(sweep(MODEL, IDS, HeadAblation.grid(MODEL.config), probability(jnp.array(99)))).all()


def test_under_a_trace_it_is_the_same() -> None:
    family, expected = FAMILIES["heads"][0], single_runs("heads")
    near(jax.jit(lambda layers: sweep(MODEL, IDS, HeadAblation(layers, HEADS), METRIC))(LAYERS), expected)
    both = jax.jit(jax.vmap(lambda tokens: sweep(MODEL, tokens, family, METRIC)))(jnp.stack([IDS, prompt(T, 1)]))
    near(both[0], expected)

    near(jax.jit(lambda x: sweep(MODEL, IDS, family, METRIC) * x)(1.0), expected)  # nothing in it is traced
    scaled = lambda x: sweep(MODEL, IDS, family, lambda out: METRIC(out) * x).sum()  # noqa: E731
    near(jax.grad(scaled)(2.0), expected.sum())

    def loss(alpha: Any) -> Any:
        return sweep(MODEL, IDS, QScaler(np.arange(L), 0, alpha), METRIC).sum()

    slope = jax.grad(loss)(2.0)
    near(slope, (loss(2.0 + 1e-2) - loss(2.0 - 1e-2)) / 2e-2, GRADIENT)


@pytest.mark.quick
def test_other_numbers_are_no_other_program() -> None:
    model, first, second = tiny_llama(), prompt(13), prompt(13, 1)
    grid = HeadAblation.grid(model.config)
    with compilations() as compiled:
        sweep(model, first, grid, logit_difference(1, 2), batch_size=3)
        assert 0 < len(compiled) <= 3
        compiled.clear()
        sweep(model, second, grid, logit_difference(7, np.int64(60)), batch_size=3)
        sweep(model, second.tolist(), HeadAblation(LAYERS, HEADS, 0.5), logit_difference(7, 9), batch_size=3)
        assert not compiled


def test_progress_and_calls_keep_to_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real, seen = [], programs.run_variants, []

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append((int(options["start"]), options["first"], options["size"]))
        return real(*arguments, **options)

    monkeypatch.setattr(programs, "run_variants", spy)
    tokens = np.stack([IDS, prompt(T, 1)])
    family = FAMILIES["layers and places"][0]
    planned = plan(MODEL, tokens, family, METRIC, batch_size=4)
    sweep(MODEL, tokens, family, METRIC, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert calls == [(call.start, T - call.n_rows, call.size) for call in planned.calls]
    assert seen[-1] == (2 * L * 3, 2 * L * 3) and len(seen) == len(calls) and sorted(seen) == seen


@pytest.mark.quick
def test_a_plan_counts_what_a_hand_counts() -> None:
    planned = plan(MODEL, IDS, HeadAblation.grid(MODEL.config), METRIC, batch_size=H)
    assert planned.reuse and [call.start for call in planned.calls] == [0, 1, 2]
    assert planned.naive_layer_evaluations == L * H * L
    assert planned.layer_evaluations == L + H * (3 + 2 + 1)  # the base run, then each head from its layer
    per_layer = 2 * T * (2 * E * D * (4 + 2) + 3 * E * 40 + 2 * 4 * D * T)
    # Of the last layer, keys and values of all tokens, and of the one that the metric reads all else.
    last = per_layer / T + 2 * T * 2 * E * D * 2
    assert planned.flops == L * per_layer + H * (2 + 1 + 0) * per_layer + L * H * (last + 2 * 2 * E)
    assert planned.naive_flops == L * H * (L * per_layer + 2 * 2 * E)
    assert planned.axes == (L, H) and planned.batch_size == H
    assert "12 variants" in repr(planned) and "75% of 36" in repr(planned)
    every = plan(MODEL, IDS, HeadAblation.grid(MODEL.config), kl_divergence(np.zeros(61, np.float32)), reuse=False)
    assert not every.reuse and every.naive_flops == L * H * (L * per_layer + 2 * 61 * E)
    assert every.flops == L * H * ((L - 1) * per_layer + last + 2 * 61 * E)
    function = plan(MODEL, IDS, HeadAblation.grid(MODEL.config), lambda out: out.logits[-1, 3], reuse=False)
    assert function.flops == function.naive_flops == L * H * (L * per_layer + 2 * T * 61 * E)


def planned_of(cost: Cost, n: int, reach: Reach | None, size: int | None, budget: int) -> SweepPlan:
    return make_plan(cost, (n,), [all_columns(cost.n_prompts, cost.n_tokens)], [reach], size, budget)


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(12))
def test_every_variant_of_every_prompt_is_in_one_call_that_runs_all_it_may_change(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = tiny_config(num_hidden_layers=int(rng.integers(1, 40)), hidden_size=int(rng.integers(1, 40)) * 8)
    n, n_tokens, devices = int(rng.integers(1, 400)), int(rng.integers(1, 40)), int(rng.choice([1, 4]))
    layers, tokens = rng.integers(0, config.num_hidden_layers + 1, n), rng.integers(0, n_tokens + 1, n)
    cost = Cost(config, n_tokens, int(rng.integers(1, 20)), 1, 2, 4, "cpu", devices)
    size = None if seed % 2 else int(rng.integers(1, n + 1))
    common = int(rng.integers(0, n_tokens)) if seed % 3 else 0
    found = planned_of(cost, n, Reach(layers, tokens, common), size, 1 << 30)
    pairs: list[tuple[int, int]] = []
    for part in found.parts:
        for call in part.calls:
            assert len(call.prompts) == len(call.variants) <= call.slots and call.size % devices == 0
            assert (call.start <= layers[call.variants]).all() or not part.reuse
            assert call.shared or (n_tokens - call.n_rows <= tokens[call.variants]).all()
            assert not call.shared or (n_tokens - call.n_rows == common and call.is_grid)
            assert 1 <= call.n_rows <= n_tokens and (size is None or call.size < size + devices)
            each = {
                (int(part.prompts[p]), int(v)) for p, row in zip(call.prompts, call.variants, strict=True) for v in row
            }
            pairs.extend(each)
    assert sorted(pairs) == [(p, v) for p in range(cost.n_prompts) for v in range(n)]
    whole = planned_of(cost, n, None, size, 1 << 30)
    assert found.reuse or found.flops == whole.flops


@pytest.mark.quick
def test_several_prompts_keep_to_the_budget_too() -> None:
    sizes = (tiny_config(num_hidden_layers=12, hidden_size=256), 128)
    one = planned_of(Cost(*sizes, 1, 1, 2, 4, "cpu", 1), 4, None, 1, 1).bytes
    for size in (None, 1, 4):
        reach = Reach(np.zeros(4, int), np.zeros(4, int))
        found = planned_of(Cost(*sizes, 4096, 1, 2, 4, "cpu", 1), 4, reach, size, 20 * one)
        assert found.bytes <= 20 * one and max(call.slots for call in found.calls) < 4096


@pytest.mark.quick
def test_a_small_budget_makes_small_calls() -> None:
    cost = Cost(MODEL.config, T, 1, 1, 2, 4, "cpu", 1)
    large, small = (planned_of(cost, 200, None, None, budget) for budget in (1 << 30, 100_000))
    assert small.batch_size < large.batch_size and small.bytes <= 100_000 < large.bytes


@pytest.mark.parametrize("where", ["given", "of the model"])
def test_a_mesh_gives_what_one_device_gives(where: str) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    model, options = MODEL, {"mesh": mesh}
    if where == "of the model":
        spec = jax.sharding.PartitionSpec
        shardings = jax.tree.map(
            lambda x: jax.sharding.NamedSharding(mesh, spec(*(["model"] + [None] * (x.ndim - 1) if x.shape[0] % 2 == 0 else [None] * x.ndim))),
            MODEL,
        )  # fmt: skip
        model, options = jax.device_put(MODEL, shardings), {}
    for name, size in (("heads", {}), ("layers and places", {"batch_size": 4})):
        near(sweep(model, IDS, FAMILIES[name][0], METRIC, **size, **options), single_runs(name))
    planned = plan(model, IDS, FAMILIES["heads"][0], METRIC, batch_size=3, **options)
    assert {call.size for call in planned.calls} == {4}


def test_variants_really_spread_over_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    real, kept = programs.run_variants, []
    monkeypatch.setattr(programs, "run_variants", lambda *a, **o: kept.append(real(*a, **o)) or kept[-1])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sweep(MODEL, IDS, HeadAblation(LAYERS, np.arange(H)), METRIC, mesh=mesh, batch_size=8)
    assert kept and all(seen.value.sharding.shard_shape(seen.value.shape) == (1, 1) for seen in kept)


@pytest.mark.real
@pytest.mark.torch
def test_heads_of_a_real_model_against_hugging_face(adapter: Any, hf: Any) -> None:
    import torch

    tokens = adapter.tokenizer("When Mary and John went to the store, John gave a drink to").input_ids
    mary, john = (adapter.tokenizer(name).input_ids[0] for name in (" Mary", " John"))
    places = ((0, 0), (7, 4), (18, 6), (20, 0), (23, 3), (24, 4), (29, 0), (29, 1))
    family = HeadAblation(*np.transpose(places))
    found = sweep(adapter.model, tokens, family, logit_difference(mary, john))
    for i, (layer, head) in enumerate(places):

        def zero(module: Any, inputs: Any, head: int = head) -> Any:
            z = inputs[0].clone()
            z[..., head * 64 : head * 64 + 64] = 0
            return (z,)

        hook = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero)
        with torch.no_grad():
            logits = hf(torch.tensor([tokens])).logits[0, -1]
        hook.remove()
        near(found[i], float(logits[mary] - logits[john]), LOGITS)


class Changeable:
    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, out: Any) -> Any:
        return out.logits[-1, 0]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "axes": (dict(interventions=HeadAblation(np.arange(3), np.arange(4))), ValueError,
             r"do not broadcast together: HeadAblation.layer \[3\], HeadAblation.head \[4\]"),
    "no variant": (dict(interventions=HeadAblation(np.arange(0), 1)), ValueError, "there is no variant"),
    "index": (dict(interventions=HeadAblation(np.array([0, 3]), 0)), ValueError, r"layer is 3 at \[1\], but there are 3 layers"),
    "jax index": (dict(interventions=HeadAblation(jnp.array([0, 3]), 0)), ValueError, r"layer is 3 at \[1\]"),
    "strength": (dict(interventions=SpectraScaler(0, 0, np.array([1.0, -1.0]))), ValueError, r"alpha is -1.0 at \[1\]"),
    "position": (dict(interventions=Steer(0, VECTOR, positions=np.array([0, 11]))), ValueError, "the prompt has 11 tokens"),
    "array": (dict(interventions=Steer(1, VECTORS, np.ones(4))), ValueError, r"Steer.vector \[5\], Steer.scale \[4\]"),
    "array of tokens": (dict(interventions=Steer(np.array([2, 1, 0]), OTHER["resid_pre"])), ValueError,
                        r"Steer.layer \[3\], Steer.vector \[3, 11\]"),
    "layers of a sweep": (dict(interventions=Steer(np.arange(3), PerLayer(VECTORS))), ValueError, r"lead|\[L, E\] = \[3, 24\]"),
    "prompts": (dict(interventions=Steer(1, PerPrompt(VECTORS))), ValueError, "a PerPrompt of 5 entries, and there are 1 prompts"),
    "list of JAX scalars": (dict(interventions=HeadAblation([jnp.array(0), jnp.array(7)], 0)), ValueError, r"layer is 7 at \[1\]"),
    "metric's function": (dict(metric=log_probability), TypeError, "call it with token ids"),
    "changeable metric": (dict(metric=Changeable()), TypeError, "cannot be hashed"),
    "metric without value": (dict(metric=lambda out: None), TypeError, "returns no array"),
    "mesh's name": (dict(mesh="data"), TypeError, "mesh is a str"),
    "progress": (dict(progress="yes"), TypeError, "progress is 'yes'"),
    "metric": (dict(metric=3), TypeError, "metric is a int"),
    "target": (dict(metric=log_probability(61)), ValueError, "token is 61, and this model.s vocabulary"),
    "metric's position": (dict(metric=log_probability(3, position=11)), ValueError, r"reads positions \[11\]"),
    "targets": (dict(metric=log_probability(np.array([1, 2]))), ValueError, "targets for 2 prompts, and tokens holds 1"),
    "batch size": (dict(batch_size=0), ValueError, "batch_size is 0"),
    "mask": (dict(mask=np.ones(4, bool)), ValueError, r"mask has shape \[4\]"),
    "tokens": (dict(tokens="text"), TypeError, "tokens is text"),
    "prompts' mask": (dict(tokens=np.zeros((2, 5), np.int32), mask=np.ones(5, bool)), ValueError, r"mask has shape \[5\], and tokens \[2, 5\]"),
    "mesh": (dict(mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))), ValueError, "one called 'data' is needed"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changes, kind, message = REFUSED[name]
    given = dict(tokens=IDS, interventions=HeadAblation.grid(MODEL.config), metric=METRIC, **{})
    given.update(changes)
    tokens, interventions, metric = (given.pop(key) for key in ("tokens", "interventions", "metric"))
    for call in (sweep, plan) if "progress" not in given else (sweep,):
        with pytest.raises(kind, match=message):
            call(MODEL, tokens, interventions, metric, **given)


@pytest.mark.quick
def test_forward_names_sweep() -> None:
    with pytest.raises(ValueError, match="use oculi_jax.sweep for all of them"):
        forward(MODEL, IDS, HeadAblation.grid(MODEL.config))
