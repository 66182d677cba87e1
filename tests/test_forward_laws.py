"""Laws of the pure function: identities between sites, equality of routes, and what a capture costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureSpec, Edit, forward, lens
from oculi_jax.models.decoder.attention import masked_softmax
from oculi_jax.models.llama import Llama, expand_kv

from .tiny import SITES, prompt, tiny_llama
from .tolerances import ROUNDING, ROUTES

ALL = tuple(SITES)
KINDS = {
    "gqa": {},
    "mha-bias": dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "mqa-tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "dynamic": dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=8),
}


def near(a, b, tolerance: float = ROUTES) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance, rtol=tolerance)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Llama:
    return tiny_llama(**KINDS[request.param])


@pytest.mark.quick
@pytest.mark.numerical
def test_the_stream_is_the_sum_of_its_parts(model: Llama) -> None:
    a = forward(model, prompt(), capture=ALL).activations
    near(a["embed"] + a["attn_out"].sum(0) + a["mlp_out"].sum(0), a["resid_post"][-1])
    near(a["resid_pre"] + a["attn_out"], a["resid_mid"])
    near(a["resid_pre"][1:], a["resid_post"][:-1], 0)
    near(a["resid_pre"][0], a["embed"], 0)


@pytest.mark.quick
@pytest.mark.numerical
def test_heads_sum_to_the_attention_output(model: Llama) -> None:
    a = forward(model, prompt(), capture=("z", "attn_out", "pattern", "v")).activations
    o = model.layers.attn.o
    out = np.einsum("lhtd,lehd->lte", a["z"], o.weight[...], dtype=np.float64)
    if o.bias is not None:
        out += np.asarray(o.bias[...])[:, None, :]
    near(out, a["attn_out"])
    values = expand_kv(a["v"], model.config)
    near(np.einsum("lhts,lhsd->lhtd", a["pattern"], values), a["z"])
    near(a["pattern"].sum(-1), np.ones(a["pattern"].shape[:-1]))
    assert [model.config.kv_head(h) for h in range(4)] == [
        h // (4 // model.config.num_key_value_heads) for h in range(4)
    ]
    for h in range(4):
        near(values[:, h], a["v"][:, model.config.kv_head(h)], 0)


@pytest.mark.numerical
@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_changes_nothing_at_the_real_tokens(model: Llama, left: bool) -> None:
    tokens, n = prompt(), 4
    real = np.arange(11 + n) >= n if left else np.arange(11 + n) < 11
    padded = np.zeros(11 + n, np.int32)
    padded[real] = tokens
    plain = forward(model, tokens, capture=ALL)
    out = forward(model, padded, capture=ALL, mask=real)
    for name, value in out.activations.items():
        for axis, letter in enumerate((("L",) if SITES[name].layered else ()) + SITES[name].axes):
            if letter in "TS":
                value = np.compress(real, value, axis)
        near(value, plain.activations[name])
    near(out.logits[real], plain.logits)
    assert not np.asarray(out.activations["pattern"])[:, :, ~real].any()
    near(forward(model, padded, logits="last", mask=real).logits, plain.logits[-1])
    got = forward(model, padded, capture=CaptureSpec("resid_mid", positions=[0, -1]), mask=real).activations[
        "resid_mid"
    ]
    near(got, plain.activations["resid_mid"][:, [0, -1]])


@pytest.mark.quick
def test_capturing_some_layers_and_positions_is_indexing_all(model: Llama) -> None:
    whole = forward(model, prompt(), capture=ALL)
    spec = CaptureSpec(tuple(name for name, site in SITES.items() if site.layered), layers=(2, 0), positions=(-1, 3))
    some = forward(model, prompt(), capture=(spec, "embed"))
    near(some.activations["embed"], whole.activations["embed"], 0)
    for name in spec.sites:
        axis = 1 + SITES[name].axes.index("T")
        want = np.take(np.asarray(whole.activations[name])[[2, 0]], [10, 3], axis)
        near(some.activations[name], want, ROUNDING)
    near(some.logits, whole.logits, ROUNDING)


def test_capture_dtype_and_logit_choices() -> None:
    model = tiny_llama()
    out = forward(model, prompt(), capture=CaptureSpec("pattern", dtype="bfloat16"), logits="last")
    assert out.activations["pattern"].dtype == jnp.bfloat16
    near(out.logits, forward(model, prompt()).logits[-1], ROUNDING)
    assert forward(model, prompt(), logits="none").logits is None


@pytest.mark.quick
def test_captures_do_not_allocate_or_run_layers_that_nobody_wants() -> None:
    model = tiny_llama(num_hidden_layers=16)

    def compiled(**kwargs):
        return jax.jit(lambda m, t: forward(m, t, **kwargs)).lower(model, prompt(32)).compile()

    def n_bytes(layers):
        memory = compiled(capture=CaptureSpec("pattern", layers=layers)).memory_analysis()
        return memory.output_size_in_bytes + memory.temp_size_in_bytes

    every = n_bytes(None)
    for few, more in (([3], [3, 4]), ([3, 4], [3, 4, 9])):
        assert n_bytes(more) - n_bytes(few) <= every / 16
    lengths = set()
    jaxpr = jax.make_jaxpr(lambda m: forward(m, prompt(), capture=CaptureSpec("q", layers=[2]), logits="none"))(model)
    for equation in jax.tree.leaves([jaxpr.eqns] + [e.params["jaxpr"].eqns for e in jaxpr.eqns if "jaxpr" in e.params]):
        if equation.primitive.name == "scan":
            lengths.add(equation.params["length"])
    assert lengths == {3}


@pytest.mark.quick
@pytest.mark.numerical
def test_the_lens_of_the_last_residual_is_the_models_own_logits(model: Llama) -> None:
    out = forward(model, prompt(), capture="resid_post")
    resid = out.activations["resid_post"]
    near(lens(model, resid[-1]), out.logits)
    near(lens(model, resid)[-1], out.logits)
    values, ids = lens(model, resid, top_k=5)
    assert values.shape == ids.shape == (3, 11, 5)
    near(values, np.sort(np.asarray(lens(model, resid)), -1)[..., ::-1][..., :5])
    near(lens(model, resid, tokens=[3, 1]), lens(model, resid)[..., [3, 1]])
    near(lens(model, resid[0, 0]), lens(model, resid)[0, 0])


@pytest.mark.quick
@pytest.mark.numerical
def test_transformations_agree_with_plain_calls() -> None:
    model = tiny_llama()
    batch = np.stack([prompt(seed=i) for i in range(3)])
    mapped = jax.vmap(lambda t: forward(model, t, capture="z"))(batch)
    jitted = jax.jit(lambda m, t: forward(m, t, capture="z"))(model, batch[1])
    single = forward(model, batch[1], capture="z")
    near(mapped.logits[1], single.logits)
    near(mapped.activations["z"][1], single.activations["z"])
    near(jitted.logits, single.logits, ROUNDING)
    shapes = jax.eval_shape(lambda m: forward(m, batch[0], capture=ALL), model)
    for name, value in forward(model, batch[0], capture=ALL).activations.items():
        assert shapes.activations[name].shape == value.shape and shapes.activations[name].dtype == value.dtype


def test_rematerialisation_changes_the_memory_and_not_the_gradient() -> None:
    model = tiny_llama(num_hidden_layers=8)

    def loss(model: Llama, remat: bool):
        return forward(model, prompt(32), remat=remat).logits.sum()

    plain, remat = (jax.grad(loss)(model, flag) for flag in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        near(a, b, 10 * ROUTES)
    temp = [
        jax.jit(jax.grad(loss), static_argnums=1).lower(model, flag).compile().memory_analysis().temp_size_in_bytes
        for flag in (False, True)
    ]
    assert temp[1] < 0.7 * temp[0]


def test_a_reverse_pass_keeps_no_weights_of_the_layers() -> None:
    """Of none, not even of another shape: it reads those that there are."""
    model = tiny_llama(num_hidden_layers=32, hidden_size=96, head_dim=24)

    def loss(share: jax.Array, model: Llama) -> jax.Array:
        return forward(model, prompt(2), Edit("embed", "scale", None, value=share), logits="last").logits[0]

    held = jax.jit(jax.grad(loss)).lower(jnp.float32(0.9), model).compile().memory_analysis().temp_size_in_bytes
    smallest = min(x.nbytes for x in jax.tree.leaves(model.layers) if x.ndim > 2)  # of all layers
    assert held < smallest


@pytest.mark.quick
def test_masked_softmax_has_neither_nan_values_nor_nan_gradients() -> None:
    scores = jnp.array([[[1e4, -1e4, 3e38], [0.0, 1.0, 2.0], [jnp.inf, 1.0, 2.0]]])
    allowed = jnp.array([[[True, True, False], [False, False, False], [False, True, True]]])
    pattern = masked_softmax(scores, allowed)
    near(pattern[0, 0], [1, 0, 0], 0)
    near(pattern[0, 1], [0, 0, 0], 0)
    near(pattern[0, 2], np.array([0, 1, np.e]) / (1 + np.e), ROUNDING)
    assert np.isfinite(jax.grad(lambda s: (masked_softmax(s, allowed) ** 2).sum())(scores)).all()


def test_ids_that_only_the_device_sees_beyond_the_vocabulary_are_not_a_neighbours() -> None:
    model = tiny_llama()
    assert np.isnan(forward(model, jnp.array([1, 61, 2]), capture="embed").activations["embed"][1]).all()
    assert np.isnan(forward(model, jnp.array([1, -1, 2]), capture="embed").activations["embed"][1]).all()


def test_every_field_of_the_config_is_read() -> None:
    """A field that nobody reads would leave the output as it is when it changes."""
    rope = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0,
        "attention_factor": 1.2,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    wide = dict(head_dim=32, max_position_embeddings=128)

    def out(**changes):
        return np.asarray(forward(tiny_llama(**{**wide, **changes}), prompt(16)).logits)

    for base, changes in (
        (
            rope,
            dict(factor=2.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.5, attention_factor=1.0),
        ),
        (llama3, dict(factor=2.0, original_max_position_embeddings=12, low_freq_factor=2.0, high_freq_factor=8.0)),
    ):
        before = out(rope_scaling=base)
        for name, value in changes.items():
            assert np.abs(before - out(rope_scaling={**base, name: value})).max() > 1e-4, name
    before = out()
    for changed in (
        dict(rms_norm_eps=1e-1), dict(hidden_act="gelu"), dict(rope_theta=100.0),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=8),
    ):  # fmt: skip
        assert np.abs(before - out(**changed)).max() > 1e-4, changed


def test_gradients_flow_through_captures_of_some_layers() -> None:
    model = tiny_llama()

    def loss(model: Llama, layers: tuple[int, ...] | None):
        values = forward(model, prompt(), capture=CaptureSpec("resid_mid", layers=layers)).activations["resid_mid"]
        return (values[-1] ** 2).sum()

    some, whole = jax.grad(loss)(model, (0, 2)), jax.grad(loss)(model, None)
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(whole), strict=True):
        near(a, b, 10 * ROUTES)


def test_positions_that_a_padded_prompt_does_not_have_are_refused_or_nan() -> None:
    model, mask = tiny_llama(), np.arange(11) < 7
    spec = CaptureSpec(("resid_mid", "allowed"), positions=(6, 7))
    with pytest.raises(ValueError, match="the prompt has 7 tokens"):
        forward(model, prompt(), capture=spec, mask=mask)
    out = jax.jit(lambda mask: forward(model, prompt(), capture=spec, mask=mask).activations)(mask)
    assert np.isfinite(out["resid_mid"][:, 0]).all() and np.isnan(out["resid_mid"][:, 1]).all()
    assert not out["allowed"][:, :, 1].any()
