"""`oculi doctor`: what is broken on purpose is found and named, what is sound passes; devices by name, and where a model fits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import trust, utils
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter
from oculi_jax.utils import devices

from .tiny import tiny_llama


def test_errors_are_of_rows() -> None:
    want = {
        "resid_pre": np.array([[[1.0, -4.0], [0.0, 0.0]]]),
        "allowed": np.array([[[[True]]], [[[False]]]]),
        "logits": np.eye(2),
    }
    got = {
        "resid_pre": np.array([[[1.5, -4.0], [0.0, 0.25]]]),
        "allowed": np.array([[[[True]]], [[[True]]]]),
        "logits": np.eye(2),
    }
    found = trust._errors(got, want)
    assert found["resid_pre"].tolist() == [0.25] and found["logits"].tolist() == [0.0]
    assert found["allowed"].tolist() == [0.0, np.inf]
    got["logits"] = np.array([[1.0, np.nan], [0.0, 1.0]])
    assert trust._errors(got, want)["logits"].tolist() == [np.inf]


def test_without_torch_there_is_no_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "has_torch", lambda: False)
    assert trust.devices() == []
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(devices, "has_torch", lambda: False)
    assert not utils.is_mps_available()
    assert utils.get_default_device() == jax.local_devices()[0] and utils.get_device_info()["free_bytes"] > 0


def test_where_what_is_free_cannot_be_known_all_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_free_on_host", lambda: None)
    assert not utils.recommend_device_for_model(10**12).fits and utils.recommend_device_for_model(10**6).fits


def test_the_default_device_prefers_jax_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = SimpleNamespace(type="mps")
    torch_devices = SimpleNamespace(
        there=lambda: ["mps", "cpu"], find_device=lambda name: mps, memory=lambda d: (1 << 34, 10**10)
    )
    monkeypatch.setattr(devices, "_torch_devices", lambda: torch_devices)
    monkeypatch.setattr(devices, "has_torch", lambda: True)
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    assert utils.is_mps_available() and utils.get_default_device() is mps
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0")
    info = utils.get_device_info()
    assert (info["platform"], info["memory_bytes"], info["mps_high_watermark_ratio"]) == ("mps", 1 << 34, "0.0")

    # 80 % of 10 GB: 2e9 parameters fit in float32, 4e9 in float16 alone.
    small, large = (utils.recommend_device_for_model(n) for n in (2 * 10**9, 4 * 10**9))
    assert (small.backend, small.device, small.dtype, small.needed_bytes, small.fits) == (
        "torch",
        mps,
        "float32",
        8 * 10**9,
        True,
    )
    assert (large.device, large.dtype, large.needed_bytes) == (mps, "float16", 8 * 10**9)
    assert "no room for float32 on mps (16.0 GB of weights, 10.0 GB free)" in str(large)
    monkeypatch.setattr(devices, "_free_on_host", lambda: 20 * 10**9)
    on_cpu = utils.recommend_device_for_model(4 * 10**9, dtype="float32")
    assert (on_cpu.backend, on_cpu.dtype, on_cpu.fits) == ("jax", "float32", True)
    nowhere = utils.recommend_device_for_model(10**12)
    assert not nowhere.fits and nowhere.reason.startswith("Nowhere on this machine: float32 on mps (4000.0 GB")

    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(devices.jax, "local_devices", lambda: [gpu])
    assert utils.get_default_device() is gpu


def test_a_model_to_recommend_for_is_counted_or_refused() -> None:
    model = tiny_llama()
    n = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert model.config.n_params == model.n_params == n
    for one in (model, model.config, n, SimpleNamespace(num_parameters=lambda: n)):
        assert utils.recommend_device_for_model(one, "bfloat16").needed_bytes == 2 * n
    for wrong, error, said in (("3B", TypeError, "is a str"), (0, ValueError, "positive"), (True, TypeError, "bool")):
        with pytest.raises(error, match=said):
            utils.recommend_device_for_model(wrong)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        utils.recommend_device_for_model(n, "int8")


@pytest.mark.torch
def test_what_is_sound_passes() -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        found = trust.examine(dtype=dtype)
        assert (
            found.verdict == "good"
            and found.sentence.startswith(f"cpu (torch) in {dtype}")
            and "trusted" in found.sentence
        )
        assert set(found.errors) == set(found.excess) and "logits" in found.errors


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_broken_is_named_where_it_begins(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from oculi_jax.backends.torch import layers as network

    own, calls = network.F.silu, []

    def broken(x: Any) -> Any:
        calls.append(x)
        return own(x) * (1.5 if len(calls) % 4 == 3 else 1)

    monkeypatch.setitem(network.ACTIVATIONS, "silu", broken)
    found = trust.examine(dtype=dtype)
    assert len(calls) == 8 and found.verdict == "wrong" and "first at gate_act of layer 2" in found.sentence
    assert found.errors["gate_act"][2] == pytest.approx(0.5, abs=0.01)
    assert max(found.excess["up"][:3]) <= 1

    monkeypatch.setattr(network, "_rotate", lambda x, layout: x * float("nan"))
    assert "first at q of layer 0, with values that are not finite" in trust.examine(dtype=dtype).sentence


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_single_row_that_is_wrong_is_found_in_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    from oculi_jax.backends.torch import layers as network

    own, calls = network._rotate, []

    def broken(x: Any, layout: Any) -> Any:
        out = own(x, layout).clone()
        calls.append(out.shape)
        if len(calls) == 3:  # q and k of each layer: q of layer 1, one head at one token
            out[0, 2, 5] *= 1.4
        return out

    monkeypatch.setattr(network, "_rotate", broken)
    found = trust.examine(dtype=dtype)
    assert (
        len(calls) == 16
        and found.verdict == "wrong"
        and "first at q of layer 1, with an error of 4e-01" in found.sentence
    )


@pytest.mark.torch
def test_less_precision_is_told_from_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import layers as network

    own = network._rotate
    monkeypatch.setattr(network, "_rotate", lambda x, layout: own(x, layout) * 1.0001)
    found = trust.examine()
    assert found.verdict == "rough" and "less precise arithmetic" in found.sentence

    def missing(x: Any, layout: Any) -> Any:
        raise NotImplementedError("The operator 'aten::rope' is not currently implemented for the MPS device.")

    monkeypatch.setattr(network, "_rotate", missing)
    found = trust.examine()
    assert found.verdict == "failed" and "'aten::rope' is not currently implemented" in found.sentence


@pytest.mark.torch
def test_what_overflows_is_not_called_good(tmp_path: Any) -> None:
    model = Llama.from_pretrained(trust.embedded_directory())
    model.layers.mlp.down.weight[...] = model.layers.mlp.down.weight[...].at[2].multiply(2e4)
    model.save_pretrained(tmp_path)
    found = trust.examine(tmp_path, dtype="float16")
    assert (
        found.verdict == "wrong"
        and "overflows in float16, on the CPU too, first at mlp_out of layer 2" in found.sentence
    )
    assert trust.examine(tmp_path).verdict == "good"


@pytest.mark.torch
def test_fused_attention_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import layers as network

    monkeypatch.setattr(network, "_fused", lambda q, k, v, layout, layer, scale: q * 0)
    found = trust.examine()
    assert found.verdict == "wrong" and f"first at {trust.ALONE}" in found.sentence and found.errors["logits"][0] < 1e-4


@pytest.mark.torch
def test_what_cannot_be_loaded_there_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import TorchDecoder

    def refuse(*_: Any) -> Any:
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(TorchDecoder, "from_arrays", refuse)
    found = trust.examine()
    assert found.verdict == "failed" and "BFloat16 is not supported" in found.sentence
    monkeypatch.setattr("oculi_jax.backends.torch.devices.there", lambda: ["cpu"])  # wherever this runs
    with pytest.raises(ValueError, match="torch has cpu here"):
        trust.examine(device="mps")


@pytest.mark.torch
def test_the_adapter_warns_once_on_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import TorchDecoder
    from oculi_jax.backends.torch import layers as network

    model = Llama.from_pretrained(trust.embedded_directory(), backend="torch", device="cpu")
    examine = trust.examine
    asked = []

    def on_cpu(source: Any, backend: str, device: str) -> trust.Finding:
        asked.append(device)
        return examine(source, backend, "cpu")

    monkeypatch.setattr(trust, "examine", on_cpu)
    LlamaAttentionAdapter(model)
    assert not asked
    with monkeypatch.context() as patch:
        patch.setattr(TorchDecoder, "device", SimpleNamespace(type="mps"))
        own = network._rotate
        patch.setattr(network, "_rotate", lambda x, layout: -own(x, layout) * 2)
        trust._short.cache_clear()
        with pytest.warns(RuntimeWarning, match=r"is WRONG, first at q of layer 0.*oculi doctor"):
            LlamaAttentionAdapter(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LlamaAttentionAdapter(model)
    assert asked == ["mps"]
    trust._short.cache_clear()


@pytest.mark.torch
def test_the_command(oculi_here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from oculi_jax.backends.torch import devices as of_torch
    from oculi_jax.backends.torch import layers as network

    monkeypatch.setattr(of_torch, "there", lambda: ["cpu"])  # wherever this runs
    code, out, err = oculi_here("doctor", "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0, err
    assert "cpu (torch) in float32 agrees with the CPU to rounding at every site" in out
    assert (
        "cpu (torch) in bfloat16 is as near to float32" in out
        and "resid_post" in out
        and "jax" in out
        and "✗" not in out.partition("explains:\n")[2]
    )
    code, _, err = oculi_here("doctor", "--device", "mps")
    assert code == 2 and "device is 'mps', and to compare with JAX's CPU there is cpu here" in err
    own = network._rotate
    monkeypatch.setattr(network, "_rotate", lambda x, layout: -own(x, layout) * 2)
    code, out, _ = oculi_here("doctor")
    assert code == 1 and "is WRONG, first at q of layer 0" in out and "✗" in out.partition("explains:\n")[2]
    monkeypatch.setattr(trust, "has_torch", lambda: False)
    code, out, _ = oculi_here("doctor")
    assert code == 0 and "there is nothing to compare" in out
