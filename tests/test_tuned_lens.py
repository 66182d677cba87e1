"""The tuned lens: it begins as the logit lens, learns to say what the model will say, and is kept whole in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oculi_jax import LogitConfig, forward, lens
from oculi_jax.analysis.logit_lens import LogitLensAnalysis
from oculi_jax.backends import jax as programs
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.training import TunedLens, train_tuned_lens, tuned_lens_kl
from oculi_jax.training.tuned_lens import _step

from .compilations import compilations
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


def loss_by_definition(tuned: TunedLens, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each layer's mean KL(model ‖ lens) over real positions, in float64, token by token."""
    total, count = np.zeros(L), 0
    norm, unembed = MODEL.norm.weight[...], MODEL.lm_head.weight
    weight, bias = np.asarray(tuned.weight, np.float64), np.asarray(tuned.bias, np.float64)
    for row, real in zip(tokens, mask, strict=True):
        resid = np.asarray(forward(MODEL, row[real], capture="resid_post").activations["resid_post"], np.float64)
        for t in range(real.sum()):
            p = chances(resid[-1, t], norm, unembed)
            for layer in range(L):
                q = chances(resid[layer, t] + weight[layer] @ resid[layer, t] + bias[layer], norm, unembed)
                total[layer] += (p * np.log(p / q)).sum()
            count += 1
    return total / count


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
        ((0, 3, 1), r"layers holds \[3\], and this tuned lens has layers 0 to 2"),
        ((0, 1), "L = 2 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned.translate(resid, layers)


@pytest.mark.parametrize("left", [True, False])
def test_the_loss_is_the_mean_divergence_over_real_tokens(left: bool) -> None:
    tokens, mask = ids(3, 5), np.ones((3, 12), bool)
    mask[1, :4] = mask[2, :7] = False
    if not left:
        mask = mask[:, ::-1]
    near(tuned_lens_kl(MODEL, some_lens(), tokens, mask), loss_by_definition(some_lens(), tokens, mask))
    kl = tuned_lens_kl(MODEL, TunedLens.identity(CONFIG), tokens)
    near(kl, loss_by_definition(TunedLens.identity(CONFIG), tokens, np.ones_like(mask)))
    assert abs(kl[-1]) < ROUNDING and (kl[:-1] > 0.1).all()


@pytest.mark.parametrize("field", ["weight", "bias"])
def test_gradient_is_a_finite_difference(field: str) -> None:
    tokens, tuned, step = ids(4, 6), some_lens(), 1e-2
    gradient = jax.grad(lambda t: tuned_lens_kl(MODEL, t, tokens).sum())(tuned)
    for layer in range(L - 1):
        at = (
            layer,
            *np.unravel_index(np.abs(getattr(gradient, field)[layer]).argmax(), getattr(tuned, field).shape[1:]),
        )

        def moved(h: float, at: tuple = at, layer: int = layer) -> np.ndarray:
            arrays = {"weight": tuned.weight, "bias": tuned.bias}
            arrays[field] = arrays[field].at[at].add(h)
            return tuned_lens_kl(MODEL, TunedLens(**arrays), tokens)[layer]

        want = (moved(step) - moved(-step)) / (2 * step)
        np.testing.assert_allclose(getattr(gradient, field)[at], want, rtol=GRADIENT)


def test_a_step_is_adam_on_that_gradient_and_learns_no_other_layer() -> None:
    tokens = ids(4, 7)
    tuned, losses = train_tuned_lens(MODEL, tokens, n_steps=1, batch_size=4, learning_rate=0.01)
    identity = TunedLens.identity(CONFIG)
    gradient = jax.grad(lambda t: tuned_lens_kl(MODEL, t, tokens).sum())(identity)
    # Adam's first step is lr · g / (|g| + ε), whatever the size of g.
    for field in ("weight", "bias"):
        g, got = np.asarray(getattr(gradient, field))[:-1], np.asarray(getattr(tuned, field))
        clear = np.abs(g) > 1e-4  # where rounding of g cannot turn its sign
        np.testing.assert_allclose(got[:-1][clear], -0.01 * np.sign(g[clear]), rtol=1e-3)
        assert clear.mean() > 0.9 and (got[-1] == 0).all()
    near(losses[0], tuned_lens_kl(MODEL, identity, tokens))
    assert losses.shape == (1, L) and losses[0, -1] == 0


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
    tuned, losses = train_tuned_lens(MODEL, seen, n_steps=300, batch_size=32, learning_rate=1e-2)
    logit, linear, learned = (
        np.asarray(tuned_lens_kl(MODEL, x, held_out))[:-1]
        for x in (TunedLens.identity(CONFIG), least_squares(seen), tuned)
    )
    # Measured: 0.99 and 0.45 nats of the logit lens become 0.52 and 0.22; least squares has 0.61 and 0.24.
    assert_clear(learned, linear)
    assert_clear(learned, 0.6 * logit)
    assert (learned < 0.6 * logit).all() and (learned < linear).all()
    assert losses.shape == (300, L) and (tuned.weight[-1] == 0).all() and (tuned.bias[-1] == 0).all()
    chex.assert_trees_all_equal(MODEL, before)
    # The seed says the order of the rows, and nothing else is random.
    one, other = (train_tuned_lens(MODEL, seen, n_steps=1, batch_size=32, seed=seed)[1] for seed in (0, 1))
    np.testing.assert_array_equal(one[0], losses[0])
    assert not np.array_equal(other[0], losses[0])


def test_rows_of_an_array_and_batches_of_an_iterable_are_one_training() -> None:
    tokens = ids(8, 2)
    order = np.random.default_rng(0).permutation(8)
    batches = (tokens[order[i : i + 4]] for i in (0, 4))
    one, some = train_tuned_lens(MODEL, tokens, n_steps=2, batch_size=4)
    other, losses = train_tuned_lens(MODEL, batches, n_steps=2)
    np.testing.assert_array_equal(one.weight, other.weight)
    np.testing.assert_array_equal(some, losses)
    _, few = train_tuned_lens(MODEL, [tokens] * 2, n_steps=5)
    assert len(few) == 2  # as many steps as there are batches


@pytest.mark.numerical
def test_padding_is_not_learned_from() -> None:
    tokens, pad = ids(4, 3), np.full((4, 5), 9, np.int32)
    mask = np.concatenate([np.zeros((4, 5), bool), np.ones((4, 12), bool)], 1)
    one, losses = train_tuned_lens(MODEL, tokens, n_steps=1)
    other, padded = train_tuned_lens(MODEL, np.concatenate([pad, tokens], 1), n_steps=1, mask=mask)
    near(padded, losses)
    # A sign is that of the gradient, whose rounding is some 1e-7: Adam's first step is of one size whatever the gradient.
    gradient = jax.grad(lambda t: tuned_lens_kl(MODEL, t, tokens).sum())(TunedLens.identity(CONFIG))
    assert_clear(gradient.bias[:-1], 0, margin=2 * ROUTES)
    near(np.sign(one.bias), np.sign(other.bias), 0)


def test_one_program_whatever_the_numbers_and_its_state_is_donated() -> None:
    train_tuned_lens(MODEL, ids(8, 2), n_steps=1, batch_size=2)
    with compilations() as again:
        train_tuned_lens(MODEL, ids(6, 3), n_steps=3, batch_size=2, learning_rate=0.1, seed=4)
    assert not again
    whole = TunedLens.identity(CONFIG)
    state = optax.scale_by_adam().init(whole)
    real = np.ones((2, 12), bool)
    compiled = _step.lower(whole, state, MODEL, ids(2, 0), real, np.float32(0.1)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 3 * L * (E * E + E) * 4  # the lens and Adam's two moments


def test_logits_of_one_layer_alone_are_held() -> None:
    model, tokens = tiny_llama(vocab_size=4096, num_hidden_layers=16), ids(4, 0)
    lens_ = TunedLens.identity(model.config)
    state, real = optax.scale_by_adam().init(lens_), np.ones(tokens.shape, bool)
    memory = _step.lower(lens_, state, model, tokens, real, np.float32(0.1)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * tokens.size * 4096 * 4  # a few [B, T, V], and not one a layer
    gradient = jax.jit(jax.grad(lambda x: tuned_lens_kl(model, x, tokens).sum())).lower(lens_).compile()
    assert gradient.memory_analysis().temp_size_in_bytes < 8 * tokens.size * 4096 * 4


def test_other_models() -> None:
    one_layer = tiny_llama(num_hidden_layers=1)
    tuned, losses = train_tuned_lens(one_layer, ids(2, 0), n_steps=2)  # there is nothing to learn
    assert tuned.weight.shape == (1, E, E) and (losses == 0).all()
    half = tiny_llama(dtype=jnp.bfloat16)
    tuned, losses = train_tuned_lens(half, ids(8, 0), n_steps=20, learning_rate=1e-2)
    assert tuned.weight.dtype == jnp.float32 and (losses[-1, :-1] < losses[0, :-1]).all()


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
        (good[0], {}, ValueError, r"ids \[N, T\] as one array"),
        (good.tolist(), {}, ValueError, r"tokens has shape \[12\]"),
        (good + 60, {}, ValueError, "ids 0 to 60"),
        (good * 1.0, {}, TypeError, "integers are needed"),
        ([], {}, ValueError, "There is no batch"),
        (good, {"n_steps": 0}, ValueError, "n_steps is 0"),
        (good, {"batch_size": 1.5}, TypeError, "batch_size is 1.5"),
        (good, {"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
        (good, {"mask": np.ones((4, 3), bool)}, ValueError, r"mask has shape \[4, 3\]"),
        (good, {"mask": np.eye(4, 12) > 1}, ValueError, "False everywhere in row 0"),
        ([good], {"mask": good > 1}, ValueError, r"mask goes with tokens \[N, T\]"),
    ):
        with pytest.raises(error, match=message):
            train_tuned_lens(MODEL, tokens, **{"n_steps": 1, **options})
    with pytest.raises(TypeError, match="give one as from_pretrained"):
        train_tuned_lens(SimpleNamespace(), good, n_steps=1)


def test_what_is_translated_and_normed_is_what_lens_says() -> None:
    tokens, tuned = ids(1, 8)[0], some_lens()
    out = forward(MODEL, tokens, capture="resid_post")
    logits = lens(MODEL, tuned.translate(out.activations["resid_post"], (0, 1, 2)))
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(out.logits)
    kl = (np.exp(log_p)[None] * (np.asarray(log_p)[None] - np.asarray(log_q))).sum(-1).mean(-1)
    near(tuned_lens_kl(MODEL, tuned, tokens[None]), kl)


def test_it_stands_behind_the_same_calls() -> None:
    adapter, tokens, tuned = LlamaAttentionAdapter(MODEL), ids(1, 8)[0], some_lens()
    resid = np.asarray(forward(MODEL, tokens, capture="resid_post").activations["resid_post"])
    config = LogitConfig(layers=[2, 0], top_k=3, positions=[-1, 4])
    capture = adapter.capture_logits(tokens, config, tuned_lens=tuned)
    assert capture.lens == "tuned" and capture.captured_layers == (2, 0)
    for position in (-1, 4):
        moved = [resid[n, position] + tuned.weight[n] @ resid[n, position] + tuned.bias[n] for n in (2, 0)]
        p = chances(np.array(moved), MODEL.norm.weight[...], MODEL.lm_head.weight)
        near(LogitLensAnalysis().entropy_by_layer(capture, position), -(p * np.log(p)).sum(-1))
        near(LogitLensAnalysis().token_probability_trajectory(capture, 9, position), p[:, 9])
    plain = adapter.capture_logits(tokens, config)
    near(
        adapter.capture_logits(tokens, config, tuned_lens=TunedLens.identity(CONFIG)).top_k_logits,
        plain.top_k_logits,
        ROUNDING,
    )
    assert plain.lens == "logit"
    with pytest.raises(ValueError, match="made for another model"):
        adapter.capture_logits(tokens, tuned_lens=TunedLens.identity(tiny_llama(num_hidden_layers=2).config))
