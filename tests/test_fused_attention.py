"""Attention that nobody looks into, in the forms that other platforms fuse, and the rule that chooses between them.

The form that XLA fuses runs on a CPU too, so here the rule is told that this is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, export

from oculi_jax import forward, generate, sweep
from oculi_jax.intervention import AttentionKnockout, HeadAblation, QScaler, SpectraScaler
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder import attention
from oculi_jax.models.decoder.attention import Sight, attend, form
from oculi_jax.models.decoder.checkpoint import named_parameters
from oculi_jax.models.decoder.derivatives import Derivatives
from oculi_jax.models.llama import Llama
from oculi_jax.prompts import bucket
from oculi_jax.rules import Rules

from .test_layer_kinds import mixed
from .tiny import SITES, prompt, tiny_llama

T = 37
BF16 = 2.0**-8  # half the distance of two bfloat16 numbers around 1
INSIDE = ("scores", "allowed", "pattern")
TOKENS = prompt(T, vocab_size=67)
SCALE = 8**-0.5


@pytest.fixture(scope="module", autouse=True)
def on_a_gpu() -> Iterator[list[tuple[int, int, bool, str]]]:
    """The rule says on this CPU what it says on a GPU; what it was asked is kept: queries, keys, causal, answer."""
    asked: list[tuple[int, int, bool, str]] = []

    def told(platform: str, dtype: Any, n: int, s: int, d: int, **how: bool) -> str:
        said = form("cuda" if platform == "cpu" else platform, dtype, n, s, d, **how)
        asked.append((n, s, how["causal"], said))
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "form", told)
        yield asked


def half(model: Llama) -> Llama:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)


@pytest.fixture(scope="module")
def model() -> Llama:
    """In bfloat16; of lengths and sizes that no other test has, since a program stays what it was when it was compiled."""
    return half(tiny_llama(vocab_size=67, num_hidden_layers=2, head_dim=8, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def wide(model: Llama) -> Llama:
    """The same numbers in float32, which is never fused."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), model)


def is_fused(function: Any, *arguments: Any) -> bool:
    return "platform_index" in str(jax.make_jaxpr(function)(*arguments))


def assert_as_near(fused: Any, explicit: Any, exact: Any, what: object = None) -> None:
    """That two results in bfloat16 err alike, beside float32: neither is the other's judge."""
    f, e, x = (np.asarray(value, np.float64) for value in (fused, explicit, exact))
    size, err, its = (np.sqrt(np.mean(y**2)) for y in (x, f - x, e - x))
    assert np.isfinite(f).all() and size > 0 and its < 0.2 * size, (what, size, its)
    assert err <= 1.5 * its + BF16 / 8 * size, (what, err, its, size)


@pytest.mark.quick
def test_the_rule() -> None:
    for dtype in ("bfloat16", jnp.bfloat16, np.float16):
        assert form("cuda", dtype, 2048, 2048, 128) == form("cuda", dtype, 512, 512, 64) == "cudnn"
        assert form("cuda", dtype, 511, 511, 64) == form("tpu", jnp.bfloat16, 64, 64, 64) == "xla"
        assert form("cpu", dtype, 2048, 2048, 128) == form("rocm", dtype, 64, 64, 64) == "explicit"
    for platform in ("cpu", "cuda", "tpu"):
        for n in (1, 64, 2048):
            assert form(platform, np.float32, n, n, 64) == form(platform, np.float64, n, n, 64) == "explicit"
        assert form(platform, jnp.bfloat16, 31, 31, 64) == "explicit"  # few
        assert form(platform, jnp.bfloat16, 1, 4096, 64) == "explicit"  # decoding
        assert form(platform, jnp.bfloat16, 1000, 4096, 64) == "explicit"  # the end of a long prompt
        assert form(platform, jnp.bfloat16, 2048, 2048, 64, sharded=True) == "explicit"
        assert form(platform, jnp.bfloat16, 2048, 2048, 64, causal=False) == "explicit"  # a window
    ask = partial(form, "cuda", jnp.bfloat16)
    assert ask(64, 100, 64) == ask(64, 64, 64, causal=False) == ask(64, 64, 64, sharded=True) == "xla"
    assert ask(2048, 2048, 256) == ask(2048, 2048, 8) == ask(2047, 2047, 64) == "cudnn"
    assert ask(2048, 2048, 264) == ask(2048, 2048, 12) == form("rocm", jnp.bfloat16, 2048, 2048, 64) == "explicit"
    ask = partial(form, "tpu", jnp.bfloat16)
    assert ask(2048, 2048, 64) == ask(640, 640, 128) == ask(1024, 1024, 256) == "tpu" and ask(64, 64, 64) == "xla"
    assert ask(700, 700, 64) == ask(1024, 1024, 192) == form("tpu", np.float16, 64, 64, 64) == "explicit"


@pytest.mark.parametrize(
    ("platform", "version", "capability", "known"),
    [
        ("gpu", "PJRT C API\ncuda 13000", "9.0", "cuda"), ("gpu", "cuda 12090", "10.3", "cuda"), ("gpu", "cuda 12090", "7.5", "cpu"),
        ("gpu", "rocm 60000", "gfx942", "cpu"), ("tpu", "libtpu", None, "tpu"), ("cpu", "cpu", None, "cpu"),
    ],
)  # fmt: skip
def test_which_kernels_a_process_may_hold(
    monkeypatch: pytest.MonkeyPatch, platform: str, version: str, capability: str | None, known: str
) -> None:
    device = SimpleNamespace(
        platform=platform, client=SimpleNamespace(platform_version=version), compute_capability=capability
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert attention.accelerator() == known


def test_without_cudnn_it_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.accelerator() == "cpu"
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
    monkeypatch.setattr(attention, "accelerator", lambda: "cuda")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 512, 8), *[(2, 512, 8)] * 2)]
    allowed = np.tril(np.ones((512, 512), bool))
    assert not is_fused(lambda q, k, v: attend(q, k, v, Sight(allowed, 512, True, False), Nobody(), SCALE), *shapes)


class Nobody:
    rules = Derivatives()

    def __call__(self, site: str, value: Array, /) -> Array:
        return value

    def touches(self, *sites: str) -> bool:
        return False


def by_hand(q: Any, k: Any, v: Any, allowed: np.ndarray) -> np.ndarray:
    """Softmax attention by its definition, in float64; zero where nothing is allowed."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    weights = np.where(allowed, np.exp(np.einsum("htd,hsd->hts", q, k) / np.sqrt(q.shape[-1])), 0.0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hts,hsd->htd", weights / np.where(total == 0, 1, total), v)


def drawn(n_queries: int, n_keys: int) -> list[Array]:
    rng = np.random.default_rng(3)
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((4, n_queries, 8), *[(2, n_keys, 8)] * 2)]


# Name → which of S keys each of the T tokens may look at, how many any of them can, whether causal, whether padded.
CAUSAL, SLOTS = np.tril(np.ones((T, T), bool)), np.arange(T)
LEFT, RIGHT, HOLES = SLOTS >= 5, SLOTS < T - 5, SLOTS % 4 != 1
SIGHTS = {
    "causal": (CAUSAL, T, True, False),
    "padded on the left": (CAUSAL & LEFT & LEFT[:, None], T, True, True),
    "padded on the right": (CAUSAL & RIGHT & RIGHT[:, None], T, True, True),
    "padded inside": (CAUSAL & HOLES & HOLES[:, None], T, True, True),
    "room for new tokens": (np.pad(CAUSAL & LEFT & LEFT[:, None], [(0, 0), (0, 6)]), T, True, True),
    "a window": (CAUSAL & ~np.tril(np.ones((T, T), bool), -9), T, False, False),
    "the end of a prompt": (np.tril(np.ones((T, T + 4), bool), 4), T + 4, False, False),
}


def test_values_are_those_of_the_definition(on_a_gpu: list[Any]) -> None:
    for name, (allowed, n_seen, causal, padded) in SIGHTS.items():
        q, k, v = drawn(T, allowed.shape[1])
        on_a_gpu.clear()
        run = jax.jit(
            lambda q, k, v, may, rest=(n_seen, causal, padded): attend(q, k, v, Sight(may, *rest), Nobody(), SCALE)
        )
        z = np.asarray(run(q, k, v, allowed), np.float64)
        assert on_a_gpu == [(T, n_seen, causal, "xla")]
        assert_by_hand(z, q, k, v, allowed, name)


def assert_by_hand(z: Any, q: Array, k: Array, v: Array, allowed: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(
        np.asarray(z, np.float64), by_hand(q, k, v, allowed), atol=4 * BF16, rtol=0, err_msg=name
    )
    assert (np.asarray(z)[:, ~allowed.any(-1)] == 0).all(), name


def test_a_causal_kernel_serves_padding_on_any_side() -> None:
    """Whatever the kernel; here one that is causal by definition and never sees a mask, and the TPU's, interpreted."""
    from jax.experimental.pallas import tpu

    def plainly(q: Array, k: Array, v: Array, scale: float) -> Array:
        assert scale == SCALE  # by hand it is that of the heads' size
        return jnp.asarray(by_hand(q, k, v, np.tril(np.ones((q.shape[1], k.shape[1]), bool))), v.dtype)

    for name in ("causal", "padded on the left", "padded on the right", "padded inside"):
        allowed, _, _, padded = SIGHTS[name]
        q, k, v = drawn(T, T)
        assert_by_hand(
            attention._in_order(plainly, q, k, v, jnp.asarray(allowed), plain=not padded, scale=SCALE),
            q,
            k,
            v,
            allowed,
            name,
        )
    q, k, v = drawn(128, 128)
    real = np.arange(128) >= 20
    allowed = np.tril(np.ones((128, 128), bool)) & real & real[:, None]
    with tpu.force_tpu_interpret_mode():
        z = attention._in_order(attention._tpu, q, k, v, jnp.asarray(allowed), plain=False, scale=SCALE)
    assert_by_hand(z, q, k, v, allowed, "tpu")


def test_every_site_is_as_near_to_float32_as_step_by_step(model: Llama, wide: Llama) -> None:
    sites = tuple(site for site in SITES if site not in INSIDE)
    assert is_fused(lambda m: forward(m, TOKENS, capture=sites), model)
    fused, explicit = (forward(model, TOKENS, capture=sites, attention=how) for how in ("auto", "explicit"))
    exact = forward(wide, TOKENS, capture=sites)
    assert_as_near(fused.logits, explicit.logits, exact.logits, "logits")
    for site in sites:
        assert_as_near(fused[site], explicit[site], exact[site], site)


def test_padding_on_either_side_changes_nothing_and_is_zero(model: Llama, wide: Llama) -> None:
    exact, n = forward(wide, TOKENS, capture="z"), 5
    for mask in (np.arange(T + n) >= n, np.arange(T + n) < T):
        tokens = np.full(T + n, 66, np.int32)
        tokens[mask] = TOKENS
        fused, explicit = (
            forward(model, tokens, mask=mask, capture="z", attention=how) for how in ("auto", "explicit")
        )
        assert_as_near(fused.logits[mask], explicit.logits[mask], exact.logits)
        assert_as_near(fused["z"][:, :, mask], explicit["z"][:, :, mask], exact["z"])
        assert (fused["z"][:, :, ~mask] == 0).all()


def loss(model: Llama, alpha: Any, how: Any, remat: bool = False, rules: Rules | None = None) -> Array:
    """Of how strongly a head asks, so that its derivatives go through scores, pattern and values."""
    logits = forward(model, TOKENS, QScaler(0, 1, alpha), remat=remat, attention=how, rules=rules).logits
    return jnp.mean(jax.nn.log_softmax(logits)[:, 3])


def test_what_is_differentiated_is_the_steps(model: Llama, wide: Llama) -> None:
    """Forward, reverse, twice, mapped, linearised and rematerialised: no kernel is left to differentiate again."""
    alphas = jnp.array([0.5, 1.5, 3.0])

    def of(how: str, remat: bool = False) -> Any:
        return lambda model, alpha: loss(model, alpha, how, remat)

    assert is_fused(of("auto"), model, 1.5) and is_fused(of("auto", True), model, 1.5)
    for remat in (False, True):
        f = of("auto", remat)
        for derivative in (
            jax.jacfwd(f, 1),
            lambda m, a, f=f: jax.linearize(partial(f, m), a)[1](1.0),
            jax.grad(jax.grad(f, 1), 1),
        ):
            assert not is_fused(derivative, model, 1.5)

    def mapped(f: Any) -> Any:
        return jax.jit(jax.vmap(f, (None, 0)))

    slopes = {how: mapped(jax.jacfwd(of(how), 1)) for how in ("auto", "explicit")}
    assert_as_near(slopes["auto"](model, alphas), slopes["explicit"](model, alphas), slopes["auto"](wide, alphas))
    twice = mapped(jax.grad(jax.grad(of("auto"), 1), 1))
    np.testing.assert_allclose(twice(model, alphas), twice(wide, alphas), atol=0.1 * np.abs(twice(wide, alphas)).max())


def test_rules_leave_it_fused_and_its_derivative_obeys_them(model: Llama, wide: Llama) -> None:
    stop = {"scores": 0.25, "pattern": np.full((2, 4), 0.5), "v": 0.5}
    rules = Rules(stop, {"z": 0.5, "scores": 0.5}, temperature=np.array([[2.0], [3.0]]))
    assert is_fused(lambda m: forward(m, TOKENS, rules=rules).logits, model)
    np.testing.assert_array_equal(forward(model, TOKENS, rules=rules).logits, forward(model, TOKENS).logits)
    alphas = jnp.array([0.5, 1.5, 3.0])

    def slopes(model: Llama, how: str, rules: Rules | None = rules) -> Array:
        return jax.jit(jax.vmap(jax.grad(lambda alpha: loss(model, alpha, how, rules=rules))))(alphas)

    exact = slopes(wide, "auto")
    assert_as_near(slopes(model, "auto"), slopes(model, "explicit"), exact)
    assert np.abs(exact - slopes(wide, "auto", None)).max() > 0.1 * np.abs(exact).max()


def test_maps_within_maps(model: Llama, wide: Llama) -> None:
    """As sweeps map: strengths inside prompts, whose masks differ; a strength has no mask of its own."""
    masks = np.stack([np.arange(T) >= 4, np.arange(T) < T - 3])
    alphas = np.array([0.0, 2.0, 5.0], np.float32)

    def mapped(model: Llama, how: Any) -> Array:
        def one(mask: Array, alpha: Array) -> Array:
            return forward(model, TOKENS, QScaler(1, 0, alpha), mask=mask, logits="last", attention=how).logits

        return jax.vmap(lambda mask: jax.vmap(partial(one, mask))(alphas))(masks)

    assert is_fused(partial(mapped, how="auto"), model)
    fused, explicit, exact = mapped(model, "auto"), mapped(model, "explicit"), mapped(wide, "auto")
    assert_as_near(fused, explicit, exact)
    assert np.abs(exact[:, 0] - exact[:, 2]).max() > 0.1  # a strength does something


@pytest.mark.quick
def test_in_float32_nothing_is_other_than_it_was(wide: Llama) -> None:
    programs: list[Any] = []
    for how in ("auto", "explicit"):
        for mask in (None, LEFT):
            run = partial(forward, mask=mask, attention=how, remat=mask is None)
            programs.append(str(jax.make_jaxpr(lambda m, run=run: run(m, TOKENS).logits)(wide)))
    assert programs[:2] == programs[2:] and "platform_index" not in "".join(programs)


@pytest.mark.quick
def test_whoever_looks_inside_has_it_step_by_step(model: Llama) -> None:
    def runs(*given: Any, **options: Any) -> bool:
        return is_fused(lambda m: forward(m, TOKENS, *given, **options).activations, model)

    assert runs(capture="z") and runs(HeadAblation(0, 1), capture="z") and runs(QScaler(0, 1, 2.0), capture="k")
    assert not runs(capture=("z", "pattern")) and not runs(capture="scores")
    assert not runs(AttentionKnockout(0, 1, -1, 0), capture="z") and not runs(SpectraScaler(0, 1, 2.0), capture="z")
    assert not runs(capture="z", attention="explicit")


@pytest.mark.quick
def test_windows_prompts_and_sets(model: Llama, on_a_gpu: list[Any]) -> None:
    """What the rule is asked of layers with windows, of decoding, and of a sweep."""

    def asked(function: Any, *arguments: Any) -> list[Any]:
        on_a_gpu.clear()
        assert is_fused(function, *arguments)
        return list(on_a_gpu)

    own = mixed(model)
    windowed = asked(lambda p: forward(Llama(own.config, p), TOKENS).logits, named_parameters(model))
    assert windowed == [(T, T, False, "xla")]
    written = asked(lambda m: generate(m, TOKENS, 5, stop_tokens=()), model)
    padded = bucket(T)
    assert written == [(padded, padded, True, "xla"), (1, padded + 5, False, "explicit")]
    heads = HeadAblation.grid(model.config)
    swept = asked(lambda m: sweep(m, TOKENS, heads, logit_difference(1, 2)), model)
    # The last layer runs for the one token that the metric reads.
    assert {(T, T, True, "xla"), (1, T, False, "explicit")} == set(swept)


def test_a_model_on_several_devices_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []
    monkeypatch.setattr(attention, "form", lambda *_, sharded, **__: said.append(sharded) or "explicit")
    mesh = jax.make_mesh(
        (1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:2]
    )
    q, k, v = drawn(T, T)
    for spec in (None, jax.sharding.PartitionSpec("model")):
        given = q if spec is None else jax.device_put(q, jax.sharding.NamedSharding(mesh, spec))
        jax.jit(lambda q: attend(q * 2, k, v, Sight(jnp.asarray(CAUSAL), T, True, False), Nobody(), SCALE)).trace(given)
    assert said == [False, True]


def test_lowered_for_a_gpu(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's kernel: in programs for a GPU alone, of padded prompts too, under maps of some operands, never differentiated."""

    class Version:
        def cudnn_get_version(self) -> int:
            return 91100

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", Version())
    monkeypatch.setattr(attention, "accelerator", lambda: "cuda")
    tokens, masks = prompt(512, vocab_size=67), np.arange(512) >= np.array([[4], [0]])
    alphas = np.ones(3, np.float32)
    names = [f"__cudnn$fmhaSoftmax{way}" for way in ("", "Backward")]
    leaves, tree = jax.tree.flatten(model)

    def text(function: Any, platform: str) -> str:
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in names]
        program = jax.jit(lambda leaves: function(jax.tree.unflatten(tree, leaves)))
        return export.export(program, platforms=[platform], disabled_checks=checks)(leaves).mlir_module()

    def last(model: Llama, alpha: Any, mask: Any, **options: Any) -> Array:
        return forward(model, tokens, QScaler(0, 1, alpha), mask=mask, logits="last", **options).logits

    def plain(model: Llama) -> Array:
        return last(model, 1.0, None)

    def mapped(model: Llama) -> Array:
        return jax.vmap(lambda a: jax.vmap(lambda mask: last(model, a, mask))(masks))(alphas)

    def twice(model: Llama) -> Array:
        return jax.vmap(jax.grad(jax.grad(lambda a: last(model, a, None)[0])))(alphas)

    assert "__cudnn$fmhaSoftmax" in text(plain, "cuda") and "__cudnn" not in text(plain, "cpu")
    assert "-> (tensor<6x4x512x8xbf16>" in text(mapped, "cuda")
    assert "__cudnn" not in text(twice, "cuda")
    assert "__cudnn" not in text(lambda m: last(m, 1.0, None, attention="explicit"), "cuda")
    in_float16 = text(lambda m: last(jax.tree.map(lambda x: x.astype(jnp.float16), m), 1.0, masks[0]), "cuda")
    assert "-> (tensor<1x4x512x8xf16>" in in_float16


@pytest.mark.quick
def test_what_attention_may_be(model: Llama) -> None:
    for wrong in ("flash", None, ["auto"]):
        with pytest.raises(ValueError, match="must be 'auto' .* or 'explicit'"):
            forward(model, TOKENS, attention=wrong)  # type: ignore[arg-type]


@pytest.mark.torch
def test_torch_fuses_too_and_explicit_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.nn import functional

    from oculi_jax.backends.torch import TorchDecoder

    own = tiny_llama()
    params = {name: np.asarray(value) for name, value in named_parameters(own).items()}
    model: Any = TorchDecoder.from_arrays(own.config, params, torch.device("cpu"))
    calls: list[int] = []
    kernel = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    for mask in (None, np.arange(11) >= 3):
        calls.clear()
        explicit = forward(model, prompt(), capture="z", mask=mask, attention="explicit")
        assert not calls and set(explicit.activations) == {"z"}
        fused = forward(model, prompt(), capture="z", mask=mask)
        assert len(calls) == own.config.num_hidden_layers
        for a, b in ((fused.logits, explicit.logits), (fused["z"], explicit["z"])):
            np.testing.assert_allclose(a, b, atol=2e-5)
