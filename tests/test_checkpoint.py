"""Checkpoints: what comes back is what was stored; what is wrong is said in one sentence, and nothing is half-written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama

from .tiny import tiny_llama

pytestmark = pytest.mark.quick

WEIGHTS = Path(__file__).parents[1] / "weights"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    shutil.copytree(WEIGHTS / "tiny-gqa", tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, edit: Callable[[dict], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def change_json(path: Path, edit: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def same(a: Llama, b: Llama) -> bool:
    return all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize(
    "kind", [{}, dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, hidden_act="prelu")]
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, dtype, kind: dict) -> None:
    model = tiny_llama(dtype=dtype, **kind)
    model.save_pretrained(tmp_path)
    back = Llama.from_pretrained(tmp_path)
    assert same(model, back) and back.dtype == jnp.dtype(dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_shards_hold_what_the_file_says(sharded: Path) -> None:
    model = Llama.from_pretrained(sharded)
    tensors = {k: v for path in sharded.glob("model-*.safetensors") for k, v in load_file(path).items()}
    k = model.layers.attn.k.weight[...]
    for layer in range(3):
        stored = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(k[layer], stored.reshape(2, 10, 36))
    np.testing.assert_array_equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert len(tensors) == sum(len(row.tensors()) for row in parameter_table(model.config))


def test_dtype_and_device_are_chosen_by_name() -> None:
    model = Llama.from_pretrained(WEIGHTS / "tiny-gqa", dtype="bfloat16", device="cpu")
    exact = Llama.from_pretrained(WEIGHTS / "tiny-gqa")
    assert model.dtype == jnp.bfloat16 and model.device == jax.devices()[0]
    np.testing.assert_array_equal(model.embed[...], exact.embed[...].astype(jnp.bfloat16))
    assert Llama.from_pretrained(WEIGHTS / "tiny-gqa", device=jax.devices()[3]).device == jax.devices()[3]
    for wrong in ("float8", "int8", "bf8", np.int32):
        with pytest.raises(ValueError, match="'bfloat16', 'float16'"):
            Llama.from_pretrained(WEIGHTS / "tiny-gqa", dtype=wrong)
    with pytest.raises(ValueError, match="JAX has cpu here"):
        Llama.from_pretrained(WEIGHTS / "tiny-gqa", device="mps")


@pytest.mark.torch
def test_dtypes_of_torch_are_taken() -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = Llama.from_pretrained(WEIGHTS / "tiny-gqa", dtype=dtype)
        assert model.dtype.name == str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=r"dtype is torch.int8; it can be 'auto', 'float32'"):
        Llama.from_pretrained(WEIGHTS / "tiny-gqa", dtype=torch.int8)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama()
    assert tied.lm_head.weight is tied.embed[...] or np.shares_memory(tied.lm_head.weight, tied.embed[...])
    assert tied.lm_head.weight.shape == untied.lm_head.weight.shape == (61, 24)
    assert not np.array_equal(untied.lm_head.weight, untied.embed[...])
    assert "61" in repr(tied) and "float32" in str(tied)


def test_known_extras_are_passed_over_and_a_tied_copy_must_be_one(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    change(tmp_path, lambda t: t.update(extra, **{"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert same(model, Llama.from_pretrained(tmp_path))
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="differs from the embedding"):
        Llama.from_pretrained(tmp_path)


def test_one_error_lists_every_tensor_that_is_wrong(single: Path) -> None:
    def spoil(t: dict) -> None:
        t["model.layers.1.mlp.up_proj.wieght"] = t.pop("model.layers.1.mlp.up_proj.weight")
        del t["model.norm.weight"]
        t["model.layers.2.mlp.down_proj.weight"] = t["model.layers.2.mlp.down_proj.weight"].T.copy()
        t["model.layers.0.mlp.gate_proj.weight"] = t["model.layers.0.mlp.gate_proj.weight"].astype(np.int8)

    change(single, spoil)
    with pytest.raises(ValueError) as caught:
        Llama.from_pretrained(single)
    for part in (
        "missing: model.layers.1.mlp.up_proj.weight [40, 24]", "missing: model.norm.weight [24]",
        "shape: model.layers.2.mlp.down_proj.weight is [40, 24] in model.safetensors, config.json makes it [24, 40]",
        "dtype: model.layers.0.mlp.gate_proj.weight is I8", "unexpected: model.layers.1.mlp.up_proj.wieght",
    ):  # fmt: skip
        assert part in str(caught.value)


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def terabytes(path: Path) -> None:
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    )
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())


def long_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 45) + b"{}")


BROKEN = {
    "truncated": (truncate, ValueError, "model.safetensors is not a whole safetensors file"),
    "terabytes": (terabytes, ValueError, "model.safetensors is not a whole safetensors file"),
    "long header": (long_header, ValueError, "model.safetensors is not a whole safetensors file"),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), ValueError, "not a whole safetensors file"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
    "no config": (lambda p: (p / "config.json").unlink(), FileNotFoundError, "no config.json in"),
    "bare": (
        lambda p: change(p, lambda t: [t.update({k.removeprefix("model."): t.pop(k)}) for k in list(t)]),
        ValueError, "lack the 'model.' prefix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(single: Path, name: str) -> None:
    spoil, kind, message = BROKEN[name]
    spoil(single)
    with pytest.raises(kind, match=message):
        Llama.from_pretrained(single)


SPOILED_INDEX = {
    "missing shard": (
        lambda p: (p / "model-00002-of-00005.safetensors").unlink(), FileNotFoundError, "model-00002-of-00005.safetensors"
    ),
    "outside": (
        lambda p: change_json(p / "model.safetensors.index.json", lambda v: v["weight_map"].update({"lm_head.weight": "../x.safetensors"})),
        ValueError, "'lm_head.weight' in '../x.safetensors'; shards must be plain file names",
    ),
    "absolute": (
        lambda p: change_json(p / "model.safetensors.index.json", lambda v: v["weight_map"].update({"lm_head.weight": "/etc/passwd"})),
        ValueError, "plain file names",
    ),
    "no map": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), ValueError, "not a shard index"),
    "not text": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": 3}'), ValueError, "not a shard index"),
    "wrong place": (
        lambda p: change_json(p / "model.safetensors.index.json", lambda v: v["weight_map"].update({"nothing": "model-00001-of-00005.safetensors"})),
        ValueError, "places nothing in model-00001",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED_INDEX)
def test_spoiled_shard_indexes_are_named(sharded: Path, name: str) -> None:
    spoil, kind, message = SPOILED_INDEX[name]
    spoil(sharded)
    with pytest.raises(kind, match=message):
        Llama.from_pretrained(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    file = sharded / "model-00002-of-00005.safetensors"
    save_file({**load_file(file), "model.embed_tokens.weight": np.zeros((97, 36), np.float32)}, file)
    with pytest.raises(ValueError, match="embed_tokens.weight is in two files"):
        Llama.from_pretrained(sharded)


def test_what_float16_cannot_hold_is_refused(single: Path) -> None:
    change(single, lambda t: t.update({"model.norm.weight": np.full(24, 1e6, np.float32)}))
    with pytest.raises(ValueError, match="model.norm.weight in model.safetensors holds values beyond float16"):
        Llama.from_pretrained(single, dtype="float16")


def test_a_config_of_many_more_layers_is_one_line(single: Path) -> None:
    change_json(single / "config.json", lambda v: v.update(num_hidden_layers=100000))
    with pytest.raises(ValueError, match="says 100000 layers, and the weights hold 3") as caught:
        Llama.from_pretrained(single)
    assert len(str(caught.value)) < 500


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        Llama.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match="Could not find 'nobody/nothing' in the local cache"):
        Llama.from_pretrained("nobody/nothing", local_files_only=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        Llama.from_pretrained(tmp_path / "file")


def test_a_save_that_fails_leaves_what_was_there(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in single.iterdir()}

    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise SafetensorError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_llama(seed=1, attention_bias=True).save_pretrained(single)
    assert {path.name: path.read_bytes() for path in single.iterdir()} == before


def test_saving_into_a_sharded_checkpoint_is_refused(sharded: Path) -> None:
    with pytest.raises(ValueError, match="sharded checkpoint"):
        tiny_llama().save_pretrained(sharded)
