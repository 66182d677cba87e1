"""`generation_config.json`, and token ids of every config file: against Hugging Face's own `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oculi_jax.models.llama import Llama, LlamaAttentionAdapter, LlamaConfig

pytestmark = pytest.mark.torch
IDS = [1, 5, 9, 13, 22, 40]
SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def hf() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def continued(hf: Any, n: int = 6, **options: Any) -> list[int]:
    import torch

    options = {"pad_token_id": 0, **options}
    return hf.generate(torch.tensor([IDS]), max_new_tokens=n, do_sample=False, **options)[0, len(IDS) :].tolist()


def checkpoint(hf: Any, directory: Path, **generation: Any) -> Path:
    hf.save_pretrained(directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return directory


@pytest.mark.parametrize("several", [True, False])
def test_texts_end_where_hugging_faces_do(hf, tmp_path: Path, several: bool) -> None:
    """A list or a number; of a checkpoint in both backends, of a wrapped model, and of what is saved and opened again."""
    from transformers import LlamaForCausalLM

    free = continued(hf, eos_token_id=63)
    stop = [2, free[1]] if several else free[1]
    source = checkpoint(hf, tmp_path / "a", eos_token_id=stop)
    theirs = LlamaForCausalLM.from_pretrained(source).eval()
    want = continued(theirs)
    assert len(want) == 2 < len(free)
    model = Llama.from_pretrained(source)
    model.save_pretrained(tmp_path / "b")
    assert continued(LlamaForCausalLM.from_pretrained(tmp_path / "b").eval()) == want
    runs = {
        "jax": model,
        "torch": Llama.from_pretrained(source, backend="torch"),
        "wrapped": LlamaAttentionAdapter(theirs),
        "again": Llama.from_pretrained(tmp_path / "b"),
    }
    for name, run in runs.items():
        found = np.asarray(run.generate(IDS, 6))[len(IDS) :].tolist()
        assert found[:2] == want and len(set(found[2:])) == 1, name  # what follows a stop is padding


def test_its_pad_id_is_what_follows_a_stop(hf, tmp_path: Path) -> None:
    free = continued(hf, eos_token_id=63)
    source = checkpoint(hf, tmp_path, eos_token_id=free[1], pad_token_id=7)
    assert np.asarray(Llama.from_pretrained(source).generate(IDS, 6))[len(IDS) :].tolist() == [*free[:2], 7, 7, 7, 7]


def test_what_generate_does_not_do_is_said(hf, tmp_path: Path) -> None:
    source = checkpoint(hf, tmp_path, repetition_penalty=1.3, temperature=0.6, do_sample=True)
    with pytest.warns(UserWarning, match=r"asks for repetition_penalty = 1.3, which generate does not do"):
        Llama.from_pretrained(source)


@pytest.mark.parametrize("value", ["2", [[]], 1.5, True, float("nan"), [2, "x"], -7])
@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id", "bos_token_id"])
def test_ids_that_are_none_are_refused_where_they_are_read(hf, tmp_path: Path, name: str, value: Any) -> None:
    source = checkpoint(hf, tmp_path, **{name: value})
    with pytest.raises(ValueError, match=rf"generation_config.json: .*{name} is "):
        Llama.from_pretrained(source)
    with pytest.raises(ValueError, match=f"{name} is "):
        LlamaConfig.from_dict({**SMALL, name: value, "initializer_range": 0.3})


def test_a_file_that_is_no_object_is_named(hf, tmp_path: Path) -> None:
    source = checkpoint(hf, tmp_path)
    (source / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config.json holds a list"):
        Llama.from_pretrained(source)
