"""Data sets: `python benchmarks/data.py [--model DIR] [--json OUT]`.

What keeping a capture costs beside the forwards that it is of, how long a row of a large store takes to be read, and whether
memory grows with the number of chunks.
"""

from __future__ import annotations

from functools import partial

from table import Plan, Row, arguments, measure, side_by_side, verdict  # isort: skip

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from oculi_jax import CaptureSpec, data, embedded_model, forward, from_pretrained
from oculi_jax.data import batches, chunks, record, running

N_TEXTS = 2_000
STORE_BYTES, ROW_TOKENS, WIDTH = 2 << 30, 64, 1024
N_CHUNKS = 500


def rows_of_text(n: int, vocab_size: int) -> list[np.ndarray]:
    """Ids of lengths as short texts have them, from 6 to 40."""
    rng = np.random.default_rng(0)
    return [rng.integers(10, vocab_size, rng.integers(6, 41)) for _ in range(n)]


def capture_row(model: Any) -> Row:
    """`resid_post` of two layers, the last among them, beside plain forwards of the same batches."""
    rows = rows_of_text(N_TEXTS, model.config.vocab_size)
    dataset, folder = data.Dataset(rows), Path(tempfile.mkdtemp())

    @jax.jit
    def plain(model: Any, batch: data.Batch) -> jax.Array:
        return jax.vmap(lambda ids, mask: forward(model, ids, mask=mask, logits="last").logits)(
            batch.tokens, batch.mask
        )

    def forwards() -> None:
        for begin in range(0, len(rows), running.ROWS_OF_A_CHUNK):
            for batch, _ in running.batches(
                model, dataset, range(begin, min(begin + running.ROWS_OF_A_CHUNK, len(rows)))
            ):
                jax.block_until_ready(plain(model, batch))

    def kept() -> None:
        shutil.rmtree(folder / "store", ignore_errors=True)
        n_layers = model.config.num_hidden_layers
        spec = CaptureSpec("resid_post", [n_layers // 2, n_layers - 1])
        data.capture_dataset(model, dataset, spec, folder / "store", progress=False)

    try:
        return side_by_side(kept, forwards, bar=1.15, pairs=1)
    finally:
        shutil.rmtree(folder)


def reading_row() -> Row:
    """A hundred random rows of a store, of which the system has nothing in memory."""
    folder = Path(tempfile.mkdtemp())
    per_chunk = 128
    bytes_of_chunk = per_chunk * ROW_TOKENS * WIDTH * 4
    n_chunks = STORE_BYTES // bytes_of_chunk
    job = {"format": record.FORMAT, "n_rows": n_chunks * per_chunk, "chunk_size": per_chunk}
    try:
        record.claim(folder, job)
        values = np.random.default_rng(0).normal(size=(per_chunk * ROW_TOKENS, WIDTH)).astype(np.float32)
        ids = np.zeros(per_chunk * ROW_TOKENS, np.int32)
        offsets = np.arange(per_chunk + 1, dtype=np.int64) * ROW_TOKENS
        for number in range(n_chunks):
            arrays = {"site.0": values + np.float32(number), chunks.IDS: ids, chunks.OFFSETS: offsets}
            chunks.write_chunk(chunks.file_of(folder, number), arrays, ["site.0", chunks.IDS])
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        store, before, taken = data.Store.open(folder), resident(), []
        for number in np.random.default_rng(1).integers(0, len(store), 100):
            start = time.perf_counter()
            row = store["site", 0][int(number)]
            taken.append(time.perf_counter() - start)
            expected = values[(number % per_chunk) * ROW_TOKENS :][:ROW_TOKENS] + np.float32(number // per_chunk)
            assert (row == expected).all()
        grown, slowest = resident() - before, 1e3 * max(taken)
        text = f"median {1e3 * np.median(taken):.1f} ms, slowest {slowest:.0f} ms; {grown / 1e6:+.0f} MB"
        return verdict(text, "≤ 50 ms each", slowest <= 50, slowest=slowest, grown=grown)
    finally:
        shutil.rmtree(folder)


def memory_row() -> Row:
    """The embedded model's stream over many chunks: since the tenth, and since every program has run once, each of which stays."""
    model, _ = embedded_model()
    held: list[int] = []
    rows, at_once = rows_of_text(64 * N_CHUNKS, model.config.vocab_size), batches.tokens_at_once("cpu")
    lengths = np.array([len(row) for row in rows]).reshape(N_CHUNKS, 64)
    first: dict[tuple[int, int], int] = {}
    for number, some in enumerate(lengths):
        for size, length, _ in batches.cut(some, at_once):
            first.setdefault((size, length), number)
    begin = max(10, *first.values())
    with tempfile.TemporaryDirectory() as folder:
        data.capture_dataset(
            model, rows, "resid_post", Path(folder) / "store", chunk_size=64,
            progress=lambda done, total: held.append(resident()),
        )  # fmt: skip
    growth, since_tenth = held[-1] / held[begin] - 1, held[-1] / held[9] - 1
    text = (
        f"{since_tenth:+.1%} since the tenth; {growth:+.1%} since chunk {begin}, when all {len(first)} programs had run; "
        f"{held[-1] / 1e6:.0f} MB"
    )
    return verdict(text, "≤ 2 % after the tenth", since_tenth <= 0.02, growth=growth, since_tenth=since_tenth)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    args = arguments(str(__doc__))
    model = from_pretrained(args.model, dtype="float32")
    plan: Plan = [
        (f"{N_CHUNKS} chunks: resident memory", "", memory_row),
        ("100 random rows of a store of 2 GB, cold", "", reading_row),
        (
            f"capture of two layers' streams over {N_TEXTS:,} short texts: of the forwards alone",
            "",
            partial(capture_row, model),
        ),
    ]
    measure(plan, "data sets", args)


if __name__ == "__main__":
    main()
