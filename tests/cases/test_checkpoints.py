"""Checkpoints that others wrote, and saves that are cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, load, save
from oculi_jax.embedded import embedded_directory
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter, LlamaConfig
from oculi_jax.utils import files

from ..tiny import prompt, tiny_llama
from ..tolerances import ROUNDING
from .test_generation_config import SMALL

CONFIG = {name: value for name, value in SMALL.items() if name != "initializer_range"}


@pytest.mark.torch
def test_a_tied_model_under_the_heads_name_alone(tmp_path: Path) -> None:
    """safetensors' `save_model` keeps one name of a shared tensor, and it is this one."""
    import torch
    from safetensors.torch import load_file, save_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(LlamaConfig(**{**SMALL, "tie_word_embeddings": True})).eval()
    hf.config.save_pretrained(tmp_path)
    save_model(hf, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        want = hf(torch.tensor([[1, 5, 9, 13]])).logits[0].numpy()
    for backend in ("jax", "torch"):
        found = forward(Llama.from_pretrained(tmp_path, backend=backend), [1, 5, 9, 13]).logits
        np.testing.assert_allclose(found, want, atol=ROUNDING * np.abs(want).max())


def test_dtypes_by_their_short_names(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    for short, dtype in {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}.items():
        assert Llama.from_pretrained(tmp_path, dtype=short).dtype == dtype
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": None, "torch_dtype": "auto"}))
    assert Llama.from_pretrained(tmp_path).dtype == jnp.float32  # the file's


def test_another_family_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"^this is a model of type 'bert', and models of type 'llama', 'qwen2', .* load"
    ) as error:
        LlamaConfig.from_dict({**CONFIG, "model_type": "bert", "type_vocab_size": 2})
    assert "ignore_fields" not in str(error.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 1e29},
        {"rope_type": "linear", "factor": 1e-20},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e20},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1e25] * 4},
    ],
)
def test_rotary_numbers_that_overflow_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="from 1e-6 to 1e6"):
        LlamaConfig.from_dict({**CONFIG, "rope_scaling": rope})


SAVES = """
import os, sys
import jax, numpy as np
from oculi_jax import save
from oculi_jax.models.llama import Llama, LlamaAttentionAdapter, LlamaConfig
models = [jax.tree.map(np.asarray, Llama.from_pretrained(name)) for name in sys.argv[1:3]]  # a child has no JAX of its own
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        number = int(line)
        while True:
            models[number % 2].save_pretrained(sys.argv[3] + "/model")
            save({"x": np.full((64, 64), float(number))}, sys.argv[3] + "/x.safetensors")
            number += 1
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_saves_that_are_killed_leave_a_whole_model_or_say_so(tmp_path: Path) -> None:
    """At fifty random moments, by −9 and SIGTERM in turn: processes that save two models of different shapes over one another, and a capture."""
    for name, model in {"one": tiny_llama(), "two": tiny_llama(1, num_hidden_layers=5)}.items():
        model.save_pretrained(tmp_path / name)
    out, rng, seen, left = tmp_path / "out", np.random.default_rng(0), [], 0
    out.mkdir()
    command = [sys.executable, "-c", SAVES, *(str(tmp_path / name) for name in ("one", "two", "out"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in range(50):
            end = (signal.SIGKILL, signal.SIGTERM)[number % 2]
            print(number // 2, file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            time.sleep(float(rng.uniform(0.0, 0.06)))
            os.kill(child, end)
            assert int(process.stdout.readline()) == -end
            try:
                seen.append(Llama.from_pretrained(out / "model").config.num_hidden_layers)
            except FileNotFoundError:
                seen.append(None)  # not one save is done yet
            except ValueError as error:
                assert "was saving to it was cut off" in str(error)
                seen.append("cut off")
            if (out / "x.safetensors").exists():
                assert len(np.unique(load(out / "x.safetensors")["x"])) == 1
            # The next save removes what is left, but what says that a model was cut off until that is no longer so: of several
            # that were killed in a row before their first file was there, each leaves its own.
            before, left = left, len(list(out.glob("model/.*")))
            assert len(list(out.glob(".*"))) <= 1 and left <= min(before + 1, 8)
        process.stdin.close()
    assert {3, 5} <= set(seen) <= {3, 5, None, "cut off"}
    model = tiny_llama()
    model.save_pretrained(out / "model")
    save({"x": np.ones(3)}, out / "x.safetensors")
    kept = sorted(path.name for path in (out / "model").iterdir())
    assert kept == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == ["model", "x.safetensors"]
    assert Llama.from_pretrained(out / "model").config == Llama.from_pretrained(tmp_path / "one").config


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), KeyboardInterrupt()], ids=["denied", "stopped"]
)
def test_a_save_that_fails_between_two_renames_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, late: bool
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    own, calls = os.replace, []

    def replace(*names: Any) -> None:
        calls.append(names)
        if len(calls) == 2 and late:
            raise error
        own(*names)
        if len(calls) == 1 and not late:  # a signal is handled when a call has returned
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(type(error)):
            tiny_llama(1, num_hidden_layers=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither the old checkpoint nor the new one"):
        Llama.from_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)  # by the same process, which is alive
    assert Llama.from_pretrained(tmp_path).config.num_hidden_layers == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("who", "stays"), [("another machine's", False), ("a living process's", True)])
def test_what_others_left_goes_with_a_whole_save(tmp_path: Path, who: str, stays: bool) -> None:
    host = files._HOST if stays else "00000000"
    folder = tmp_path / f".model.safetensors.{host}.{os.getppid()}.abcdefgh.commit"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    if not stays:
        os.utime(folder, (time.time() - 100,) * 2)  # renaming takes no minute
    tiny_llama().save_pretrained(tmp_path)
    assert folder.exists() == stays
    if not stays:
        assert Llama.from_pretrained(tmp_path).config.num_hidden_layers == 3


def test_a_checkpoint_that_is_saved_to_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    own = LlamaConfig.from_pretrained

    def slow(*arguments: Any, **options: Any) -> LlamaConfig:
        found = own(*arguments, **options)
        tiny_llama(1).save_pretrained(tmp_path)
        return found

    monkeypatch.setattr(LlamaConfig, "from_pretrained", slow)
    with pytest.raises(ValueError, match="was saved to while it was read"):
        Llama.from_pretrained(tmp_path)


def test_a_save_between_two_renames_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path)
    code = (
        "import os, sys, oculi_jax.utils.files as files\n"
        "from oculi_jax.models.llama import Llama, LlamaAttentionAdapter, LlamaConfig\n"
        "model = Llama.from_pretrained(sys.argv[1])\n"
        "own = os.replace\n"
        "def replace(*a): own(*a); os._exit(9)\n"
        "os.replace = replace\n"
        "model.save_pretrained(sys.argv[2])\n"
    )
    tiny_llama(1, num_hidden_layers=5).save_pretrained(tmp_path / "two")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "two", tmp_path], env={**os.environ, "XLA_FLAGS": ""})
    assert done.returncode == 9
    with pytest.raises(ValueError, match="neither the old checkpoint nor the new one"):
        Llama.from_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.num_hidden_layers == 3
    assert not list(tmp_path.glob(".*"))


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    from oculi_jax.utils.files import write_aside

    with write_aside(tmp_path / "x") as aside:
        aside.write_text("1")
        with write_aside(tmp_path / "x") as other:
            other.write_text("2")
        assert aside.exists()
    assert (tmp_path / "x").read_text() == "1"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of file sizes")
def test_a_full_disk_is_named_and_nothing_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk."""
    code = (
        "import resource, signal, sys\n"
        "from oculi_jax.models.llama import Llama, LlamaAttentionAdapter, LlamaConfig\n"
        "model = Llama.from_pretrained(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: model.save_pretrained(sys.argv[2])\n"
        "except OSError as error: print(error)\n"
    )
    to = tmp_path / "to"
    command = [sys.executable, "-c", code, embedded_directory(), to]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": ""})
    assert str(to) in done.stdout and "File too large" in done.stdout and not to.exists(), done.stdout + done.stderr


def damaged(path: Path, **changes: Any) -> Path:
    """The file with other static fields in its metadata."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    static = json.loads(header["__metadata__"]["static"])
    header["__metadata__"]["static"] = json.dumps({**static, **changes})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    to = path.with_name("damaged.safetensors")
    to.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_kv_heads": "NaN"}, "n_kv_heads is 'NaN'"),
        ({"head_dim": None}, "head_dim is None"),
        ({"head_dim": 7}, r"queries has shape \[3, 4, 11, 6\]"),
        ({"captured_layers": [0, 1]}, "queries has shape"),
        ({"captured_layers": [0, 1, 1]}, "captured_layers is"),
        ({"qk_stage": "sideways"}, "qk_stage is 'sideways'"),
        ({"n_heads": True}, "n_heads is True"),
    ],
)
def test_a_captures_fields_are_checked_against_its_arrays(tmp_path: Path, changes: dict, said: str) -> None:

    path = tmp_path / "capture.safetensors"
    save(LlamaAttentionAdapter(tiny_llama()).capture(prompt()), path)
    load(path)
    with pytest.raises(ValueError, match=said):
        load(damaged(path, **changes))


@pytest.mark.parametrize("change", ["shape", "dtype", "offsets"])
def test_a_changed_array_is_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "arrays.safetensors"
    save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2, 3), np.float32)}, path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if change == "shape":
        header["a"]["shape"] = [3, 2]
    if change == "dtype":
        header["a"]["dtype"] = "I32"
    if change == "offsets":
        header["a"]["data_offsets"], header["b"]["data_offsets"] = (
            header["b"]["data_offsets"],
            header["a"]["data_offsets"],
        )
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(ValueError, match="was changed since it was written: a"):
        load(path)


def test_a_picture_on_a_full_disk_is_no_matter_of_standard_output(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from oculi_jax.utils.files import write_aside\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n"
        "    with write_aside(sys.argv[1]) as aside: aside.write_text('x' * 99)\n"
        "except OSError as error: print(error, error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.svg"], capture_output=True, text=True)
    assert done.stdout == f"Cannot write {str(tmp_path / 'x.svg')!r}: File too large. None\n", done.stderr
    assert not list(tmp_path.iterdir())
