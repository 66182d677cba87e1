"""Everything that takes a model, for runs in which its devices belong to two processes: `python -m tests.hosts DIRECTORY HOST PORT`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from oculi_jax import (
    CaptureSpec,
    HeadAblation,
    PerPrompt,
    Steer,
    bootstrap,
    causal,
    circuits,
    data,
    forward,
    generate,
    lens,
    mean_activations,
    metrics,
    models,
    padded,
    rules,
    sweep,
    training,
)  # fmt: skip
from oculi_jax.analysis import AttributionMethods, CompositionAnalysis, LogitLensAnalysis
from oculi_jax.data.hosts import meet
from oculi_jax.models.decoder import checkpoint

from .tiny import prompt

KIND: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=64, intermediate_size=48)
CLEAN, CORRUPTED = (np.stack([prompt(7, seed) for seed in seeds]) for seeds in ((0, 1, 2), (3, 4, 5)))
RAGGED = padded([CLEAN[0][:4].tolist(), CLEAN[1].tolist(), CLEAN[2][:5].tolist()])
METRIC = metrics.logit_difference(np.array([3, 4, 5]), np.array([6, 7, 8]))
SINGLE = metrics.logit_difference(3, 6)


def on_host(x: Any) -> np.ndarray:
    """An array of which this host may have a part, as of a user's own `jax.jit`."""
    there = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if there else multihost_utils.process_allgather(x, tiled=True))


def whole(model: Any) -> Any:
    out = forward(model, CLEAN[0], HeadAblation(1, 2), capture=tuple(model.config.sites))
    return out.logits, dict(out.activations), out.applied


def batch(model: Any) -> Any:
    run = jax.vmap(lambda ids, mask: forward(model, ids, mask=mask, logits="last").logits)
    return jax.jit(run)(*RAGGED)


def heads(model: Any) -> Any:
    return sweep(model, CLEAN[0], HeadAblation.grid(model.config), SINGLE)


def sets(model: Any) -> Any:
    values = sweep(model, RAGGED[0], HeadAblation.grid(model.config), METRIC, mask=RAGGED[1])
    return values, bootstrap(values.mean(axis=(1, 2))).low


def own_function(model: Any) -> Any:
    steer = Steer(1, PerPrompt(np.ones((3, 24), np.float32)), np.array([0.5, 1, 2, 4], np.float32))
    return sweep(model, CLEAN, steer, lambda out: {"all": out.logits[-1], "one": out.logits[2, 3]})


def decoded(model: Any) -> Any:
    steered = Steer(1, np.ones(24, np.float32), np.array([-3, 0, 3], np.float32))
    one = generate(model, CLEAN[0], 5, capture=CaptureSpec("resid_post", [1]))
    return generate(model, RAGGED[0], 5, steered, mask=RAGGED[1]), one


def patched(model: Any) -> Any:
    found = causal.activation_patching(model, CLEAN, CORRUPTED, METRIC, "z", ("layer", "head"))
    return found.patched, found.clean, found.recovery


def noised(model: Any) -> Any:
    noise = causal.Noise([2, 3], scale=0.5, samples=2, key=jax.random.key(0))
    return causal.activation_patching(model, CLEAN[0], noise, SINGLE, "mlp_out", ("layer", "position")).recovery


def attributed(model: Any) -> Any:
    found = causal.attribution_patching(model, CLEAN, CORRUPTED, METRIC, ("z", "q", "k"), steps=2, correct="qk")
    dropped = causal.attribution_patching(
        model, CLEAN, CORRUPTED, METRIC, ("mlp_out",), rules=rules.grad_drop(model.config)
    )
    return dict(found.values), dropped.grad_drop().values


def edges(model: Any) -> Any:
    scores = circuits.edge_attribution(model, CLEAN, CORRUPTED, METRIC, steps=2)
    curve = circuits.faithfulness(model, scores, CLEAN, CORRUPTED, METRIC, sizes=(0.1, 0.5, 1.0), nulls=2, key=0)
    run = circuits.run_circuit(model, CLEAN[0], CORRUPTED[0], edges=scores.top(20).edges)
    return scores.values, curve.faithfulness, curve.by_prompt, run.logits


def paths(model: Any) -> Any:
    return circuits.path_patching(model, CLEAN, CORRUPTED, METRIC).values


def read(model: Any) -> Any:
    found = lens(model, forward(model, CLEAN[0], capture="resid_post")["resid_post"], top_k=3)
    adapter = models.llama.LlamaAttentionAdapter(model)
    capture = adapter.capture_full(CLEAN[0])
    heads = AttributionMethods.head_attribution(capture.attention, model, (3, 6))
    return found, heads.values, LogitLensAnalysis(model).token_probability_trajectory(capture.logits, 3)


def means(model: Any) -> Any:
    return mean_activations(model, *RAGGED[:1], ("z", "resid_post"), mask=RAGGED[1])


def of_weights(model: Any) -> Any:
    values = CompositionAnalysis.weight_composition(model).values
    return values, np.abs(CompositionAnalysis.ov_eigenvalues(model)), CompositionAnalysis.qk_svd(model)


def tuned(model: Any) -> Any:
    rows = np.tile(CLEAN, (4, 1))
    found = training.train_tuned_lens(model, rows, steps=3, key=jax.random.key(0), controls=False, progress=False)
    return found.lens, found.kl, found.losses


def jobs(model: Any) -> Any:
    directory = OUT[0] / ("alone" if jax.process_count() == 1 else "jobs")

    def effect(model: Any, batch: data.Batch) -> Any:
        return sweep(model, batch.tokens, HeadAblation.grid(model.config), SINGLE, mask=batch.mask)

    rows = [prompt(3 + i % 5, i) for i in range(9)]
    store = data.map_dataset(model, rows, effect, directory / "map", chunk_size=2)
    captured = data.capture_dataset(model, rows, CaptureSpec("resid_post", [0, 2]), directory / "capture", chunk_size=2)
    total = data.sum_dataset(model, rows, lambda model, batch: batch.mask.sum(axis=1))
    return np.array(store["values"]), [captured["resid_post", 2][i] for i in range(9)], total


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    f.__name__: f
    for f in (
        whole, batch, heads, sets, own_function, decoded, patched, noised, attributed, edges, paths, read, means, of_weights,
        tuned, jobs,
    )
}  # fmt: skip
# What is run with weights split over hosts as well.
MODEL_SPLIT = ("whole", "sets", "decoded", "patched", "attributed")
OUT: list[Path] = []  # the directory of what is written, and of the model


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How many numbers of each parameter are read from files."""
    read: dict[str, int] = defaultdict(int)
    own = checkpoint._read_tensor

    def counting(found: Any, row: Any, inner: Any, out: np.ndarray) -> None:
        read[row.name] += out.size
        own(found, row, inner, out)

    checkpoint._read_tensor = counting
    try:
        yield read
    finally:
        checkpoint._read_tensor = own


def leaves(name: str, model: Any) -> list[np.ndarray]:
    """What a function gives, on this host."""
    return [on_host(leaf) for leaf in jax.tree.leaves(FUNCTIONS[name](model))]


def main() -> None:
    """Writes what every function gives on this host, or why it gives nothing: with variants split over hosts, then weights."""
    OUT.append(Path(sys.argv[1]))
    host, port = sys.argv[2:4]
    jax.distributed.initialize(f"localhost:{port}", 2, int(host))
    devices = np.array(jax.devices()).reshape(2, 2)
    for split, names in (("data", FUNCTIONS), ("model", MODEL_SPLIT)):
        mesh = Mesh(devices if split == "data" else devices.T, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        with counted() as read:
            model = models.from_pretrained(OUT[0] / "model", mesh=mesh)
        (OUT[0] / f"{split}-{host}.json").write_text(json.dumps(read), encoding="utf8")
        for name in [name for name in names if name in (sys.argv[4:] or names)]:
            meet(name)
            start = time.perf_counter()
            try:
                np.savez(OUT[0] / f"{split}-{name}-{host}.npz", *leaves(name, model))
            except Exception:
                (OUT[0] / f"{split}-{name}-{host}.txt").write_text(traceback.format_exc(), encoding="utf8")
            print(f"{split} over hosts, {name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    from tests import hosts  # its functions by their own names

    hosts.main()
