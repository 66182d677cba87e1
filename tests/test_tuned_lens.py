"""The tuned lens: it begins as the logit lens, learns to say what the model will say, and is kept whole in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import LogitConfig, forward, lens
from oculi_jax.analysis.logit_lens import LogitLensAnalysis
from oculi_jax.backends import jax as programs
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter
from oculi_jax.training import FittedLens, TunedLens, lens_kl, train_tuned_lens, untrained
from oculi_jax.training.tuned_lens import _loss_of

from .margins import assert_clear
from .test_forward_laws import near
from .test_logit_lens import chances
from .tiny import tiny_llama
from .tolerances import GRADIENT, ROUNDING, ROUTES

L, E, V = 3, 24, 61
MODEL = tiny_llama()
CONFIG = MODEL.config


def ids(n: int, seed: int, length: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (n, length)).astype(np.int32)


def some_lens(seed: int = 0, scale: float = 0.05) -> TunedLens:
    rng = np.random.default_rng(seed)
    weight, bias = (rng.normal(0, scale, shape).astype(np.float32) for shape in ((L, E, E), (L, E)))
    return TunedLens(jnp.asarray(weight), jnp.asarray(bias))


def loss_by_definition(tuned: TunedLens, tokens: np.ndarray, mask: np.ndarray, reads: Llama = MODEL) -> np.ndarray:
    """Each prompt's and layer's mean KL(model ‖ lens) over real positions, in float64, token by token."""
    found = np.zeros((len(tokens), L))
    norm, unembed = MODEL.norm.weight[...], MODEL.lm_head.weight
    weight, bias = np.asarray(tuned.weight, np.float64), np.asarray(tuned.bias, np.float64)
    for n, (row, real) in enumerate(zip(tokens, mask, strict=True)):
        last, resid = (
            np.asarray(forward(m, row[real], capture="resid_post").activations["resid_post"], np.float64)
            for m in (MODEL, reads)
        )
        for t in range(real.sum()):
            p = chances(last[-1, t], norm, unembed)
            for layer in range(L):
                q = chances(resid[layer, t] + weight[layer] @ resid[layer, t] + bias[layer], norm, unembed)
                found[n, layer] += (p * np.log(p / q)).sum() / real.sum()
    return found


def test_it_begins_as_the_logit_lens() -> None:
    resid = forward(MODEL, ids(1, 0)[0], capture="resid_post").activations["resid_post"]
    identity = TunedLens.identity(CONFIG)
    for dtype in (jnp.float32, jnp.bfloat16):
        moved = identity.translate(resid.astype(dtype), (0, 1, 2))
        assert moved.dtype == dtype
        np.testing.assert_array_equal(moved, resid.astype(dtype))
    plain, tuned = (programs.lens(MODEL, x, ("logits",)) for x in (resid, identity.translate(resid, (0, 1, 2))))
    np.testing.assert_array_equal(tuned["logits"], plain["logits"])


def test_translators_belong_to_true_layers() -> None:
    tuned, resid = some_lens(), np.random.default_rng(1).normal(size=(L, 5, E)).astype(np.float32)
    want = [[h + np.asarray(w) @ h + np.asarray(b) for h in rows] for w, b, rows in zip(tuned.weight, tuned.bias, resid, strict=True)]  # fmt: skip
    near(tuned.translate(resid, (0, 1, 2)), want, ROUNDING)
    near(tuned.translate(resid[[2, 0]], (2, 0)), np.array(want)[[2, 0]], ROUNDING)
    batch = np.stack([resid, -resid])
    got = jax.jit(jax.vmap(lambda x: tuned.translate(x, (0, 1, 2))))(batch)
    near(got[0], want, ROUNDING)
    near(got[1], tuned.translate(-resid, (0, 1, 2)), ROUNDING)
    for layers, message in (
        ((0, 3, 1), r"layers holds \[3\], and this lens has layers 0 to 2"),
        ((0, 1), "L = 2 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.translate(resid, layers)


@pytest.mark.parametrize("left", [True, False])
def test_a_lens_is_judged_by_the_mean_divergence_over_each_prompts_real_tokens(left: bool) -> None:
    tokens, mask = ids(3, 5), np.ones((3, 12), bool)
    mask[1, :4] = mask[2, :7] = False
    if not left:
        mask = mask[:, ::-1]
    near(lens_kl(MODEL, some_lens(), tokens, mask), loss_by_definition(some_lens(), tokens, mask))
    kl = lens_kl(MODEL, None, tokens)
    near(kl, loss_by_definition(TunedLens.identity(CONFIG), tokens, np.ones_like(mask)))
    assert (abs(kl[:, -1]) < ROUNDING).all() and (kl[:, :-1] > 0.1).all()


@pytest.mark.parametrize("field", ["weight", "bias"])
def test_gradient_is_a_finite_difference(field: str) -> None:
    tokens, tuned, step = ids(4, 6), some_lens(), 1e-2
    gradient = jax.grad(lambda t: lens_kl(MODEL, t, tokens).mean(0).sum())(tuned)
    for layer in range(L - 1):
        at = (
            layer,
            *np.unravel_index(np.abs(getattr(gradient, field)[layer]).argmax(), getattr(tuned, field).shape[1:]),
        )

        def moved(h: float, at: tuple = at, layer: int = layer) -> np.ndarray:
            arrays = {"weight": tuned.weight, "bias": tuned.bias}
            arrays[field] = arrays[field].at[at].add(h)
            return lens_kl(MODEL, TunedLens(**arrays), tokens)[:, layer].mean()

        want = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(getattr(gradient, field)[at], want, rtol=GRADIENT)


def settings(**changes: Any) -> dict[str, Any]:
    return {"key": jax.random.key(0), "controls": False, "progress": False, **changes}


def test_a_step_is_adam_on_the_gradient_of_all_real_tokens_and_learns_no_other_layer() -> None:
    tokens, mask = ids(4, 7), np.ones((4, 12), bool)
    mask[0, 8:] = mask[1, :5] = mask[2, 3:] = False
    found = train_tuned_lens(MODEL, tokens, mask=mask, **settings(steps=1, batch_size=4, learning_rate=0.01))
    rest = np.setdiff1d(np.arange(4), found.held_out)
    identity, weights = TunedLens.identity(CONFIG), mask[rest].sum(1) / mask[rest].sum()  # every token weighs alike

    def mean(lens: TunedLens) -> Any:
        return (lens_kl(MODEL, lens, tokens[rest], mask[rest]) * weights.astype(np.float32)[:, None]).sum(0)

    gradient = jax.grad(lambda t: mean(t).sum())(identity)
    # Adam's first step is lr · g / (|g| + ε), whatever the size of g.
    for field in ("weight", "bias"):
        g, got = np.asarray(getattr(gradient, field))[:-1], np.asarray(getattr(found.lens, field))
        clear = np.abs(g) > 1e-4  # where rounding of g cannot turn its sign
        np.testing.assert_allclose(got[:-1][clear], -0.01 * np.sign(g[clear]), rtol=1e-3)
        assert clear.mean() > 0.9 and (got[-1] == 0).all()
    want = loss_by_definition(identity, tokens[rest], mask[rest])
    near(found.losses, (want[:, :-1].mean(1) * weights).sum(keepdims=True))
    near(found.kl, loss_by_definition(found.lens, tokens[found.held_out], mask[found.held_out]))
    near(found.controls["logit lens"], loss_by_definition(identity, tokens[found.held_out], mask[found.held_out]))


def test_the_control_reads_the_streams_of_a_model_that_learnt_nothing(tmp_path: Path) -> None:
    tokens, key = ids(4, 7), jax.random.key(0)
    tried = settings(steps=2, batch_size=2, learning_rate=1e-4, controls=True, file=tmp_path / "fit.safetensors")
    found = train_tuned_lens(MODEL, tokens, **tried)
    assert isinstance(found, FittedLens) and list(found.controls) == ["logit lens", "untrained weights"]
    assert {path.name for path in tmp_path.iterdir()} == {"fit.safetensors", "fit-untrained.safetensors"}
    # Two small steps of Adam from the identity: still near what the untrained model's own streams say through this one's head.
    other = untrained(MODEL, jax.random.split(key, 3)[2])
    held = tokens[found.held_out]
    begun = loss_by_definition(TunedLens.identity(CONFIG), held, np.ones_like(held, bool), other)
    assert np.abs(found.controls["untrained weights"] - begun)[:, :-1].max() < 0.1 < 0.5 < begun.min()
    near(found.controls["untrained weights"][:, -1], begun[:, -1])  # of the last layer nothing is learnt
    assert "held-out prompts; logit lens " in repr(found) and "; untrained weights " in repr(found)


def least_squares(tokens: np.ndarray) -> TunedLens:
    """The affine maps that come nearest to the last layer's residual stream, in closed form."""
    run = jax.vmap(lambda row: forward(MODEL, row, capture="resid_post", logits="none").activations["resid_post"])
    resid = np.asarray(run(tokens)).swapaxes(0, 1).reshape(L, -1, E)
    found = [np.linalg.lstsq(np.pad(x, ((0, 0), (0, 1)), constant_values=1), resid[-1], rcond=None)[0] for x in resid]
    return TunedLens(
        *(
            jnp.asarray(np.stack(x))
            for x in ([f[:-1].T - np.eye(E, dtype=np.float32) for f in found], [f[-1] for f in found])
        )
    )


def test_it_learns_what_the_model_will_say_on_tokens_it_has_not_seen() -> None:
    before = jax.tree.map(np.array, MODEL)
    seen, held_out = ids(512, 0), ids(64, 1)
    found = train_tuned_lens(MODEL, seen, **settings(steps=300, batch_size=32, learning_rate=1e-2))
    tuned, rest = found.lens, np.setdiff1d(np.arange(512), found.held_out)
    logit, linear, learned = (
        np.asarray(lens_kl(MODEL, x, held_out)).mean(0)[:-1]
        for x in (TunedLens.identity(CONFIG), least_squares(seen[rest]), tuned)
    )
    # Measured: 0.99 and 0.45 nats of the logit lens become 0.52 and 0.22; least squares has 0.61 and 0.24.
    assert_clear(learned, linear)
    assert_clear(learned, 0.6 * logit)
    assert (learned < 0.6 * logit).all() and (learned < linear).all()
    assert found.losses.shape == (300,) and (tuned.weight[-1] == 0).all() and (tuned.bias[-1] == 0).all()
    assert (
        found.kl.shape == (128, L) and (found.kl.mean(0)[:-1] < 0.7 * found.controls["logit lens"].mean(0)[:-1]).all()
    )
    chex.assert_trees_all_equal(MODEL, before)


def test_seeds_differ_in_the_order_of_prompts_alone() -> None:
    """The first is the one seed of a fit that has one. Where a batch is all prompts, both are the same."""
    tokens = ids(16, 4)
    one, whole, half = (
        train_tuned_lens(MODEL, tokens, **settings(steps=6, batch_size=size, learning_rate=1e-2, seeds=seeds))
        for size, seeds in ((6, 1), (12, 2), (6, 2))
    )
    np.testing.assert_allclose(half.kl, one.kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(half.losses, one.losses, rtol=1e-4)
    np.testing.assert_allclose(whole.by_seed, whole.kl[:, :-1].mean(), rtol=1e-5)
    assert one.by_seed.shape == (1,) and half.by_seed[0] == pytest.approx(half.kl[:, :-1].mean(), rel=1e-6)
    assert 1e-4 < abs(half.by_seed[1] / half.by_seed[0] - 1) < 0.2
    assert "; 2 seeds " in repr(half) and "seeds" not in repr(one)


@pytest.mark.numerical
def test_padding_is_not_learned_from() -> None:
    tokens, pad = ids(4, 11), np.full((4, 5), 9, np.int32)
    mask = np.concatenate([np.zeros((4, 5), bool), np.ones((4, 12), bool)], 1)
    one = train_tuned_lens(MODEL, tokens, **settings(steps=1, batch_size=3))
    other = train_tuned_lens(MODEL, np.concatenate([pad, tokens], 1), mask=mask, **settings(steps=1, batch_size=3))
    near(other.losses, one.losses)
    near(other.kl, one.kl)
    # A sign is that of the gradient, whose rounding is some 1e-7: Adam's first step is of one size whatever the gradient.
    rest = np.setdiff1d(np.arange(4), one.held_out)
    gradient = jax.grad(lambda t: lens_kl(MODEL, t, tokens[rest]).mean(0).sum())(TunedLens.identity(CONFIG))
    assert_clear(gradient.bias[:-1], 0, margin=2 * ROUTES)
    near(np.sign(one.lens.bias), np.sign(other.lens.bias), 0)


def test_logits_of_one_layer_alone_are_held() -> None:
    model, tokens = tiny_llama(vocab_size=4096, num_hidden_layers=16), ids(4, 0)
    lens_, real = TunedLens.identity(model.config), np.ones(tokens.shape, bool)
    example = {"tokens": tokens, "mask": real}

    def step(lens: TunedLens, model: Llama) -> Any:
        loss = _loss_of(model, None, 12.0)
        return jax.grad(lambda lens: jax.vmap(lambda row: loss(lens, row))(example).mean())(lens)

    gradient = jax.grad(lambda x, model: lens_kl(model, x, tokens).sum())
    for function in (step, gradient):
        memory = jax.jit(function).lower(lens_, model).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 8 * tokens.size * 4096 * 4  # a few [B, T, V], and not one a layer


def test_other_models() -> None:
    with pytest.raises(ValueError, match="there is nothing to translate"):
        train_tuned_lens(tiny_llama(num_hidden_layers=1), ids(4, 0), **settings(steps=2))
    half = tiny_llama(dtype=jnp.bfloat16)
    found = train_tuned_lens(half, ids(8, 0), **settings(steps=20, learning_rate=1e-2))
    assert found.lens.weight.dtype == jnp.float32 and found.losses[-1] < found.losses[0]


def test_a_file_keeps_it_whole_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import safe_open

    tuned, path = some_lens(), tmp_path / "lens.safetensors"
    tuned.save(path, {"model": "tiny"})
    again = TunedLens.load(path)
    np.testing.assert_array_equal(again.weight, tuned.weight)
    np.testing.assert_array_equal(again.bias, tuned.bias)
    with safe_open(path, "numpy") as file:
        assert file.metadata()["model"] == "tiny"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            TunedLens.load(path)
    path.write_bytes(whole)

    def fail(path: Path, *args: object, name: Path) -> None:
        path.write_bytes(whole[:100])
        raise OSError("the disk is full")

    monkeypatch.setattr("oculi_jax.training.tuned_lens.write_tensors", fail)
    for name in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="the disk is full"):
            tuned.save(name)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    from oculi_jax import save

    save({"weight": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="but no tuned lens"):
        TunedLens.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        TunedLens.load(tmp_path / "none")
    TunedLens(jnp.zeros((2, 4, 5)), jnp.zeros((2, 4))).save(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"a tuned lens has \[L, E, E\] and \[L, E\]"):
        TunedLens.load(tmp_path / "odd")
    with pytest.raises(ValueError, match="'format', which is written anyway"):
        some_lens().save(tmp_path / "x", {"format": "mine"})
    with pytest.raises(
        ValueError, match=r"weight \[3, 24, 24\] .* needs \[2, 24, 24\] and \[2, 24\]: .* another model"
    ):
        some_lens().check(tiny_llama(num_hidden_layers=2).config)
    good = ids(4, 0)
    for tokens, options, error, message in (
        (good[0], {}, ValueError, "There is 1 prompt, and some"),
        (good + 60, {}, ValueError, "ids 0 to 60"),
        (good * 1.0, {}, TypeError, "integers are needed"),
        (good[:0], {}, ValueError, "there is no prompt"),
        (good, {"steps": 0}, ValueError, "steps is 0"),
        (good, {"batch_size": 1.5}, TypeError, "batch_size is 1.5"),
        (good, {"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        (good, {"held_out": 0.0}, ValueError, "held_out is 0.0"),
        (good, {"key": 3}, TypeError, "a JAX random key is needed"),
        (good, {"mask": np.ones((4, 3), bool)}, ValueError, r"mask has shape \[4, 3\]"),
    ):
        with pytest.raises(error, match=message):
            train_tuned_lens(MODEL, tokens, **settings(**{"steps": 1, **options}))
    with pytest.raises(TypeError, match="give one as from_pretrained"):
        train_tuned_lens(SimpleNamespace(), good, **settings(steps=1))
    with pytest.raises(TypeError, match="lens is a int, and a TunedLens, a JacobianLens, or what translates"):
        lens_kl(MODEL, 3, good)


def test_what_is_translated_and_normed_is_what_lens_says() -> None:
    tokens, tuned = ids(1, 8)[0], some_lens()
    out = forward(MODEL, tokens, capture="resid_post")
    logits = lens(MODEL, tuned.translate(out.activations["resid_post"], (0, 1, 2)))
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(out.logits)
    kl = (np.exp(log_p)[None] * (np.asarray(log_p)[None] - np.asarray(log_q))).sum(-1).mean(-1)
    near(lens_kl(MODEL, tuned, tokens[None])[0], kl)


def test_it_stands_behind_the_same_calls() -> None:
    adapter, tokens, tuned = LlamaAttentionAdapter(MODEL), ids(1, 8)[0], some_lens()
    resid = np.asarray(forward(MODEL, tokens, capture="resid_post").activations["resid_post"])
    config = LogitConfig(layers=[2, 0], top_k=3, positions=[-1, 4])
    capture = adapter.capture_logits(tokens, config, lens=tuned)
    assert capture.lens == "tuned" and capture.captured_layers == (2, 0)
    for position in (-1, 4):
        moved = [resid[n, position] + tuned.weight[n] @ resid[n, position] + tuned.bias[n] for n in (2, 0)]
        p = chances(np.array(moved), MODEL.norm.weight[...], MODEL.lm_head.weight)
        near(LogitLensAnalysis().entropy_by_layer(capture, position), -(p * np.log(p)).sum(-1))
        near(LogitLensAnalysis().token_probability_trajectory(capture, 9, position), p[:, 9])
    plain = adapter.capture_logits(tokens, config)
    near(
        adapter.capture_logits(tokens, config, lens=TunedLens.identity(CONFIG)).top_k_logits,
        plain.top_k_logits,
        ROUNDING,
    )
    assert plain.lens == "logit"
    with pytest.raises(ValueError, match="made for another model"):
        adapter.capture_logits(tokens, lens=TunedLens.identity(tiny_llama(num_hidden_layers=2).config))
