"""A fit that can be killed: `python -m tests.slow_fit FILE` goes on from its file, and says after each block how many steps are made."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oculi_jax import forward
from oculi_jax.intervention import Steer
from oculi_jax.training import Fit, Now, fit

from .tiny import prompt, tiny_llama

MODEL, STEPS = tiny_llama(), 300


def loss(vectors: Any, example: Any, now: Now) -> Any:
    """Of a direction, with chance in it."""
    noise = 0.1 * jax.random.normal(now.key, (24,))
    out = forward(MODEL, example["tokens"], Steer(1, vectors + noise), logits="last")
    return -jax.nn.log_softmax(out.logits)[example["label"]] + now.schedule * jnp.sum(vectors**2)


def run(file: str | Path | None = None, progress: Any = False, **changes: Any) -> Fit:
    """Two fits side by side, of rates that fall."""
    data = {"tokens": np.stack([prompt(6, seed) for seed in range(10)]), "label": np.arange(10, dtype=np.int32)}
    start = jnp.zeros((2, 24)).at[1].set(0.1)
    settings = dict(steps=STEPS, batch_size=4, optimiser=optax.adam(0.03), key=jax.random.key(3), many=1)
    schedules = np.linspace(0.1, 0, STEPS).astype(np.float32)
    return fit(
        loss,
        start,
        data,
        **{"held_out": data, "schedules": schedules, **settings, **changes},
        file=file,
        progress=progress,
    )


def main() -> None:
    def told(done: int, _: int) -> None:
        print(done, flush=True)
        time.sleep(0.25)

    run(sys.argv[1], told)


if __name__ == "__main__":
    from tests import slow_fit  # its loss by its own name

    slow_fit.main()
