"""A job that does little but wait, for being stopped, two rows a chunk: `python -m tests.slow_job DIRECTORY ROWS SECONDS`."""

from __future__ import annotations

import argparse
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


def counted(model: Any, batch: data.Batch) -> np.ndarray:
    return 1 / (batch.tokens[:, 2].astype(np.float32) + batch.rows)


def run(directory: str | Path, n_rows: int) -> data.Store:
    return data.map_dataset(tiny_llama(), [[1, 2, 3 + i] for i in range(n_rows)], slow, directory, chunk_size=2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("rows", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--most-bytes", type=int, help="of any file")
    parser.add_argument("--host", type=int)
    parser.add_argument("--port", help="of the first of two hosts")
    args = parser.parse_args()
    if args.most_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (args.most_bytes,) * 2)
    if args.port:
        import jax

        jax.distributed.initialize(f"localhost:{args.port}", 2, args.host)
    PAUSE[0] = args.seconds
    run(args.directory, args.rows)
    if args.port:
        rows = [[1, 2, 3 + i] for i in range(1100)]  # three chunks
        total = data.sum_dataset(tiny_llama(), rows, counted, file=f"{args.directory}.safetensors")
        np.save(f"{args.directory}-{args.host}.npy", total)
    print("done", flush=True)


if __name__ == "__main__":
    from tests import slow_job  # its functions by their own names

    slow_job.main()
