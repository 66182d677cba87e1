"""Layers whose attention differs, as the next families have it: windows and rotations by layer, beside Hugging Face's own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax import Site, forward, generate, plan, sweep
from oculi_jax.intervention import Edit, HeadAblation, Intervention, Layer, Steer, field, pytree
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder.checkpoint import named_parameters
from oculi_jax.models.decoder.family import LayerKind
from oculi_jax.models.llama import Llama, LlamaConfig

from .margins import assert_leads
from .test_parity_torch import make
from .tiny import SITES, prompt, tiny_llama
from .tolerances import LOGITS, ROUTES

pytestmark = pytest.mark.quick

T, WINDOW, THETA = 11, 4, 100.0


def mixed(model: Llama) -> Llama:
    """Odd layers see a window, and turn by another base."""
    rope = model.config.rope
    local = LayerKind(dataclasses.replace(rope, theta=THETA), WINDOW)
    kinds = tuple(local if layer % 2 else LayerKind(rope) for layer in range(model.config.num_hidden_layers))
    return Llama(dataclasses.replace(model.config, layer_kinds=kinds), named_parameters(model))


def their_logits(hf: Any, ids: np.ndarray) -> np.ndarray:
    """Hugging Face's eager Llama, whose odd layers are given another mask and other angles."""
    import torch

    n, dim = len(ids), hf.config.head_dim
    places = np.arange(n)
    seen = (places[None] <= places[:, None]) & (places[None] > places[:, None] - WINDOW)
    mask = torch.tensor(np.where(seen, 0.0, np.finfo(np.float32).min).astype(np.float32))[None, None]
    angles = places[:, None] / THETA ** (np.arange(0, dim, 2) / dim)[None]
    turn = tuple(torch.tensor(np.tile(f(angles), 2)[None].astype(np.float32)) for f in (np.cos, np.sin))

    def local(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask, "position_embeddings": turn}

    handles = [
        layer.self_attn.register_forward_pre_hook(local, with_kwargs=True)
        for i, layer in enumerate(hf.model.layers)
        if i % 2
    ]
    hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return hf(torch.tensor(ids)[None]).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama, Any]:
    """Hugging Face's module, and the same weights on both backends with layers of two kinds."""
    from oculi_jax.backends.torch import TorchDecoder

    directory = tmp_path_factory.mktemp("mixed")
    hf = make(directory, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    model = mixed(Llama.from_pretrained(directory))
    torch_model = TorchDecoder.from_pretrained(directory, device="cpu")
    torch_model.config = model.config
    return hf, model, torch_model


@pytest.mark.torch
@pytest.mark.numerical
@pytest.mark.parametrize("n_tokens", [3, T])
def test_windows_and_rotations_by_layer(pair: tuple[Any, Llama, Any], n_tokens: int) -> None:
    hf, *models = pair
    ids = prompt(n_tokens)
    want = their_logits(hf, ids)
    plain = np.asarray(forward(hf, ids).logits)
    assert np.abs(want - plain).max() > 100 * LOGITS  # the kinds matter
    for model in models:
        out = forward(model, ids, capture="allowed")
        assert np.abs(np.asarray(out.logits) - want).max() <= LOGITS
        sees = np.asarray(out["allowed"]).sum(-1)[:, 0]  # [L, T]
        assert (sees[1] == np.minimum(np.arange(n_tokens) + 1, WINDOW)).all()
        assert (sees[0] == np.arange(n_tokens) + 1).all()


@pytest.mark.torch
def test_padding_sweeps_and_decoding_know_the_kinds(pair: tuple[Any, Llama, Any]) -> None:
    ids, metric = prompt(T), logit_difference(3, 5)
    padded, mask = np.pad(ids, (2, 3), constant_values=60), np.pad(np.ones(T, bool), (2, 3))
    for model in pair[1:]:
        plain = np.asarray(forward(model, ids).logits)
        near = np.asarray(forward(model, padded, mask=mask).logits)[2:-3]
        assert np.abs(near - plain).max() <= LOGITS
        late = Steer(np.arange(3), np.ones(24), positions=T - 2)
        assert any(call.n_rows < T for call in plan(model, ids, late, metric, batch_size=1).calls)
        swept = sweep(model, ids, late, metric, batch_size=1)
        each = [metric(forward(model, ids, Steer(i, np.ones(24), positions=T - 2))) for i in range(3)]
        np.testing.assert_allclose(swept, each, rtol=ROUTES, atol=ROUTES)
        new = np.asarray(generate(model, ids, 6, stop_tokens=()))
        whole = np.asarray(forward(model, np.concatenate([ids, new])).logits)[T - 1 : -1]
        assert_leads(whole)
        np.testing.assert_array_equal(new, whole.argmax(-1))


class Without(LlamaConfig):
    """Of a family whose MLP has no gate."""

    @property
    def sites(self) -> Mapping[str, Site]:
        return {name: site for name, site in SITES.items() if name not in ("gate", "gate_act")}


@pytree
class Gate:
    """An intervention of one's own, at a site that not every model has."""

    layer: Any = field(Layer())

    def edits(self, sizes: Mapping[str, int]) -> tuple[Edit, ...]:
        return (Edit("gate", "scale", self.layer, True, 0.0),)


def test_a_site_that_the_model_lacks_is_a_sentence() -> None:
    whole = tiny_llama()
    model = Llama(Without(**vars(whole.config)), named_parameters(whole))
    assert isinstance(Gate(0), Intervention)
    for call in (
        lambda: forward(model, prompt(), capture="gate"),
        lambda: forward(model, prompt(), Edit("gate", "set", 0)),
        lambda: forward(model, prompt(), Gate(0)),
        lambda: sweep(model, prompt(), Gate(np.arange(3)), logit_difference(1, 2)),
    ):
        with pytest.raises(ValueError, match=r"This model has no site 'gate'; it has embed, resid_pre"):
            call()
    forward(whole, prompt(), Gate(0))


@pytest.mark.torch
def test_a_site_that_the_model_lacks_is_a_sentence_on_torch(tmp_path: Path) -> None:
    from oculi_jax.backends.torch import TorchDecoder

    tiny_llama().save_pretrained(tmp_path)
    model = TorchDecoder.from_pretrained(tmp_path, device="cpu")
    forward(model, prompt(), Gate(0))
    model.config = Without(**vars(model.config))
    for call in (lambda: forward(model, prompt(), capture="gate"), lambda: forward(model, prompt(), Gate(0))):
        with pytest.raises(ValueError, match=r"This model has no site 'gate'; it has embed, resid_pre"):
            call()


def test_a_plan_says_why_all_tokens_run() -> None:
    model, late = tiny_llama(), np.arange(T) >= T - 2
    own = Edit("mlp_out", "apply", np.arange(3), late[:, None], 2.0, lambda x, value: x * value)
    said = repr(plan(model, prompt(), own, logit_difference(1, 2), batch_size=1))
    assert "all tokens run: the function of an edit at 'mlp_out' is not marked" in said and "site_shaped" in said
    ahead = [Edit("allowed", "set", 1, np.ones((1, T, T), bool), True), HeadAblation(np.arange(3), 0)]
    assert "an edit at 'allowed' may let a token see later ones" in repr(
        plan(model, prompt(), ahead, logit_difference(1, 2))
    )
    assert "all tokens run" not in repr(plan(model, prompt(), HeadAblation.grid(model.config), logit_difference(1, 2)))
