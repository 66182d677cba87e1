"""Peak memory of loading a checkpoint, which only a fresh process can tell: `python benchmarks/loading.py [DIR]`.

Prints, in bytes as JSON, what the process had resident before the load, the peak during it, and the parameters' size.
Without DIR it makes a checkpoint to load, of random bfloat16 weights in the shape of Llama 3.2 1B. Needs Linux's /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig

SHAPE_1B = """{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
"max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "tie_word_embeddings": true, "dtype": "bfloat16"}"""


def write_checkpoint(directory: Path) -> None:
    """Writes random bfloat16 weights, block by block."""
    (directory / "config.json").write_text(SHAPE_1B)
    header: dict[str, Any] = {}
    end = 0
    for row in parameter_table(LlamaConfig.from_pretrained(directory)):
        for name in row.tensors():
            start, end = end, end + 2 * int(np.prod(row.stored))
            header[name] = {"dtype": "BF16", "shape": row.stored, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(ml_dtypes.bfloat16).tobytes()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])


def measure(directory: str) -> dict[str, int]:
    """Loads a checkpoint into this process, which must be fresh."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    jax.jit(lambda x: x + 1)(jnp.zeros(8)).block_until_ready()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        print("The peak cannot be reset here; it may be from before the load.", file=sys.stderr)
    before = status("VmRSS")
    leaves = jax.block_until_ready(jax.tree.leaves(Llama.from_pretrained(directory)))
    return {"before": before, "peak": status("VmHWM"), "parameters": sum(leaf.nbytes for leaf in leaves)}


def in_a_fresh_process() -> dict[str, int]:
    """`measure` of a checkpoint made for it, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        command = [sys.executable, __file__, directory]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]) if len(sys.argv) > 1 else in_a_fresh_process()))
