"""Files of what takes long: where it stands, from which a killed one goes on; another one's is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.record import contents, some_entries
from ..utils.files import read_tensors, write_aside, write_tensors
from .steps import Programs, Start, moved
from .watching import Watch

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

FORMAT = "oculi_jax fit 1"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what functions print, another one in every process
_SHARE = 10  # a file is written again when so many times what the last writing took has passed
_READABLE = ("steps", "batch_size", "many", "stop", "key", "skip")  # of a job: all else are hashes
_WHERE = ("losses", "lowest", "waited", "at", "values")


def path_of(file: str | os.PathLike[str] | None) -> Path | None:
    """A path of what is given as `file=`; TypeError for what is none."""
    if file is None:
        return None
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"file is {file!r}, and a path is needed, or None.")
    return Path(file).expanduser()


def job_of(
    programs: Programs, start: Start, axes: tuple[int, ...], given: dict[str, Any], **settings: Any
) -> dict[str, Any]:
    """What makes a fit this one, in texts and numbers that can be compared."""
    loss = hashlib.sha256(_ADDRESS.sub("", str(programs.loss.program)).encode())
    for x in programs.loss.consts:
        loss.update(np.asarray(_some(x)).tobytes())
    first = [x[0] for x in start.trained]
    one = {"trained": first, "optimiser": programs.optimiser.init(first)}
    step = jax.make_jaxpr(lambda state, gradient: moved(programs.optimiser, state, gradient))(one, first)
    return {
        **settings,
        "many": list(axes),
        "loss": loss.hexdigest()[:16],
        "optimiser": hashlib.sha256(_ADDRESS.sub("", str(step)).encode()).hexdigest()[:16],
        "key": np.asarray(jax.random.key_data(programs.fixed["key"])).tolist(),
        "start": contents([(str(start.tree), start.trained, start.carried)]),
        **{name: None if tree is None else contents([tree]) for name, tree in given.items()},
    }


def _some(x: Any) -> Any:
    """Some entries of an array; the bits of a random key."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return some_entries(x)


def _job_in(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        job = json.loads(header.get("job", ""))
    except (ValueError, RecursionError):
        job = None
    if not isinstance(job, dict):
        raise ValueError(f"{str(path)!r} is damaged: it does not say which fit it is of. Remove it.")
    return job


@dataclass
class Saved:
    """A file, open: what it held when it was opened, and when it was last written."""

    path: Path
    job: dict[str, Any]
    held: dict[str, np.ndarray]
    written: float = 0.0
    took: float = 0.0

    @classmethod
    def open(cls, path: Path, job: dict[str, Any]) -> Saved:
        """Reads it, where it is there; ValueError, with what differs, where it is another fit's."""
        job = json.loads(json.dumps(job))
        if not path.exists():
            return cls(path, job, {})
        held, header = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is a safetensors file, but no fit's: file= is where a fit goes on from.")
        there = _job_in(path, header)
        differs = [name for name in job if there.get(name) != job[name]]
        if differs:
            said = [
                f"{name} is {there.get(name)!r} there, and {job[name]!r} here"
                if name in _READABLE
                else f"not the same {name}"
                for name in differs
            ]
            raise ValueError(f"{str(path)!r} is of another fit: {'; '.join(said)}.")
        return cls(path, job, held)

    def read(self, state: dict[str, Any], losses: np.ndarray, watch: Watch) -> tuple[dict[str, Any], int]:
        """The state that it held, or the one given, and how many steps were made; fills in the losses, and what was watched."""
        if not self.held:
            return state, 0
        leaves, tree = jax.tree.flatten((state, watch.best))
        kept = [jnp.asarray(self.array(f"state.{i}", x.shape, x.dtype)) for i, x in enumerate(leaves)]
        state, watch.best = jax.tree.unflatten(tree, kept)
        n_fits, at = losses.shape[1], self.array("at", (None,), np.int64)
        own = self.array("losses", (None, n_fits), np.float32)
        if len(own) > len(losses):
            raise self.damaged("losses")
        losses[: len(own)] = own
        watch.lowest = self.array("lowest", (n_fits,), np.float32)
        watch.waited = self.array("waited", (n_fits,), np.int32)
        watch.at, watch.values = at.tolist(), list(self.array("values", (len(at), n_fits), np.float32))
        return state, len(own)

    def array(self, name: str, shape: tuple[int | None, ...], dtype: DTypeLike) -> np.ndarray:
        """What it held by a name; ValueError where that is not of this shape, whose None may be anything, and dtype."""
        own = self.held.get(name)
        if own is None or own.dtype != dtype or own.ndim != len(shape):
            raise self.damaged(name)
        if any(n not in (None, m) for n, m in zip(shape, own.shape, strict=True)):
            raise self.damaged(name)
        return own

    def damaged(self, name: str) -> ValueError:
        """The error of a file that does not hold by that name what it was to."""
        return ValueError(f"{str(self.path)!r} is damaged: {name} is not there, or not what a fit writes. Remove it.")

    def write(self, state: dict[str, Any], losses: np.ndarray, watch: Watch, *, always: bool) -> None:
        """`keep`, of the state of a fit."""
        leaves = jax.tree.leaves((state, watch.best))
        values = np.stack(watch.values) if watch.values else np.zeros((0, len(watch.waited)), np.float32)
        own = (losses, watch.lowest, watch.waited, np.array(watch.at, np.int64), values)
        tensors = {f"state.{i}": leaf for i, leaf in enumerate(leaves)} | dict(zip(_WHERE, own, strict=True))
        self.keep(tensors, always=always)

    def keep(self, tensors: dict[str, Any], *, always: bool) -> None:
        """Writes arrays over what it held, whole or not at all: where enough time has passed, or `always`."""
        begin = time.perf_counter()
        if not always and begin - self.written < _SHARE * self.took:
            return
        arrays = self.held | {name: np.asarray(x, order="C") for name, x in tensors.items()}
        self.held = arrays if always else self.held
        with write_aside(self.path) as aside:
            write_tensors(aside, arrays, {"format": FORMAT, "job": json.dumps(self.job)}, name=self.path)
        self.written = time.perf_counter()
        self.took = self.written - begin


def beside_file(path: Path | None, name: str) -> Path | None:
    """The file of one of several fits, `STEM.NAME.safetensors` beside the one that was named."""
    return None if path is None else path.with_name(f"{path.stem}.{name}{path.suffix or '.safetensors'}")
