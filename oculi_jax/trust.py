"""Whether a device computes what the CPU does: one prompt, every site, both in float32 and in the model's dtype, in plain words.

The reference is JAX on the CPU in float32, which the tests compare with Hugging Face's own at every site.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .embedded import embedded_directory
from .models.loading import from_pretrained
from .run import forward
from .sites import SITES
from .utils.devices import find_device, has_torch

if TYPE_CHECKING:
    import torch

# A row's largest error over its largest value. Float32 differs between devices by what rounding adds up to over the layers;
# TF32 and the like, which some take for it, have three digits.
ROUNDING, ROUGH = 1e-4, 1e-2
# Half precision may be so many times as far from float32 as the CPU's own is: in the mean of rows, as that is at the worst layer;
# and, since a fault of one row hides in a mean, in the worst row of each layer. Sums in another order round differently: two sound
# backends on one CPU differed by 3 times in a layer's mean and by 5 times in its worst row, where that was more than four
# roundings (SmolLM2, four prompts).
_TIMES, _TIMES_ROW = 5.0, 10.0
# Tokens of the prompt where the model has so many: more than one of a GPU's tiles of 16.
_LENGTH = 24
# The logits of a run that captures nothing, which may use fused attention.
ALONE = "logits, no capture"


@dataclass(frozen=True)
class Finding:
    """What one device does in one dtype.

    Attributes:
        backend, device, dtype: `"jax"` or `"torch"`, the device's name, the dtype of the weights.
        errors: site → the worst row's largest error over its largest value, by layer `[L]` (`[1]` where a site has no layers).
        excess: site → how many times what is allowed that is, by layer likewise; in half precision also of the mean of rows,
            whichever is more.
        verdict: `"good"`; `"rough"`, off as less precise arithmetic would be; `"wrong"`; `"failed"`, it did not run.
        sentence: the same in plain words.
    """

    backend: str
    device: str
    dtype: str
    errors: dict[str, Float[np.ndarray, "L"]]
    excess: dict[str, Float[np.ndarray, "L"]]
    verdict: Literal["good", "rough", "wrong", "failed"]
    sentence: str


def devices() -> list[tuple[str, str]]:
    """What can be compared with the reference here: `(backend, device)`, accelerators first."""
    found = [("jax", name) for name in dict.fromkeys(d.platform for d in jax.local_devices()) if name != "cpu"]
    if has_torch():
        from .backends.torch.devices import there

        found += [("torch", name) for name in there()]
    return found


def examine(
    source: str | os.PathLike[str] | None = None,
    backend: str = "torch",
    device: str = "cpu",
    dtype: str = "float32",
) -> Finding:
    """Runs one prompt of 24 random tokens on a device and on the CPU, and compares every site.

    Args:
        source: a checkpoint, as `from_pretrained` takes; the embedded model for None.
        backend, device: as `from_pretrained` takes.
        dtype: of the weights, `"auto"` for as they are stored; the reference's too, which are then widened to float32.

    Raises:
        ValueError, FileNotFoundError: there is no such checkpoint or device.
    """
    source = embedded_directory() if source is None else source
    _check_device(backend, device)
    cpu = from_pretrained(source, dtype=dtype, device="cpu")
    dtype = cpu.dtype.name
    length = min(_LENGTH, cpu.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, cpu.config.vocab_size, length)
    want = _run(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cpu), tokens)
    # How rows are taken together, and how far off they may then be, by layer.
    checks: list[tuple[Callable[..., np.ndarray], dict[str, Any]]] = [(np.max, dict.fromkeys(want, ROUNDING))]
    if dtype != "float32":
        half = _run(cpu, tokens)
        means, worst = (_errors(half, want, of_rows) for of_rows in (np.mean, np.max))
        over = {site: np.where(np.isfinite(error), 0.0, np.inf) for site, error in worst.items()}
        if any(error.any() for error in over.values()):
            sentence = (
                f"This model overflows in {dtype}, on the CPU too, first {_named(*_first(over))}: use "
                f"{'bfloat16 or ' if dtype == 'float16' else ''}float32."
            )
            return Finding(backend, device, dtype, {}, excess={}, verdict="wrong", sentence=sentence)
        least = 4 * float(jnp.finfo(dtype).eps)  # a row that the CPU happens to have exactly may be off by roundings
        checks = [
            (np.mean, {site: max(ROUNDING, _TIMES * error.max()) for site, error in means.items()}),
            (np.max, {site: np.maximum(least, _TIMES_ROW * error) for site, error in worst.items()}),
        ]
    del cpu
    where = f"{device} ({'JAX' if backend == 'jax' else 'torch'}) in {dtype}"
    try:
        got = _run(from_pretrained(source, dtype=dtype, device=device, backend=backend), tokens)
    except (RuntimeError, TypeError) as error:  # torch's for what a device has no room or no kernel for
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        sentence = f"{where} did not run: {said} Use the CPU."
        return Finding(backend, device, dtype, {}, excess={}, verdict="failed", sentence=sentence)
    each = [(_errors(got, want, of_rows), allowed) for of_rows, allowed in checks]
    excess = {site: np.max([errors[site] / allowed[site] for errors, allowed in each], axis=0) for site in want}
    errors = _errors(got, want)
    verdict, words = _judge(errors, excess, dtype)
    return Finding(backend, device, dtype, errors, excess=excess, verdict=verdict, sentence=f"{where} {words}")


def _check_device(backend: str, device: str) -> None:
    if backend == "torch":
        from .backends.torch.devices import find_device as of_torch

        of_torch(device)
    else:
        find_device(device)


def _run(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    sites = tuple(model.config.sites)
    out, alone = forward(model, tokens, capture=sites), forward(model, tokens).logits
    values = [*((site, out.activations[site]) for site in sites), ("logits", out.logits), (ALONE, alone)]
    found = {site: np.asarray(value) for site, value in values}
    return {site: x if x.dtype == bool else x.astype(np.float64) for site, x in found.items()}


def _errors(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], of_rows: Callable[..., np.ndarray] = np.max
) -> dict[str, np.ndarray]:
    """Site → by layer, a row's largest error over its largest value, `of_rows` of them.

    Infinite for what is not finite, and where booleans differ.
    """
    found = {}
    for site, theirs in want.items():
        ours = got[site]
        lead = theirs.shape[:1] if site in SITES and SITES[site].layered else (1,)
        if theirs.dtype == bool:
            found[site] = np.where((ours != theirs).reshape(*lead, -1).any(1), np.inf, 0.0)
            continue
        over = (-2, -1) if site == "scores" else (-1,)
        size = np.abs(theirs).max(over)
        error = np.abs(ours - theirs).max(over) / np.where(size == 0, 1, size)
        found[site] = of_rows(np.where(np.isfinite(error), error, np.inf).reshape(*lead, -1), axis=1)
    return found


def _judge(errors: dict[str, np.ndarray], excess: dict[str, np.ndarray], dtype: str) -> tuple[Any, str]:
    site = max(excess, key=lambda name: excess[name].max())
    layer = int(excess[site].argmax())
    most, at = float(excess[site][layer]), _named(site, layer)
    if most <= 1:
        if dtype == "float32":
            return (
                "good",
                f"agrees with the CPU to rounding at every site (at most {errors[site][layer]:.0e}, {at}): it can be trusted.",
            )
        return (
            "good",
            f"is as near to float32 as the CPU's own {dtype} is, at every site: it can be trusted as far as {dtype} can.",
        )
    if most <= (ROUGH / ROUNDING if dtype == "float32" else 4.0):
        if dtype != "float32":
            return "rough", (
                f"is further from float32 than the CPU's own {dtype} explains ({at}, by {most:.1f} times): large effects can be "
                "trusted, small ones cannot."
            )
        return "rough", (
            f"differs from the CPU by up to {errors[site][layer]:.0e} ({at}), as less precise arithmetic does: large effects can "
            'be trusted, small ones cannot. With JAX, jax.default_matmul_precision("highest") asks for all digits.'
        )
    name, layer = _first(excess)
    size = errors[name][layer]
    off = "values that are not finite or not the same" if not np.isfinite(size) else f"an error of {size:.0e}"
    return "wrong", f"is WRONG, first {_named(name, layer)}, with {off}: do not trust it, and use the CPU."


def _first(excess: dict[str, np.ndarray]) -> tuple[str, int]:
    """The site, and its layer, that is the first in a run to be further off than is allowed."""

    def place(name: str, order: int) -> tuple[float, int]:
        layered = name in SITES and SITES[name].layered
        layer = int(np.flatnonzero(excess[name] > 1)[0])
        return (layer if layered else -1 if name == "embed" else np.inf, order)

    off = [name for name, times in excess.items() if (times > 1).any()]
    name = min(off, key=lambda name: place(name, off.index(name)))
    return name, int(np.flatnonzero(excess[name] > 1)[0])


def _named(site: str, layer: int) -> str:
    return f"at {site} of layer {layer}" if site in SITES and SITES[site].layered else f"at {site}"


@cache
def _short(device: str) -> Finding:
    try:
        return examine(None, "torch", device)
    except Exception as error:  # a check that cannot be made is a warning: the adapter is to work
        sentence = f"{device} could not be checked: {error}"
        return Finding("torch", device, "float32", {}, excess={}, verdict="failed", sentence=sentence)


def warn_once(device: torch.device) -> None:
    """The short form, once a process, of an Apple GPU: the embedded model in float32. Warns unless it can be trusted."""
    if device.type != "mps" or _short.cache_info().currsize:
        return
    if (found := _short(device.type)).verdict != "good":
        warnings.warn(f"{found.sentence} `oculi doctor` shows more.", RuntimeWarning, stacklevel=3)
