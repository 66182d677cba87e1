"""The tables of `sweeps.py` and `rates.py` on a GPU or TPU: `python benchmarks/accelerator.py [--model DIR] [--json OUT]`.

Peers run on the GPU where torch has one, else on the CPU, and the title says which. The bars are for a CPU: here a peer has
only to be slower. Exits with 2 where JAX has no accelerator.
"""

from __future__ import annotations

import os
import sys

# Before `table`, which asks for the CPU. JAX then takes the best platform that it has, and leaves torch some memory.
os.environ.setdefault("JAX_PLATFORMS", "")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from table import arguments, installed, measure  # isort: skip

import jax
import rates
import sweeps

from oculi_jax.models.llama import Llama
from oculi_jax.utils.tokens import load_tokenizer


def torch_device() -> str:
    if not installed("torch"):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    args = arguments(str(__doc__))
    if jax.default_backend() == "cpu":
        print(
            "There is no accelerator: JAX runs on the CPU here. Install jax[cuda12] or jax[tpu] and leave JAX_PLATFORMS "
            "unset; for the CPU, run sweeps.py and rates.py.",
            file=sys.stderr,
        )
        sys.exit(2)
    device = torch_device()
    model = Llama.from_pretrained(args.model, dtype="float32")
    bench = sweeps.Bench(model, args.model, load_tokenizer(args.model), device)
    title = f"ours on {jax.devices()[0].device_kind}, peers on torch's {device}"
    measure([*sweeps.rows(bench), *rates.rows(bench)], title, args)


if __name__ == "__main__":
    main()
