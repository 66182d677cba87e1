"""Attribution: parts that sum to the logit, whatever was edited; heads and neurons."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import AttentionCapture, CaptureSpec, MLPCapture, ResidualCapture, forward
from oculi_jax.analysis.attribution import AttributionMethods
from oculi_jax.analysis.flow import attention_flow, attention_rollout, value_weighted_attention
from oculi_jax.analysis.residual import decompose_resid, stack_head_results
from oculi_jax.analysis.result import Result
from oculi_jax.intervention import AttentionKnockout, Edit, HeadAblation, SpectraScaler, Steer
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .margins import assert_leads
from .prompts import FRANCE, IOI
from .tiny import prompt, tiny_llama
from .tolerances import GRADIENT, LOGITS, ROUNDING, ROUTES

POINTS = {"pre_attn": "resid_pre", "post_attn": "resid_mid", "pre_mlp": "resid_mid", "post_mlp": "resid_post",
          "attn_out": "attn_out", "mlp_out": "mlp_out"}  # fmt: skip
TOKEN = 17
VECTOR = np.linspace(-2, 1, 24, dtype=np.float32)


def captures(
    model: Llama, tokens: Any, interventions: Any = (), mask: Any = None, layers: tuple[int, ...] | None = None
) -> tuple[AttentionCapture, ResidualCapture, MLPCapture]:
    """What an adapter would make of a run with interventions."""
    sites = (*dict.fromkeys(POINTS.values()), "pattern", "v", "z", "act")
    spec = (CaptureSpec(sites, layers), "embed", "final_scale", "final_norm")
    seen = forward(model, tokens, interventions, capture=spec, logits="none", mask=mask).activations
    sizes = model.config.sizes
    common: dict[str, Any] = {
        "tokens": jnp.asarray(tokens),
        "mask": jnp.ones(tokens.shape[0], bool) if mask is None else jnp.asarray(mask),
        "captured_layers": tuple(range(sizes["L"])) if layers is None else layers,
    }
    scale = seen["final_scale"] if layers is None else None
    attention = AttentionCapture(
        patterns=seen["pattern"], values=seen["v"], z=seen["z"], final_scale=scale, **common,
        n_heads=sizes["H"], n_kv_heads=sizes["K"], head_dim=sizes["D"],
    )  # fmt: skip
    residual = ResidualCapture(
        **{field: seen[site] for field, site in POINTS.items()}, embedding=seen["embed"], **common,
        final_scale=seen["final_scale"], final_norm=seen["final_norm"], final_weight=model.norm.weight[...],
        model_layers=sizes["L"],
    )  # fmt: skip
    mlp = MLPCapture(post_activation=seen["act"], output=seen["mlp_out"], final_scale=scale, **common)
    return attention, residual, mlp


def all_four(model: Llama, parts: Any, token: Any = TOKEN, position: int = -1) -> dict[str, Result]:
    attention, residual, mlp = parts
    unembed = model.lm_head.weight
    results = (
        AttributionMethods.direct_logit_attribution(residual, unembed, token, position),
        AttributionMethods.component_attribution(residual, mlp, unembed, token, position),
        AttributionMethods.head_attribution(attention, model, token, position, residual),
        AttributionMethods.neuron_attribution(mlp, model, token, position, residual),
    )
    return {result.method: result for result in results}


def flows(model: Llama, attention: AttentionCapture) -> tuple[Result, ...]:
    """The methods on patterns that are array functions."""
    return attention_rollout(attention), value_weighted_attention(attention), value_weighted_attention(attention, model)


def assert_same(ours: Any, theirs: Any, atol: float = ROUTES) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=atol)


def gain_of(model: Llama, residual: ResidualCapture, position: int, token: int = TOKEN) -> np.ndarray:
    """float64 `[E]`: what a part of the stream is multiplied by to be logits."""
    scale = np.float64(residual.final_scale[position])
    return np.float64(model.norm.weight[...]) * scale * np.float64(model.lm_head.weight[token])


VARIANTS = {
    "grouped": {},
    "biased, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
}


@pytest.mark.numerical
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position", [-1, 4])
def test_parts_are_what_loops_say_and_sum_to_the_logit(variant: str, position: int) -> None:
    model = tiny_llama(**VARIANTS[variant])
    tokens = prompt()
    parts = captures(model, tokens)
    attention, residual, mlp = parts
    results = all_four(model, parts, position=position)
    logit = forward(model, tokens).logits[position, TOKEN]
    for method, result in results.items():
        assert result.method == method and result.layers == (0, 1, 2)
        assert result.values.dtype == jnp.float32
        np.testing.assert_allclose(result.details["logit"], logit, rtol=ROUNDING, atol=ROUNDING)
        assert abs(float(result.completeness_error)) < ROUTES
        assert np.abs(result.details["edits"]).max() < ROUNDING and abs(float(result.details["norm_edit"])) < ROUNDING

    gain = gain_of(model, residual, position)
    o, down = (np.float64(w.weight[...]) for w in (model.layers.attn.o, model.layers.mlp.down))
    z, act = np.float64(attention.z), np.float64(mlp.post_activation)
    want_heads, want_neurons, want = np.zeros((3, 4)), np.zeros((3, 40)), np.zeros((3, 2))
    for layer in range(3):
        for head in range(4):
            want_heads[layer, head] = (o[layer, :, head] @ z[layer, head, position]) @ gain
        for neuron in range(40):
            want_neurons[layer, neuron] = (down[layer, :, neuron] * act[layer, position, neuron]) @ gain
        want[layer] = [np.float64(x[layer, position]) @ gain for x in (residual.attn_out, mlp.output)]
    tolerance = {"rtol": ROUTES, "atol": ROUTES}
    np.testing.assert_allclose(results["head_attribution"].values, want_heads, **tolerance)
    np.testing.assert_allclose(results["neuron_attribution"].values, want_neurons, **tolerance)
    np.testing.assert_allclose(results["component_attribution"].values, want, **tolerance)
    np.testing.assert_allclose(results["direct_logit_attribution"].values, want.sum(1), **tolerance)
    embedding = np.float64(model.embed[tokens[position]]) @ gain
    np.testing.assert_allclose(results["direct_logit_attribution"].details["embedding"], embedding, **tolerance)
    # Biases belong to no head and no neuron, and are not left out.
    for method, total in (("head_attribution", want[:, 0]), ("neuron_attribution", want[:, 1])):
        bias = results[method].details["bias"]
        np.testing.assert_allclose(results[method].values.sum(1) + bias, total, **tolerance)
        assert (np.abs(bias).max() > 0.01) == (variant != "grouped")


@pytest.mark.parametrize("layers", [None, (2, 0, 1)])
def test_the_decomposition_is_the_stream(layers: tuple[int, ...] | None) -> None:
    model = tiny_llama(attention_bias=True)
    attention, residual, _ = captures(model, prompt(), layers=layers)
    parts = decompose_resid(residual)
    total = parts.embedding + parts.attn.sum(0) + parts.mlp.sum(0) + parts.edits.sum(0)
    np.testing.assert_allclose(total, residual.post_mlp[residual.captured_layers.index(2)], atol=ROUTES)
    assert np.abs(parts.edits).max() < ROUNDING
    for position in (-1, 2):
        assert_same(decompose_resid(residual, position), jax.tree.map(lambda x, p=position: x[..., p, :], parts), 0)
    results = stack_head_results(attention, model)
    assert results.shape == (3, 4, 11, 24)
    bias = model.layers.attn.o.bias[...][np.array(residual.captured_layers)][:, None, :]
    np.testing.assert_allclose(results.sum(1) + bias, residual.attn_out, atol=ROUTES)
    assert_same(stack_head_results(attention, model, 5), results[:, :, 5], ROUNDING)


def test_an_ablated_head_gets_no_credit() -> None:
    model, tokens = tiny_llama(), prompt()
    parts = captures(model, tokens, HeadAblation(1, 2))
    heads = all_four(model, parts)["head_attribution"]
    assert float(heads.values[1, 2]) == 0.0 and np.count_nonzero(heads.values) == 11
    assert abs(float(heads.completeness_error)) < ROUTES


@pytest.mark.parametrize("pre, mid, post", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 1, 1)])
def test_an_edit_of_the_stream_is_a_term_of_its_own(pre: int, mid: int, post: int) -> None:
    model, tokens = tiny_llama(), prompt()
    edits = [
        Steer(pre, VECTOR),
        Edit("resid_mid", "add", mid, value=-2 * VECTOR[None]),
        Edit("resid_post", "add", post, value=4 * VECTOR[None]),
    ]
    parts = captures(model, tokens, edits)
    want = np.zeros(3)
    for row, times in ((pre, 1), (mid, -2), (post, 4)):
        want[row] += times * VECTOR @ gain_of(model, parts[1], -1)
    assert np.abs(want).max() > 0.1
    logit = np.asarray(parts[1].final_norm[-1]) @ np.asarray(model.lm_head.weight[TOKEN])
    for result in all_four(model, parts).values():
        np.testing.assert_allclose(result.details["edits"], want, rtol=ROUTES, atol=ROUTES)
        np.testing.assert_allclose(result.details["logit"], logit, rtol=ROUTES)
        assert abs(float(result.completeness_error)) < ROUTES


def test_edits_at_the_ends_of_the_stream() -> None:
    model, tokens = tiny_llama(), prompt()
    unembed = np.float64(model.lm_head.weight[TOKEN])
    parts = captures(model, tokens, Edit("final_norm", "add", None, value=VECTOR[None]))
    for result in all_four(model, parts).values():
        np.testing.assert_allclose(result.details["norm_edit"], VECTOR @ unembed, rtol=ROUTES)
        assert abs(float(result.completeness_error)) < ROUTES and np.abs(result.details["edits"]).max() < ROUNDING
    # Of the scale and the embedding nothing is left over: the parts are counted as they were used.
    edits = [Edit("final_scale", "set", None, value=0.7), Edit("embed", "add", None, value=VECTOR[None])]
    parts = captures(model, tokens, edits)
    embedding = (model.embed[tokens[-1]] + VECTOR) @ gain_of(model, parts[1], -1)
    for result in all_four(model, parts).values():
        assert abs(float(result.details["norm_edit"])) < ROUNDING and np.abs(result.details["edits"]).max() < ROUNDING
        assert abs(float(result.completeness_error)) < ROUTES
        np.testing.assert_allclose(result.details["embedding"], embedding, rtol=ROUTES)


def test_what_no_head_made_is_the_heads_error() -> None:
    model = tiny_llama()
    parts = captures(model, prompt(), Edit("attn_out", "add", 1, value=VECTOR[None]))
    results = all_four(model, parts)
    want = -VECTOR @ gain_of(model, parts[1], -1)
    # A small number, left over of a sum of large ones, whose rounding is theirs.
    np.testing.assert_allclose(results["head_attribution"].completeness_error, want, rtol=ROUTES, atol=ROUNDING)
    for method in ("direct_logit_attribution", "component_attribution", "neuron_attribution"):
        assert abs(float(results[method].completeness_error)) < ROUTES


@pytest.mark.parametrize("layers", [(0, 2), (2, 1)])
def test_some_layers_are_rows_of_all_and_the_error_is_what_the_others_add(layers: tuple[int, ...]) -> None:
    model, tokens, edit = tiny_llama(), prompt(), Edit("resid_mid", "add", 1, value=VECTOR[None])
    full, some = captures(model, tokens, edit), captures(model, tokens, edit, layers=layers)
    rows = np.array(layers)
    others = np.setdiff1d(range(3), rows)
    everything, part = all_four(model, full), all_four(model, some)
    dla = everything["direct_logit_attribution"]
    missing = dla.values[others].sum() + dla.details["edits"][others].sum()
    for method, result in part.items():
        assert result.layers == layers and result.metadata["layers"] == list(layers)
        np.testing.assert_allclose(result.values, everything[method].values[rows], rtol=ROUTES, atol=ROUTES)
        np.testing.assert_allclose(result.details["edits"], everything[method].details["edits"][rows], atol=ROUTES)
        np.testing.assert_allclose(result.completeness_error, -missing, atol=ROUTES)
    weighted, some_weighted = (value_weighted_attention(parts[0], model).values for parts in (full, some))
    np.testing.assert_allclose(some_weighted, weighted[rows], atol=ROUNDING)


def test_the_first_layers_alone_are_not_taken_for_a_model() -> None:
    model, tokens = tiny_llama(), prompt()
    later = float(all_four(model, captures(model, tokens))["direct_logit_attribution"].values[2])
    results = all_four(model, captures(model, tokens, layers=(0, 1)))
    for name in ("direct_logit_attribution", "head_attribution"):
        np.testing.assert_allclose(results[name].completeness_error, -later, rtol=ROUTES)
        assert float(results[name].details["norm_edit"]) == 0.0
    # Heads of some layers with the residual stream of all.
    some, whole = captures(model, tokens, layers=(2, 1)), captures(model, tokens)
    heads = AttributionMethods.head_attribution(some[0], model, TOKEN, residual=whole[1])
    full = AttributionMethods.head_attribution(whole[0], model, TOKEN, residual=whole[1])
    np.testing.assert_allclose(heads.values, full.values[np.array([2, 1])], rtol=ROUTES)
    np.testing.assert_allclose(heads.completeness_error, -full.values[0].sum(), atol=ROUTES)


def test_without_a_residual_capture_there_is_no_claim() -> None:
    model = tiny_llama(attention_bias=True)
    attention, residual, mlp = captures(model, prompt())
    for method, capture in (("head_attribution", attention), ("neuron_attribution", mlp)):
        call = getattr(AttributionMethods, method)
        alone, sure = call(capture, model, TOKEN), call(capture, model, TOKEN, residual=residual)
        assert alone.completeness_error is None and set(alone.details) == {"bias"}
        assert_same((alone.values, alone.details["bias"]), (sure.values, sure.details["bias"]), ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model, tokens, edit = tiny_llama(attention_bias=True), prompt(), Steer(1, VECTOR, positions=[3, -1])
    real = np.arange(16) >= 5 if side == "left" else np.arange(16) < 11
    padded = np.full(16, 60, np.int32)
    padded[real] = tokens
    plain, wide = captures(model, tokens, edit), captures(model, padded, edit, mask=real)
    assert_same(all_four(model, wide), all_four(model, plain))
    for position in (-1, 3):
        direct = (
            AttributionMethods.direct_logit_attribution(x[1], model.lm_head.weight, 3, position) for x in (wide, plain)
        )
        assert_same(*direct)
        flow = attention_flow(wide[0], position).values
        np.testing.assert_allclose(flow[real], attention_flow(plain[0], position).values, atol=ROUNDING)
        assert not flow[~real].any()
    for ours, theirs in zip(flows(model, wide[0]), flows(model, plain[0]), strict=True):
        values = np.asarray(ours.values)
        np.testing.assert_allclose(values[..., real, :][..., real], theirs.values, atol=ROUTES)
        assert not values[..., ~real, :].any() and not values[..., ~real].any()
    # One prompt, padded in one capture and not in the other, is one prompt.
    mixed = AttributionMethods.component_attribution(plain[1], wide[2], model.lm_head.weight, TOKEN)
    assert_same(mixed, all_four(model, plain)["component_attribution"])
    # A position that is not there: said on the host, and NaN where only the device knows.
    for method, capture in (("head_attribution", wide[0]), ("neuron_attribution", wide[2])):
        call = partial(getattr(AttributionMethods, method), model=model, token=TOKEN, position=12)
        with pytest.raises(ValueError, match="position is 12, but the prompt has 11 tokens"):
            call(capture)
        assert np.isnan(jax.jit(lambda c, call=call: call(c).values)(capture)).all()


def test_jit_and_vmap_change_nothing() -> None:
    model = tiny_llama()
    prompts = [prompt(seed=seed) for seed in range(3)]
    singles = [captures(model, tokens, Steer(1, VECTOR)) for tokens in prompts]

    def everything(parts: Any, token: Any) -> Any:
        return all_four(model, parts, token, 6), flows(model, parts[0]), stack_head_results(parts[0], model, 6)

    jitted = jax.jit(everything)
    for parts in singles:
        assert_same(jitted(parts, TOKEN), everything(parts, TOKEN))
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    ids = jnp.array([TOKEN, 3, 60])
    mapped = jax.jit(jax.vmap(everything))(batch, ids)
    for row, (parts, token) in enumerate(zip(singles, ids.tolist(), strict=True)):
        assert_same(jax.tree.map(lambda x, row=row: x[row], mapped), everything(parts, token))


def test_a_pair_of_tokens_is_the_difference_of_two() -> None:
    model = tiny_llama()
    parts = captures(model, prompt(), Steer(1, VECTOR))
    pair, one, other = (all_four(model, parts, token) for token in ((TOKEN, 3), TOKEN, np.int32(3)))
    assert_same(pair, jax.tree.map(jnp.subtract, one, other))
    assert_same(all_four(model, parts, [jnp.int32(TOKEN), 3]), pair, 0)


def test_attribution_of_half_precision_captures_is_float32_and_complete() -> None:
    model = tiny_llama(dtype=jnp.bfloat16)
    for result in all_four(model, captures(model, prompt())).values():
        assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {np.dtype(np.float32)}
        # Heads and neurons are not what bfloat16 rounded them to: 2⁻⁸ of each component.
        rounded = result.method in ("head_attribution", "neuron_attribution")
        size = float(jnp.abs(result.values).sum())
        assert abs(float(result.completeness_error)) < (2**-8 if rounded else ROUNDING) * size


def test_attributions_have_gradients() -> None:
    model, tokens = tiny_llama(), prompt()

    def values(alpha: Any) -> Any:
        parts = captures(model, tokens, SpectraScaler(0, 1, alpha))
        results = all_four(model, parts)
        return jnp.stack([results["direct_logit_attribution"].values[1], results["head_attribution"].values[0, 1],
                          attention_rollout(parts[0]).values[2, -1, 0],
                          value_weighted_attention(parts[0], model).values[0, 1, -1, 2]])  # fmt: skip

    both = jax.jit(lambda alpha: (values(alpha), jax.jacobian(values)(alpha)))
    step = 1e-2
    slope = both(1.3)[1]
    assert np.abs(slope).min() > 1e-4
    difference = (both(1.3 + step)[0] - both(1.3 - step)[0]) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=GRADIENT, atol=GRADIENT)


def test_gradients_are_finite_where_nothing_is_moved() -> None:
    model = tiny_llama()
    knockout = [AttentionKnockout(1, head, 4, list(range(5))) for head in range(4)]
    attention, _, _ = captures(model, prompt(), [*knockout, Edit("v", "set", 0, value=0.0)])
    assert not np.asarray(attention.patterns[1, :, 4]).any() and not np.asarray(attention.values[0]).any()

    def total(attention: AttentionCapture) -> Any:
        nothing = attention_rollout(attention, jnp.float32(0.0)).values  # an empty row that nothing fills
        return sum(result.values.sum() for result in flows(model, attention)) + nothing.sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, allow_int=True))(attention)):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()
    assert float(attention_rollout(attention).values[1, 4].sum()) == pytest.approx(1.0, abs=ROUNDING)


def test_the_top_attributions_are_sorted_and_named() -> None:
    model = tiny_llama()
    some = captures(model, prompt(), layers=(2, 1))
    names = {"head_attribution": "head", "neuron_attribution": "neuron", "component_attribution": "component"}
    for method, result in all_four(model, some).items():
        values = np.asarray(result.values)
        rows = AttributionMethods.top_attributions(result, 5)
        order = sorted(np.ndindex(values.shape), key=lambda i, values=values: -abs(values[i]))[:5]
        assert len(rows) == min(5, values.size)
        for row, index in zip(rows, order, strict=True):
            want: dict[str, Any] = {"layer": (2, 1)[index[0]], "value": float(values[index])}
            if method in names:
                unit = index[1]
                want[names[method]] = ("attention", "mlp")[unit] if method == "component_attribution" else unit
            assert row == want
    found, where = jax.jit(lambda x: AttributionMethods.top_values(x, 3))(jnp.array([[1.0, -5.0], [4.0, 0.0]]))
    assert found.tolist() == [-5, 4, 1] and where.tolist() == [[0, 1], [1, 0], [0, 0]]


def test_what_is_refused() -> None:
    model = tiny_llama()
    unembed = model.lm_head.weight
    attention, residual, mlp = captures(model, prompt())
    some = captures(model, prompt(), layers=(2, 1))
    direct, component, heads, neurons = (
        AttributionMethods.direct_logit_attribution, AttributionMethods.component_attribution,
        AttributionMethods.head_attribution, AttributionMethods.neuron_attribution,
    )  # fmt: skip
    other = captures(model, prompt(seed=4))
    wrong_model = tiny_llama(num_hidden_layers=2)
    for error, words, call in (
        (ValueError, "token is 61, and the vocabulary has ids 0 to 60", lambda: direct(residual, unembed, 61)),
        (ValueError, "token is -1", lambda: direct(residual, unembed, (3, -1))),
        (ValueError, "token holds 1 ids", lambda: direct(residual, unembed, [3])),
        (TypeError, "to_single_token", lambda: direct(residual, unembed, " Paris")),
        (TypeError, "token is 1.0", lambda: heads(attention, model, 1.0)),
        (TypeError, "token is True", lambda: heads(attention, model, True)),
        (TypeError, "an id is needed", lambda: direct(residual, unembed, jnp.array([3, 4]))),
        (ValueError, r"\[V, E\] with E = 24 is needed", lambda: direct(residual, unembed.T, 3)),
        (TypeError, "model.lm_head.weight", lambda: direct(residual, model.lm_head, 3)),
        (ValueError, "position is 11, but the prompt has 11 tokens", lambda: direct(residual, unembed, 3, 11)),
        (TypeError, "position is 1.5", lambda: neurons(mlp, model, 3, 1.5)),
        (TypeError, "takes a ResidualCapture", lambda: direct(attention, unembed, 3)),
        (TypeError, "takes a ResidualCapture", lambda: heads(attention, model, 3, residual=mlp)),
        (ValueError, "attn_out of this ResidualCapture was not captured",
         lambda: direct(ResidualCapture(**{**vars(residual), "attn_out": None}), unembed, 3)),
        (ValueError, r"residual has layers \[0, 1, 2\] and mlp \[2, 1\]", lambda: component(residual, some[2], unembed, 3)),
        (ValueError, "different prompts", lambda: component(residual, other[2], unembed, 3)),
        (ValueError, "different prompts", lambda: heads(attention, model, 3, residual=other[1])),
        (ValueError, "lacks the final norm's scale", lambda: heads(some[0], model, 3)),
        (ValueError, "lacks the final norm's scale", lambda: neurons(some[2], model, 3)),
        (ValueError, "of another model", lambda: heads(attention, wrong_model, 3)),
        (ValueError, "of another model", lambda: neurons(mlp, tiny_llama(intermediate_size=8), 3)),
        (TypeError, "Give its .model", lambda: stack_head_results(attention, LlamaAttentionAdapter(model))),
        (ValueError, "Flow passes through every layer", lambda: attention_rollout(some[0])),
        (ValueError, "Flow passes through every layer", lambda: attention_flow(some[0])),
        (ValueError, "residual_weight is 2", lambda: attention_rollout(attention, 2)),
        (ValueError, "position is -12", lambda: attention_flow(attention, -12)),
        (TypeError, "position is 'last'", lambda: attention_flow(attention, "last")),
        (ValueError, "this one is of attention_rollout",
         lambda: AttributionMethods.top_attributions(attention_rollout(attention))),
        (ValueError, "k is 0", lambda: AttributionMethods.top_attributions(direct(residual, unembed, 3), 0)),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()
    # Where only the device sees an id that is not there, nothing looks like an answer.
    assert np.isnan(jax.jit(lambda token: direct(residual, unembed, token).values)(61)).all()
    batched = jax.vmap(lambda token: direct(residual, unembed, token))(jnp.arange(2))
    with pytest.raises(ValueError, match="take one row"):
        AttributionMethods.top_attributions(batched)


CASES = {"answer": (FRANCE, (" Paris",), 17.3713), "difference": (IOI.format("John"), (" Mary", " John"), 6.1196)}


@pytest.mark.real
@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_attribution_agrees_with_hooks_on_hugging_face(adapter: LlamaAttentionAdapter, hf, case: str) -> None:
    import torch

    text, words, documented = CASES[case]
    ids = adapter.tokenizer.encode(text)
    target = [adapter.to_single_token(word) for word in words]
    token = target[0] if len(target) == 1 else tuple(target)

    seen: dict[tuple[str, int], torch.Tensor] = {}

    def hook(name: str, layer: int, outgoing: bool):
        def keep(_, given, output):
            seen[name, layer] = (output if outgoing else given[0]).detach()[0, -1].double()

        return keep

    handles = [hf.model.embed_tokens.register_forward_hook(hook("embedding", 0, True)),
               hf.model.norm.register_forward_hook(hook("last", 0, False))]  # fmt: skip
    for i, layer in enumerate(hf.model.layers):
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        handles += [o.register_forward_hook(hook("z", i, False)), o.register_forward_hook(hook("attention", i, True)),
                    down.register_forward_hook(hook("mlp", i, True)), down.register_forward_hook(hook("act", i, False))]  # fmt: skip
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0, -1].double()
    for handle in handles:
        handle.remove()

    with torch.no_grad():
        unembed = hf.lm_head.weight[target].double()
        direction = unembed[0] - (unembed[1] if len(target) == 2 else 0)
        scale = torch.rsqrt(seen["last", 0].pow(2).mean() + hf.config.rms_norm_eps)
        gain = hf.model.norm.weight.double() * scale * direction
        o = [layer.self_attn.o_proj.weight.double() for layer in hf.model.layers]
        want_heads = [
            [float(o[i][:, h * 64 : h * 64 + 64] @ seen["z", i][h * 64 : h * 64 + 64] @ gain) for h in range(9)]
            for i in range(30)
        ]
        want_neurons = torch.stack([
            seen["act", i] * (gain @ layer.mlp.down_proj.weight.double()) for i, layer in enumerate(hf.model.layers)
        ])  # fmt: skip
        want = np.array([[float(seen[name, i] @ gain) for name in ("attention", "mlp")] for i in range(30)])
        logit = float(logits[target[0]] - (logits[target[1]] if len(target) == 2 else 0))
    assert abs(logit - documented) < 1e-3

    full = adapter.capture_full(text)
    results = all_four(adapter.model, (full.attention, full.residual, full.mlp), token)
    for method, theirs in (("direct_logit_attribution", want.sum(1)), ("component_attribution", want),
                           ("head_attribution", want_heads), ("neuron_attribution", want_neurons.numpy())):  # fmt: skip
        result = results[method]
        np.testing.assert_allclose(result.values, theirs, atol=LOGITS)
        np.testing.assert_allclose(result.details["logit"], logit, atol=LOGITS)
        np.testing.assert_allclose(result.details["embedding"], float(seen["embedding", 0] @ gain), atol=LOGITS)
        assert abs(float(result.completeness_error)) <= 1e-3 * abs(logit)
        assert np.abs(result.details["edits"]).max() < LOGITS and abs(float(result.details["norm_edit"])) < LOGITS
    assert_leads(np.abs(want_heads).ravel())
    top = AttributionMethods.top_attributions(results["head_attribution"], 1)[0]
    assert (top["layer"], top["head"]) == {"answer": (23, 4), "difference": (23, 3)}[case]


def test_the_guides_attribution_runs(trained: LlamaAttentionAdapter) -> None:
    full = trained.capture_full(FRANCE)
    paris, unembed = trained.to_single_token("Paris"), trained.model.lm_head.weight
    dla = AttributionMethods.direct_logit_attribution(full.residual, unembed, paris, position=-1)
    bars = [f"L{layer:2d}: {value:+.4f} {'█' * int(abs(value) * 20)}" for layer, value in enumerate(dla.values)]
    assert len(bars) == 4 and all(re.fullmatch(r"L \d: [+-]\d+\.\d{4} █*", bar) for bar in bars) and "█" in bars[-1]
    comp = AttributionMethods.component_attribution(full.residual, full.mlp, unembed, paris)
    lines = [f"{comp.values[layer, 0]:+.3f}, {comp.values[layer, 1]:+.3f}" for layer in range(len(comp.values))]
    assert len(lines) == 4


@pytest.mark.numerical
def test_a_result_prints_in_one_line() -> None:
    residual = captures(tiny_llama(), prompt())[1]
    result = AttributionMethods.direct_logit_attribution(residual, tiny_llama().lm_head.weight, 3)
    # The error is rounding, on some processors none at all: `0.0e+00`.
    shown = re.fullmatch(
        r"Result\(direct_logit_attribution: values \[3\]; completeness_error (-?\d\.\de[+-]\d{2,}); details embedding, edits, norm_edit, logit\)",
        repr(result),
    )
    assert shown
    error = float(result.completeness_error)
    assert abs(float(shown[1]) - error) <= 0.051 * 10.0 ** int(shown[1].split("e")[1])
