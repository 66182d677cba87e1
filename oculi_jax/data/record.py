"""`index.json`: which job a directory holds the results of; another is refused, with what differs."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..arrays import AnyArray, on_every_host
from ..utils.files import write_aside

if TYPE_CHECKING:
    from ..backends.protocol import Model

NAME, FORMAT = "index.json", "oculi_jax store 1"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in what objects print, another one in every process
_SEEN = 16  # entries of each axis of a weight, or a few more, that its fingerprint is of


def describe(model: Model) -> dict[str, Any]:
    """Which model it is: its family, its dtype, and a hash of its configuration and of some numbers of every weight."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, some in _weights(model):
        values = np.asarray(some)
        found.update(f"{name} {values.shape} {values.dtype}".encode() + values.tobytes())
    return {"backend": model.backend, "dtype": str(model.dtype), "weights": found.hexdigest()[:32]}


def _weights(model: Any) -> list[tuple[str, Any]]:
    """Name → some numbers of a weight."""
    if model.backend == "jax":
        some = on_every_host(_some(model))
        return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(some)]
    own = model.weights()
    layers = [(f"{number}.{name}", x) for number, layer in enumerate(own.layers) for name, x in sorted(layer.items())]
    tensors = [("embed", own.embed), ("norm", own.norm), ("unembed", own.unembed), *layers]
    return [(name, _numpy(some_entries(x))) for name, x in tensors]


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


@jax.jit
def _some(model: Any) -> Any:
    return jax.tree.map(some_entries, model)


def some_entries(x: AnyArray) -> AnyArray:
    """An array's, spread over every axis."""
    return x[tuple(slice(None, None, max(1, n // _SEEN)) for n in x.shape)]


def named(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function is: its name, a hash of its text, and what it was bound to. What it closes over nobody can see."""
    if isinstance(function, functools.partial):
        given = {**{str(n): x for n, x in enumerate(function.args)}, **function.keywords}
        return {**named(function.func), "bound": {name: _ADDRESS.sub("", repr(x)) for name, x in given.items()}}
    inner = inspect.unwrap(function)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    try:
        text = hashlib.sha256(inspect.getsource(inner).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        text = ""
    return {"name": f"{getattr(inner, '__module__', '')}.{name}", "text": text}


def contents(items: Sequence[object]) -> list[str]:
    """What pytrees are and hold, for comparing."""

    def of(item: object) -> str:
        found = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(item):
            array = np.asarray(leaf)
            found.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode() + array.tobytes())
        return f"{type(item).__name__} {found.hexdigest()[:16]}"

    return [of(item) for item in items]


def claim(directory: Path, job: Mapping[str, Any]) -> None:
    """Makes a directory that of a job; ValueError, with what differs, where it is another's."""
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"Cannot make the directory {str(directory)!r}: {error.strerror}.") from error
    refuse(directory, job)
    if not path.exists():
        with write_aside(path) as aside:
            aside.write_text(json.dumps(job, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    refuse(directory, job)  # another host may have been quicker


def refuse(directory: Path, job: Mapping[str, Any]) -> None:
    """ValueError where a directory holds something else than the results of a job; with what differs, where it is another job's."""
    if not directory.is_dir():
        return
    there = sorted(found.name for found in directory.iterdir() if not found.name.startswith("."))
    if there and NAME not in there:
        raise ValueError(f"{str(directory)!r} is not empty, and holds no results of a job: {', '.join(there[:3])}.")
    if there and (differs := differences(read(directory), json.loads(json.dumps(job)))):
        raise ValueError(f"{str(directory)!r} holds the results of another job: {'; '.join(differs)}.")


def read(directory: Path) -> dict[str, Any]:
    """The job of a directory; OSError where it has none, ValueError where it is not to be understood."""
    path = directory / NAME
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There are no results in {str(directory)!r}: it has no {NAME}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(job, dict) or job.get("format") != FORMAT:
        found = job.get("format") if isinstance(job, dict) else type(job).__name__
        raise ValueError(f"{str(path)!r} is of {found!r}, and this version reads {FORMAT!r}.")
    whole = (isinstance(job.get(name), int) and job[name] > 0 for name in ("n_rows", "chunk_size"))
    if not all(whole):
        raise ValueError(f"{str(path)!r} does not say how many rows there are, and how many in a chunk.")
    return job


def differences(there: object, here: object, name: str = "") -> list[str]:
    """Where two jobs, as JSON has them, differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(set(there) | set(here))
        return [x for key in keys for x in differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))]
    return [] if there == here else [f"{name} is {there!r} there, and {here!r} here"]
