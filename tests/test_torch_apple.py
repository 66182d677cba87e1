"""Everything the torch backend does, under a mode that refuses what an Apple GPU lacks or gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import CaptureSpec, LogitConfig, forward, generate, lens, sweep
from oculi_jax.intervention import HeadAblation, InterventionContext, Steer
from oculi_jax.metrics import log_probability, logit_difference
from oculi_jax.models.decoder.activations import ACTIVATIONS
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter

from .test_parity_torch import ROPES, make
from .test_torch_forward import EACH, PADDED, TOKENS, T
from .test_torch_sweep import FAMILIES, MASK
from .test_torch_sweep import TOKENS as PROMPTS
from .tiny import SITES

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(
        tmp_path_factory.mktemp("apple"), num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        eos_token_id=None,
    )  # fmt: skip


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The mode, and the path that is taken on `mps`."""
    from oculi_jax.backends.torch import layers as network

    from .apple import Apple

    monkeypatch.setattr(network, "may_fuse", lambda device: False)
    with Apple() as mode:
        yield mode


def test_the_mode_refuses_what_it_lists() -> None:
    import torch

    from .apple import Apple

    whole, square = torch.arange(4), torch.ones(3, 2)
    wrong = {
        "no float64": lambda: square.double(),
        "cumsum of int64": lambda: whole.cumsum(0),
        "argmax of int64": lambda: whole.argmax(),
        "sum of int64": lambda: whole.sum(),
        "index_copy": lambda: square.index_copy(0, whole[:1], square[:1]),
        "where, strided": lambda: torch.where((square > 0).T, 1.0, 0.0),
        "masked_fill_, strided": lambda: torch.ones(3, 2).T.masked_fill_(torch.ones(2, 3, dtype=torch.bool), 0.0),
        "index_put_": lambda: square.clone().__setitem__(square > 1, 0.0),
        "softplus, strided": lambda: torch.nn.functional.softplus(square.T),
        "163597": lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4)] * 3),
        "more than four axes": lambda: torch.ones(1, 1, 1, 1, 3).topk(1),
    }
    for message, call in wrong.items():
        with pytest.raises(AssertionError, match=message), Apple():
            call()
    with Apple():
        whole.to(torch.int32).sum(dtype=torch.int32)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_interventions(hf: Any, apple: Any, name: str, padded: bool) -> None:
    forward(hf, TOKENS, EACH[name], capture=tuple(SITES), mask=PADDED if padded else None)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(tmp_path: Path, apple: Any, act: str) -> None:
    make(tmp_path, hidden_act=act)
    forward(Llama.from_pretrained(tmp_path, backend="torch", device="cpu"), TOKENS, logits="last")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_types_and_dtypes(tmp_path: Path, apple: Any, rope: str, dtype: str) -> None:
    make(tmp_path, dtype, head_dim=6, rope_parameters=ROPES[rope])
    model = Llama.from_pretrained(tmp_path, backend="torch", device="cpu")
    forward(
        model, TOKENS, HeadAblation(0, 1), capture=CaptureSpec("pattern", positions=[-1], dtype="float32"), mask=PADDED
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_sweeps(hf: Any, apple: Any, name: str) -> None:
    sweep(hf, PROMPTS, FAMILIES[name], logit_difference(np.array([3, 4, 5]), 7), mask=MASK)
    sweep(hf, PROMPTS[0], FAMILIES[name], log_probability(3))


def test_the_adapter_generation_and_the_lens(hf: Any, apple: Any) -> None:
    import torch

    adapter = LlamaAttentionAdapter(hf)
    rows = [TOKENS[:9].tolist(), TOKENS[:5].tolist()]
    adapter.capture_full(rows)
    adapter.capture_full(TOKENS, logits=LogitConfig(positions=[-1], tokens=[3]))
    adapter.generate(
        rows, 4, Steer(1, np.ones(24), positions=[2, 8]), temperature=1.0, key=jax.random.key(0), top_p=0.8
    )
    generate(hf, TOKENS, 4, HeadAblation(1, np.arange(3)), capture=("pattern", "final_norm"), mask=np.arange(T) > 1)
    lens(hf, np.ones((2, 3, 24), np.float32), top_k=3)
    lens(hf, np.ones((2, 24), np.float32), tokens=[1, 2])
    with InterventionContext(adapter, Steer(1, np.ones(24))):
        hf(torch.tensor(TOKENS)[None])
