"""A job that does little but wait, for being stopped: `python -m tests.slow_job DIRECTORY ROWS SECONDS [BYTES]`, two rows a chunk."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from oculi_jax import data

from .tiny import tiny_llama

PAUSE = [0.0]


def slow(model: Any, batch: data.Batch) -> dict[str, Any]:
    print("chunk", flush=True)
    time.sleep(PAUSE[0])
    return {"n": batch.mask.sum(axis=1), "wide": np.tile(batch.tokens[:, 2:], (1, 3000)).astype(np.float32)}


def run(directory: str | Path, n_rows: int) -> data.Store:
    return data.map_dataset(tiny_llama(), [[1, 2, 3 + i] for i in range(n_rows)], slow, directory, chunk_size=2)


if __name__ == "__main__":
    from tests import slow_job  # the function by its own name

    if sys.argv[4:]:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)  # of any file
    slow_job.PAUSE[0] = float(sys.argv[3])
    slow_job.run(sys.argv[1], int(sys.argv[2]))
    print("done", flush=True)
