"""The file of a fit: where it stands, from which a killed one goes on; another fit's is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..utils.files import read_tensors, write_aside, write_tensors
from .steps import Programs, Start, moved
from .watching import Watch

FORMAT = "oculi_jax fit 1"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what functions print, another one in every process
_SEEN = 16  # entries of each axis of an array that a loss closes over, or a few more, that its fingerprint is of
_SHARE = 10  # a file is written again when so many times what the last writing took has passed
_READABLE = ("steps", "batch_size", "many", "stop", "key")  # of a job: all else are hashes
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
        "start": _contents((str(start.tree), start.trained, start.carried)),
        **{name: None if tree is None else _contents(tree) for name, tree in given.items()},
    }


def _some(x: Any) -> Any:
    """Some entries of an array; the bits of a random key."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return x[tuple(slice(None, None, max(1, n // _SEEN)) for n in x.shape)]


def _contents(tree: Any) -> str:
    """A hash of what a pytree is and holds."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf.encode() if isinstance(leaf, str) else np.asarray(leaf)
        kind = "" if isinstance(array, bytes) else f"{array.shape} {array.dtype}"
        found.update(f"{jax.tree_util.keystr(path)} {kind}".encode())
        found.update(array if isinstance(array, bytes) else array.tobytes())
    return found.hexdigest()[:16]


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
    """The file of a fit, open: what it held when it was opened, and when it was last written."""

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
                else f"another {name}"
                for name in differs
            ]
            raise ValueError(f"{str(path)!r} is of another fit: {'; '.join(said)}.")
        return cls(path, job, held)

    def read(self, state: dict[str, Any], losses: np.ndarray, watch: Watch) -> tuple[dict[str, Any], int]:
        """The state that it held, or the one given, and how many steps were made; fills in the losses, and what was watched."""
        if not self.held:
            return state, 0
        leaves, tree = jax.tree.flatten((state, watch.best))
        self._check(leaves, losses)
        kept = [jnp.asarray(self.held[f"state.{i}"]) for i in range(len(leaves))]
        state, watch.best = jax.tree.unflatten(tree, kept)
        own = {name: self.held[name] for name in _WHERE}
        done = len(own["losses"])
        losses[:done] = own["losses"]
        watch.lowest, watch.waited = own["lowest"], own["waited"]
        watch.at, watch.values = own["at"].tolist(), list(own["values"])
        return state, done

    def _check(self, leaves: list[Any], losses: np.ndarray) -> None:
        """ValueError where the file lacks what `write` wrote, or has it in other shapes."""
        rows = {name: len(self.held[name]) if np.ndim(self.held.get(name)) else -1 for name in ("losses", "at")}
        n_fits = losses.shape[1]
        need = {f"state.{i}": (x.shape, x.dtype) for i, x in enumerate(leaves)} | {
            "losses": ((rows["losses"], n_fits), np.float32), "lowest": ((n_fits,), np.float32),
            "waited": ((n_fits,), np.int32), "at": ((rows["at"],), np.int64), "values": ((rows["at"], n_fits), np.float32),
        }  # fmt: skip
        for name, (shape, dtype) in need.items():
            own = self.held.get(name)
            if own is None or own.shape != shape or own.dtype != dtype or rows["losses"] > len(losses):
                raise ValueError(
                    f"{str(self.path)!r} is damaged: {name} is not there, or not what a fit writes. Remove it."
                )

    def write(self, state: dict[str, Any], losses: np.ndarray, watch: Watch, *, always: bool) -> None:
        """Writes it, whole or not at all, where enough time has passed, or it is to be written `always`."""
        begin = time.perf_counter()
        if not always and begin - self.written < _SHARE * self.took:
            return
        leaves = jax.tree.leaves((state, watch.best))
        values = np.stack(watch.values) if watch.values else np.zeros((0, len(watch.waited)), np.float32)
        own = (losses, watch.lowest, watch.waited, np.array(watch.at, np.int64), values)
        tensors = {f"state.{i}": leaf for i, leaf in enumerate(leaves)} | dict(zip(_WHERE, own, strict=True))
        arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
        with write_aside(self.path) as aside:
            write_tensors(aside, arrays, {"format": FORMAT, "job": json.dumps(self.job)}, name=self.path)
        self.written = time.perf_counter()
        self.took = self.written - begin
