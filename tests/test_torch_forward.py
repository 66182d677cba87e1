"""`forward` over a Hugging Face module in torch: every site against Hugging Face's own code and against the JAX backend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureSpec, forward, lens
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
    QScaler,
    SpectraScaler,
    Steer,
)
from oculi_jax.models.decoder.activations import ACTIVATIONS
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .margins import assert_leads
from .test_parity_torch import ROPES, assert_no_further, make
from .tiny import SITES
from .tolerances import LOGITS, ROW, assert_parity, parity, row_error

pytestmark = pytest.mark.torch

TOKENS = np.random.default_rng(1).integers(0, 61, 13)
PADDED = np.arange(13) >= 3


def check(hf: Any, n_tokens: int, mask: np.ndarray | None = None) -> None:
    from .reference import reference_sites

    tokens = np.random.default_rng(1).integers(0, 61, n_tokens)
    out = forward(hf, tokens, capture=tuple(SITES), mask=mask)
    real = np.ones(n_tokens, bool) if mask is None else mask
    assert_parity(parity(out.activations, out.logits, reference_sites(hf, tokens, mask), real))


@pytest.mark.numerical
@pytest.mark.parametrize("n_tokens", [12, 50])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_types_within_and_past_their_context(tmp_path: Path, rope: str, n_tokens: int) -> None:
    check(make(tmp_path, head_dim=6, rope_parameters=ROPES[rope]), n_tokens, np.arange(n_tokens) >= 3)


@pytest.mark.numerical
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tied"),
    [(4, 4, None, True), (4, 2, 10, False), (6, 3, 4, True), (4, 1, 8, False)],
)
def test_heads_and_ties(tmp_path: Path, heads: int, kv_heads: int, head_dim: int | None, tied: bool) -> None:
    hf = make(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied
    )
    check(hf, 20)
    check(hf, 20, np.arange(20) < 16)


@pytest.mark.numerical
@pytest.mark.parametrize(("attention", "mlp"), list(itertools.product([False, True], repeat=2)))
def test_biases(tmp_path: Path, attention: bool, mlp: bool) -> None:
    check(make(tmp_path, attention_bias=attention, mlp_bias=mlp, rms_norm_eps=0.3), 9)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(tmp_path: Path, act: str) -> None:
    check(make(tmp_path, hidden_act=act), 9)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    """One model, in torch and in JAX."""
    directory = tmp_path_factory.mktemp("pair")
    hf = make(directory, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    return hf, Llama.from_pretrained(directory)


def agree(
    pair: tuple[Any, Llama], interventions: Any, mask: np.ndarray | None = None, *, theirs: Any = None, **options: Any
) -> None:
    """Both backends give the same, under interventions whose functions may be each backend's own."""
    ours = forward(pair[0], TOKENS, interventions, capture=tuple(SITES), mask=mask, **options)
    want = forward(
        pair[1], TOKENS, interventions if theirs is None else theirs, capture=tuple(SITES), mask=mask, **options
    )
    real = np.ones(len(TOKENS), bool) if mask is None else mask
    finite = [{k: np.nan_to_num(x, neginf=-5.0) for k, x in out.activations.items()} for out in (ours, want)]
    errors = {name: row_error(name, finite[0][name], finite[1], real) for name in SITES}
    assert max(errors.values()) <= ROW, errors
    assert np.abs(np.asarray(ours.logits) - np.asarray(want.logits))[real].max() <= LOGITS
    assert ours.applied.tolist() == want.applied.tolist()
    for name, value in want.activations.items():
        assert ours.activations[name].dtype == value.dtype and isinstance(ours.activations[name], jax.Array)
    if mask is not None:
        assert not np.asarray(ours.activations["pattern"])[:, :, ~mask].any()
        assert not np.asarray(ours.activations["z"])[:, :, ~mask].any()
        assert np.array_equal(ours.mask, mask)


RNG = np.random.default_rng(3)
L, H, T = 3, 4, 13
EACH: dict[str, Any] = {
    "head": HeadAblation(1, 2),
    "head by a vector": HeadAblation(2, 3, RNG.normal(size=6)),
    "head by a run": HeadAblation(1, 2, PerLayer(RNG.normal(size=(L, H, 6)))),
    "heads": Blend("z", RNG.random((L, H)), PerLayer(RNG.normal(size=(L, H, 1, 6)))),
    "queries": QScaler(1, 2, -2.0),
    "keys": KScaler(0, 1, 3.0),
    "scores": SpectraScaler(2, 1, 4.0),
    "patch": ActivationPatch("resid_mid", 1, RNG.normal(size=(T, 24)), positions=[2, -1]),
    "patch of a head": ActivationPatch("v", 1, PerLayer(RNG.normal(size=(L, 2, T, 6))), head=1, positions=-1),
    "patch of scores": ActivationPatch("scores", 1, np.where(np.eye(T), -np.inf, 1.0).astype(np.float32), head=2),
    "patch of the final norm": ActivationPatch("final_norm", None, RNG.normal(size=(1, 24)), positions=4),
    "patch of embeddings": ActivationPatch("embed", None, RNG.normal(size=(T, 24)), positions=[0, 5]),
    "patch of a scale": ActivationPatch("mlp_scale", 2, RNG.random(T)),
    "steering": Steer(1, RNG.normal(size=24), 2.0, positions=[3, 4]),
    "steering by layers": Steer([0, 2], PerLayer(RNG.normal(size=(L, 24))), -1.0, "mlp_out"),
    "direction": DirectionAblation("resid_post", 1, RNG.normal(size=24)),
    "directions": DirectionAblation("q", range(2), PerLayer(RNG.normal(size=(L, 6))), positions=[1, 2, 3]),
    "edge": AttentionKnockout(1, 2, -1, 0),
    "edges": AttentionKnockout(1, 2, list(range(10)), list(range(10))),
    "neuron": Ablation("act", 1, 7),
    "component": Ablation("attn_out", 2),
    "edit everywhere": Edit("z", "scale", None, RNG.random((L, H, 1, 1)) > 0.5, RNG.normal(size=(L, H, T, 6))),
    "frozen patterns": Edit("pattern", "set", None, True, RNG.random((L, H, T, T))),
    "future": Edit("allowed", "set", 1, np.eye(T, k=1, dtype=bool)[None], True),
    "scale outside": Edit("final_scale", "scale", None, True, 2.0),
    "in a row": [Steer(1, np.ones(24)), HeadAblation(1, 0), Steer(1, RNG.normal(size=24), 0.5), Ablation("up", 1, 3)],
    "no match": QScaler(jnp.int32(9), 0, 2.0),
}  # fmt: skip


# Together where none hides another: each at a site or a layer of its own, so that captures and `applied` say which differs.
TOGETHER = [
    ("head", "queries", "patch of embeddings", "component", "no match"),
    ("head by a vector", "keys", "patch", "scale outside"),
    ("head by a run", "scores", "steering by layers"),
    ("heads", "patch of a head", "neuron", "patch of the final norm"),
    ("patch of scores", "steering", "patch of a scale", "edges"),
    ("edit everywhere", "direction", "edge"),
    ("frozen patterns", "directions", "in a row"),
    ("future",),
]


def test_every_intervention_is_compared_once() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(EACH)


@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_every_intervention_is_what_it_is_in_jax(pair: tuple[Any, Llama], names: tuple[str, ...]) -> None:
    items = [one for name in names for one in (EACH[name] if isinstance(EACH[name], list) else [EACH[name]])]
    for mask in (np.ones(T, bool), PADDED):
        agree(pair, items, mask)


@pytest.mark.parametrize("shift", range(3))
def test_every_site_can_be_edited(pair: tuple[Any, Llama], shift: int) -> None:
    """With each operation, over the three. Of three neighbouring sites a layer has one edited: the others show what it does."""
    ops = ("set", "add", "scale")
    edits = [
        Edit(site, ops[(i // 3 + shift) % 3], i % 3 if SITES[site].layered else None, True, 1.5)
        for i, site in enumerate(name for name in SITES if name != "allowed")
    ]
    agree(pair, edits, PADDED)


def test_a_function_of_ones_own_is_given_tensors(pair: tuple[Any, Llama]) -> None:
    import torch

    def theirs(x: Any, value: Any) -> Any:
        assert isinstance(x, torch.Tensor) and x.shape == (T, 24)
        return torch.tanh(x) * value["gain"] + value["shift"]

    def own(x: Any, value: Any) -> Any:
        return jnp.tanh(x) * value["gain"] + value["shift"]

    def edits(fn: Any) -> list[Edit]:
        value = {"gain": np.float32(2.0), "shift": np.arange(24, dtype=np.float32)[None]}
        every = {"gain": np.arange(3, dtype=np.float32), "shift": np.float32(0.1)}
        return [Edit("mlp_in", "apply", 1, True, value, fn), Edit("attn_in", "apply", None, True, every, fn)]

    agree(pair, edits(theirs), theirs=edits(own))
    agree(pair, edits(theirs), PADDED, theirs=edits(own))
    with pytest.raises(ValueError, match="returned shape .* and on a model that torch runs"):
        forward(pair[0], TOKENS, Edit("z", "apply", 0, True, 0.0, lambda x, value: x[0]))
    with pytest.raises(TypeError) as caught:
        forward(pair[0], TOKENS, Edit("z", "apply", 0, True, 0.0, lambda x, value: jnp.tanh(x)))
    assert any("is given torch tensors here" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("padded", [False, True])
def test_captures_of_some_layers_positions_and_dtypes(pair: tuple[Any, Llama], padded: bool) -> None:
    specs = (
        CaptureSpec(("z", "pattern"), layers=[2, 0], positions=[0, -1, 3]),
        CaptureSpec("resid_post", layers=(1,), dtype="bfloat16"),
        CaptureSpec("final_norm", positions=[-2]),
        CaptureSpec("allowed", layers=[1], positions=[1]),
    )
    mask = PADDED if padded else None
    ours, want = (forward(model, TOKENS, capture=specs, mask=mask).activations for model in pair)
    assert set(ours) == set(want)
    for name in want:
        assert ours[name].shape == want[name].shape and ours[name].dtype == want[name].dtype
        mine, theirs = (np.asarray(x[name], np.float32) for x in (ours, want))
        # A rounding of float32, which beside a boundary of bfloat16 is a step of that, at most 2^-7 of a value.
        step = 2**-7 if want[name].dtype == jnp.bfloat16 else 0.0
        assert (np.abs(mine - theirs) <= 1e-5 + step * np.abs(theirs)).all()


def test_logits_of_the_last_token_and_none(pair: tuple[Any, Llama]) -> None:
    mask = np.arange(T) < 10
    for where in (None, mask):
        ours, want = (forward(model, TOKENS, logits="last", mask=where).logits for model in pair)
        assert ours.shape == (61,) and np.abs(np.asarray(ours) - np.asarray(want)).max() <= LOGITS
    assert forward(pair[0], TOKENS, logits="none").logits is None


def test_layers_after_the_last_needed_do_not_run(pair: tuple[Any, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import layers as network

    ran = []
    block = network._block
    monkeypatch.setattr(
        network, "_block", lambda w, x, layout, tap, *rest: ran.append(tap.layer) or block(w, x, layout, tap, *rest)
    )
    forward(pair[0], TOKENS, HeadAblation(2, 0), capture=CaptureSpec("z", layers=[1]), logits="none")
    assert ran == [0, 1]
    ran.clear()
    forward(pair[0], TOKENS, capture="embed", logits="none")
    assert ran == []


def test_fused_attention_serves_where_nobody_looks(pair: tuple[Any, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import layers as network

    calls = []
    fused = network._fused
    monkeypatch.setattr(network, "_fused", lambda *args: calls.append(1) or fused(*args))
    forward(pair[0], TOKENS)
    assert len(calls) == 3
    forward(pair[0], TOKENS, SpectraScaler(1, 0, 2.0), capture=CaptureSpec("pattern", layers=[2]))
    assert len(calls) == 4  # at layer 0 alone


def test_what_heads_write_at_padding_is_zero_where_attention_is_fused(pair: tuple[Any, Llama]) -> None:
    ours, want = (forward(model, TOKENS, capture=("z", "attn_out"), mask=PADDED).activations for model in pair)
    assert not np.asarray(ours["z"])[:, :, ~PADDED].any()
    for name in want:
        assert np.abs(np.asarray(ours[name]) - np.asarray(want[name])).max() <= 1e-5  # a rounding of float32


def test_the_lens(pair: tuple[Any, Llama]) -> None:
    resid = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    ours, want = (lens(model, resid) for model in pair)
    assert np.abs(np.asarray(ours) - np.asarray(want)).max() <= LOGITS
    assert_leads(want, 4)
    for mine, theirs in zip(lens(pair[0], resid, top_k=4), lens(pair[1], resid, top_k=4), strict=True):
        assert mine.dtype == theirs.dtype and np.allclose(mine, theirs, atol=LOGITS)
    ours, want = (lens(model, resid[0, 0], tokens=[3, 60]) for model in pair)
    assert ours.shape == (2,) and np.abs(np.asarray(ours) - np.asarray(want)).max() <= LOGITS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_the_float32_computation_of_the_same_weights(tmp_path: Path, dtype: str) -> None:
    """In half precision two right answers differ by its rounding: ours must be no further from float32 than theirs."""
    import torch
    from transformers import LlamaForCausalLM

    hf = make(tmp_path, dtype)
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(0, 61, (6, 24))
    with torch.no_grad():
        want, theirs = (m(torch.tensor(tokens)).logits.float().numpy() for m in (exact, hf))
    assert_no_further(np.stack([np.asarray(forward(hf, row).logits) for row in tokens]), theirs, want)
    out = forward(hf, tokens[0], capture=("resid_post", "scores", "pattern"))
    jaxs = forward(Llama.from_pretrained(tmp_path), tokens[0], capture=("resid_post", "scores", "pattern"))
    assert out.logits.dtype == np.float32
    assert {name: x.dtype for name, x in out.activations.items()} == {
        name: x.dtype for name, x in jaxs.activations.items()
    }


def test_the_weights_are_read_anew_and_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    import torch

    hf = make(tmp_path)
    before = {name: (value.data_ptr(), value.clone()) for name, value in hf.state_dict().items()}
    state = (hf.config._attn_implementation, hf.dtype, hf.training, set(vars(hf)))
    first = forward(hf, TOKENS, HeadAblation(1, 0), capture=tuple(SITES)).logits
    with pytest.raises(ZeroDivisionError):
        forward(hf, TOKENS, Edit("z", "apply", 1, True, 0.0, lambda x, value: 1 / 0))
    assert state == (hf.config._attn_implementation, hf.dtype, hf.training, set(vars(hf)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    for name, value in hf.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    assert np.abs(np.asarray(forward(hf, TOKENS, HeadAblation(1, 0)).logits) - np.asarray(first)).max() > 0.1
    check(hf, 9)


def test_what_cannot_be_run_is_said(pair: tuple[Any, Llama], tmp_path: Path) -> None:
    import torch
    from transformers import LlamaModel

    hf = make(tmp_path)
    with pytest.raises(
        TypeError, match="LlamaModel, and of transformers' classes those that are known are LlamaForCausalLM"
    ):
        forward(LlamaModel(hf.config), TOKENS)
    with pytest.raises(TypeError, match="no jit, vmap or grad of JAX reaches into"):
        jax.jit(lambda ids: forward(hf, ids).logits)(jnp.asarray(TOKENS))
    with pytest.raises(TypeError, match="no jit, vmap or grad of JAX reaches into"):
        jax.grad(lambda a: forward(hf, TOKENS, QScaler(0, 0, a)).logits[0, 0])(2.0)
    with pytest.raises(ValueError, match="ids 0 to 60"):
        forward(hf, jnp.asarray([3, 61]))
    with pytest.raises(ValueError, match="but there are 4 query heads"):
        forward(hf, TOKENS, HeadAblation(0, 4))
    with pytest.raises(ValueError, match="which makes it a sweep"):
        forward(hf, TOKENS, HeadAblation(np.array([0, 1]), 0))

    class Other(torch.nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    hf.model.layers[1].mlp.up_proj.__class__ = Other
    with pytest.raises(TypeError, match="up_proj is a Other.*merge adapters"):
        forward(hf, TOKENS)
    with pytest.raises(ValueError, match="offloaded"):
        forward(make(tmp_path).to("meta"), TOKENS)
    for call in (lambda model: forward(model, TOKENS), lambda model: repr(LlamaAttentionAdapter(model))):
        with pytest.raises(ValueError, match="embed_tokens.weight is of torch.float64, .*hf.float"):
            call(make(tmp_path).double())
    shallow = make(tmp_path)
    del shallow.model.layers[1]
    with pytest.raises(ValueError, match=r"The model has no model.layers.1.*its config says"):
        forward(shallow, TOKENS)

    class Doubled(type(hf)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    doubled = make(tmp_path)
    doubled.__class__ = Doubled
    with pytest.raises(TypeError, match="a Doubled with a forward of its own"):
        forward(doubled, TOKENS)
    with pytest.raises(ValueError, match="device is 'potato', which is none of torch's; it has .*cpu here"):
        Llama.from_pretrained(tmp_path, backend="torch", device="potato")
    assert Llama.from_pretrained(tmp_path, backend="torch", device=jax.devices("cpu")[0]).device == torch.device("cpu")


@pytest.mark.numerical
@pytest.mark.real
def test_smollm2_at_every_site(directory: Path, hf: Any, adapter: Any) -> None:
    from .prompts import PROMPTS
    from .reference import reference_sites

    for text, n_padding in PROMPTS:
        ids = np.array([0] * n_padding + adapter.tokenizer.encode(text))
        mask = np.arange(len(ids)) >= n_padding
        out = forward(hf, ids, capture=tuple(SITES), mask=mask)
        assert_parity(parity(out.activations, out.logits, reference_sites(hf, ids, mask), mask))


@pytest.mark.real
def test_interventions_on_smollm2(hf: Any, adapter: Any) -> None:
    from .reference import products_of_xla, xla_sums_are_long

    ids = np.array(adapter.tokenizer.encode("When Mary and John went to the store, John gave a drink to"))
    rng, keep = np.random.default_rng(0), np.ones((30, 9))
    keep[5, 2] = keep[12, 7] = 0
    several: list[Any] = [
        HeadAblation(3, 2),
        Blend("z", keep),
        SpectraScaler(9, 5, 3.0),
        Steer(15, rng.normal(size=576), 2.0),
        DirectionAblation("resid_mid", 6, rng.normal(size=576)),
        AttentionKnockout(7, 3, -1, [0, 1]),
        QScaler(4, 1, 1.7),
        KScaler(8, 2, 0.4),
        Ablation("mlp_out", 11),
        ActivationPatch("resid_pre", 14, rng.normal(size=(1, 576)), positions=[3, -1]),
    ]
    for some in (several[::2], several[1::2]):
        ours, want = (forward(model, ids, some, capture=tuple(SITES)) for model in (hf, adapter.model))
        real = np.ones(len(ids), bool)
        errors = {name: row_error(name, ours.activations[name], want.activations, real) for name in SITES}
        # Each of two backends may be as far from the exact value as the contract allows, so twice that from each other; and XLA's
        # products alone may be further on a processor where their sums are long.
        with products_of_xla():
            rough = forward(hf, ids, some, capture=tuple(SITES))
        for name, error in errors.items():
            noise = row_error(name, rough.activations[name], ours.activations, real) if xla_sums_are_long() else 0.0
            assert error <= 2 * max(ROW, noise), (some, name, error, noise)
        assert np.abs(np.asarray(ours.logits) - np.asarray(want.logits)).max() <= 2 * LOGITS
        assert ours.applied.tolist() == want.applied.tolist() and ours.applied.all()


@pytest.mark.numerical
@pytest.mark.real
def test_both_backends_are_as_near_to_float64_as_the_contract_asks_under_an_intervention(hf: Any, adapter: Any) -> None:
    """Without layer 3's MLP, which Hugging Face's own code in float64 does by a hook; the two are 4.2e-5 apart there."""
    from .reference import in_float64, reference_sites

    ids = np.array(adapter.tokenizer.encode("When Mary and John went to the store, John gave a drink to"))
    handle = hf.model.layers[3].mlp.down_proj.register_forward_hook(lambda module, given, out: out * 0)
    try:
        with in_float64(hf) as exact:
            want = reference_sites(exact, ids)
    finally:
        handle.remove()
    for model in (hf, adapter.model):
        out = forward(model, ids, Ablation("mlp_out", 3), capture=tuple(SITES))
        assert_parity(parity(out.activations, out.logits, want, np.ones(len(ids), bool)))
