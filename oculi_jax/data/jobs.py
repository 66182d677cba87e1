"""`map_dataset`, `capture_dataset` and `sum_dataset`: a whole data set, chunk by chunk, interrupted and gone on with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from .. import __version__
from ..arrays import integer, listing, under_trace, wide
from ..backends import find_model, programs_of
from ..capture import Reading, readings_of
from ..intervention.frame import Frame
from ..intervention.protocol import as_list
from ..intervention.rows import Rows
from ..prompts import check_prompts
from ..sweeps.running import check_progress, told
from .batches import TOKENS_AT_ONCE, TOKENS_AT_ONCE_ELSEWHERE, Batch, batches_of
from .chunks import IDS, OFFSETS, Chunk, file_of, write_chunk
from .dataset import Dataset
from .interrupts import until_asked
from .record import FORMAT, claim, contents, describe, named
from .store import Store

if TYPE_CHECKING:
    from ..backends.protocol import Model, ModelLike
    from ..capture import CaptureLike
    from ..intervention.protocol import Interventions
    from ..sweeps.running import Progress
    from ..utils.tokens import Tokenizer
    from .dataset import DatasetLike

ROWS_OF_A_CHUNK = 512
# (model, batch) → a pytree of arrays that lead with the rows of the batch.
Function: TypeAlias = Callable[[Any, Batch], Any]


def map_dataset(
    model: ModelLike,
    dataset: DatasetLike,
    fn: Function,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    tokens: Mapping[str, int] | None = None,
    chunk_size: int = ROWS_OF_A_CHUNK,
    about: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
) -> Store:
    """Runs a function over a data set and keeps what it gives of every row. Host function.

    The set is cut into chunks by row number alone, a chunk into batches of near lengths, and each chunk becomes a file, whole or
    not there: a second start does the chunks that are missing or damaged and comes to the same bytes. Ctrl-C and SIGTERM end
    after the chunk at hand. Under `jax.distributed`, where every host calls the same lines with the model on its own devices,
    host i does every n-th chunk, from the i-th.

    Args:
        model: a model of any family.
        dataset: a `Dataset`, or what makes one.
        fn: `(model, batch) → arrays [B, …]`, in any pytree. It runs on the host, so that `sweep` and patching may be called
            in it; what is of jax.numpy alone is quicker under `jax.jit`. See `Batch`.
        directory: where to; it is made. One that holds the results of another job is refused.
        tokenizer: for texts.
        tokens: name → the axis of tokens, counted from that of the rows, 0, of what `fn` gives for each token; kept of real
            tokens alone. Names are keys and fields, joined by dots; of an `fn` that gives one array it is `values`.
        chunk_size: rows of a chunk.
        about: what else the results depend on and `fn`'s text does not say, such as numbers it closes over; as JSON has it.
        progress: as in `sweep`, of rows.

    Returns:
        A `Store`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs; another job's directory; what `fn`
            gave. OSError: what cannot be written, with how much is there.

    Examples:
        >>> def effect(model, batch):
        ...     metric = metrics.logit_difference(batch["answer"], batch["other"])
        ...     heads = HeadAblation(np.arange(4)[:, None], np.arange(6))
        ...     return {"heads": sweep(model, batch.tokens, heads, metric, mask=batch.mask)}
        >>> rows = [{"text": text, "answer": rome, "other": paris}] * 3
        >>> store = data.map_dataset(model, rows, effect, "effects", tokenizer=tokenizer)
        >>> store, np.array(store["heads"]).shape
        (Store(3 of 3 rows: heads), (3, 4, 6))
    """
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}, and a function of a model and a Batch is needed.")
    job = {"function": named(fn), "tokens": dict(tokens or {}), "about": dict(about or {})}
    return _run(model, dataset, fn, directory, tokenizer, dict(tokens or {}), chunk_size, job, progress)


def capture_dataset(
    model: ModelLike,
    dataset: DatasetLike,
    capture: CaptureLike,
    directory: str | os.PathLike[str],
    *,
    interventions: Interventions = (),
    tokenizer: Tokenizer | None = None,
    chunk_size: int = ROWS_OF_A_CHUNK,
    progress: Progress | bool | None = None,
) -> Store:
    """Keeps what sites hold in a whole data set, of real tokens alone. Host function.

    Args:
        capture: as in `forward`, but no site with an axis of keys, which are others in every row.
        interventions: as in `forward`, the same for every row.
        model, dataset, directory, tokenizer, chunk_size, progress: as in `map_dataset`.

    Returns:
        A `Store`, in which a site of layers has a name for each, such as `resid_post.3`.

    Raises:
        As `map_dataset`.

    Examples:
        >>> store = data.capture_dataset(model, [text, "Rome"], CaptureSpec("resid_post", [1, 3]), "stream", tokenizer=tokenizer)
        >>> store["resid_post", 3][0].shape
        (6, 192)
    """
    found, given = find_model(model), _given(dataset, tokenizer)
    readings = readings_of(capture, found.config, 1 << 20)
    if keyed := [r.site.name for r in readings if "S" in r.site.axes]:
        raise ValueError(
            f"{', '.join(keyed)} has an axis of keys, which are others in every row: make of it what has none, in map_dataset."
        )
    first = Frame(found.config, found.dtype, len(given.rows([0])[0][given.column]), None)
    if axes := Rows.of(interventions, [first])[1]:
        raise ValueError(
            f"The interventions have axes {listing(axes)} of a sweep, and one run of each row is kept: use map_dataset."
        )
    asked = [{"site": r.site.name, "layers": r.layers, "positions": r.positions, "dtype": r.dtype} for r in readings]
    job = {"capture": asked, "interventions": contents(as_list(interventions))}
    tokens = {name: 1 for r in readings if r.positions is None for name in _names(r) if "T" in r.site.axes}
    fn = partial(_captured, readings=readings, interventions=interventions)
    return _run(found, given, fn, directory, None, tokens, chunk_size, job, progress)


def sum_dataset(
    model: ModelLike,
    dataset: DatasetLike,
    fn: Function,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | bool | None = None,
) -> Any:
    """The sum over all rows of what a function gives of each, kept on the devices until a chunk is done. Host function.

    Under `jax.distributed`, as in `map_dataset`, every host sums its own chunks and has the sum of all.

    Args:
        fn: as in `map_dataset`; sums over tokens it makes itself, with `batch.mask`.
        model, dataset, tokenizer, progress: as in `map_dataset`.

    Returns:
        What `fn` gives without its axis of rows: NumPy arrays, float64.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> def stream(model, batch):
        ...     spec = CaptureSpec("resid_post", [2], [-1])
        ...     run = jax.vmap(lambda ids, mask: forward(model, ids, mask=mask, capture=spec)["resid_post"][0, 0])
        ...     return run(batch.tokens, batch.mask), np.ones(len(batch.rows))
        >>> total, n = data.sum_dataset(model, ["Rome", text], stream, tokenizer=tokenizer)
        >>> (total / n).shape, n
        ((192,), array(2.))
    """
    given, found = _given(dataset, tokenizer), find_model(model)
    check_progress(progress)
    if under_trace(model):
        raise TypeError("sum_dataset runs on the host and was called inside a trace (jit, vmap, grad).")
    total: Any = None
    begins = range(0, len(given), ROWS_OF_A_CHUNK)
    shared = 1 < jax.process_count() <= len(begins)  # else each host does all
    with told("sum_dataset", progress, len(given)) as advance:
        for begin in begins[jax.process_index() :: jax.process_count()] if shared else begins:
            rows = given.rows(range(begin, min(begin + ROWS_OF_A_CHUNK, len(given))))
            own: Any = None
            for batch, _ in batches_of(given, rows, begin, _at_once(found)):
                out = fn(model, batch)
                _check_rows(out, len(batch.rows))
                own = _add(own, out, batch.weights)
            own = jax.tree.map(lambda x: np.asarray(x, np.float64), own)
            total = own if total is None else jax.tree.map(np.add, total, own)
            advance(len(rows))
    return jax.tree.map(_of_all_hosts, total) if shared else total


def _of_all_hosts(own: np.ndarray) -> np.ndarray:
    """The sum over hosts, whose float64 travels as what JAX keeps."""
    halves = np.stack([own.astype(np.float32), (own - own.astype(np.float32)).astype(np.float32)])
    return multihost_utils.process_allgather(halves).astype(np.float64).sum(axis=(0, 1))


@jax.jit
def _add(total: Any, values: Any, weights: Array) -> Any:
    """Values `[B, …]` of the rows that count, added up."""

    def of(x: Array) -> Array:
        x = x.astype(wide(x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
        counts = weights.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.sum(jnp.where(counts > 0, x, jnp.zeros((), x.dtype)), axis=0)

    found = jax.tree.map(of, jax.tree.map(jnp.asarray, values))
    return found if total is None else jax.tree.map(jnp.add, total, found)


def _given(dataset: DatasetLike, tokenizer: Tokenizer | None) -> Dataset:
    if isinstance(dataset, Dataset):
        if tokenizer is not None:
            raise ValueError("A Dataset has its own tokenizer, and another was given: Dataset(rows, tokenizer).")
        return dataset
    return Dataset(dataset, tokenizer)


def _at_once(model: Model) -> int:
    """How many tokens run together: by the platform, and not by what is free, so that the same programs run anywhere."""
    return TOKENS_AT_ONCE.get(programs_of(model).room(model)[0], TOKENS_AT_ONCE_ELSEWHERE)


def _run(
    model: ModelLike, dataset: DatasetLike, fn: Function, directory: str | os.PathLike[str], tokenizer: Tokenizer | None,
    tokens: dict[str, int], chunk_size: int, job: dict[str, Any], progress: Any,
) -> Store:  # fmt: skip
    """The chunks that are not there yet."""
    given, found, path = _given(dataset, tokenizer), find_model(model), Path(directory).expanduser()
    if under_trace(model):
        raise TypeError("A data set is run on the host, and this was called inside a trace (jit, vmap, grad).")
    check_progress(progress)
    chunk_size = integer(chunk_size, "chunk_size", 1)
    at_once = _at_once(found)
    claim(path, {
        **job, "format": FORMAT, "version": __version__, "model": describe(found), "data": given.fingerprint(),
        "columns": list(given.columns), "n_rows": len(given), "chunk_size": chunk_size, "tokens_at_once": at_once,
    })  # fmt: skip
    n_chunks = -(-len(given) // chunk_size)
    own = range(jax.process_index(), n_chunks, jax.process_count())
    with told(path.name, progress, len(given)) as advance, until_asked(f"The job of {str(path)!r}") as ask:
        for number in own:
            numbers = range(number * chunk_size, min((number + 1) * chunk_size, len(given)))
            if not _is_there(path, number):
                arrays, by_token = _chunk(found, given, fn, tokens, numbers, at_once)
                try:
                    write_chunk(file_of(path, number), arrays, by_token)
                except OSError as error:
                    done = sum(file_of(path, n).exists() for n in range(n_chunks))
                    raise type(error)(
                        f"{error} {done} of {n_chunks} chunks are there; the same call does the rest."
                    ) from error
            advance(len(numbers))
            ask()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"oculi_jax {path.name}")
    return Store.open(path)


def _is_there(directory: Path, number: int) -> bool:
    """Whether a chunk is written and whole; one that is damaged is said to be done again."""
    try:
        Chunk.open(file_of(directory, number)).check()
    except FileNotFoundError:
        return False
    except ValueError as error:
        warnings.warn(f"{error} It is done again.", stacklevel=4)
        return False
    return True


def _chunk(
    model: Model, dataset: Dataset, fn: Function, tokens: dict[str, int], numbers: range, at_once: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a chunk's file holds: name → array that leads with its rows, or with their tokens; and the names of the latter."""
    rows = dataset.rows(numbers)
    found: dict[str, list[Any]] = {}
    lengths = np.array([len(row[dataset.column]) for row in rows])
    waiting: tuple[Any, Batch, np.ndarray] | None = None
    for batch, places in batches_of(dataset, rows, numbers.start, at_once):
        out = fn(model, batch)
        if waiting is not None:
            _take(found, *waiting, tokens, len(rows))  # while the next one runs
        waiting = out, batch, places
    assert waiting is not None
    _take(found, *waiting, tokens, len(rows))
    if unknown := sorted(set(tokens) - set(found)):
        raise ValueError(f"tokens names {unknown[0]!r}, and fn gives {', '.join(sorted(found))}.")
    arrays = {name: np.concatenate(of) if name in tokens else np.stack(of) for name, of in found.items()}
    arrays[IDS] = np.concatenate([row[dataset.column] for row in rows])
    arrays[OFFSETS] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return arrays, [IDS, *tokens]


def _take(
    found: dict[str, list[Any]], out: Any, batch: Batch, places: np.ndarray, tokens: Mapping[str, int], n_rows: int
) -> None:
    """Sorts what a batch gave into its rows' places."""
    _check_rows(out, len(batch.rows))
    for path, leaf in jax.tree_util.tree_leaves_with_path(out):
        name = _name(path)
        if name in (IDS, OFFSETS):
            raise ValueError(f"fn gives {name!r}, a name that a store has for itself; give it another.")
        values, axis = np.asarray(leaf), tokens.get(name)
        if axis is not None and not (0 < axis < values.ndim and values.shape[axis] == batch.tokens.shape[1]):
            raise ValueError(
                f"fn gives {name!r} of shape {listing(values.shape)}, and by `tokens` axis {axis} of it has an entry for each of "
                f"{batch.tokens.shape[1]} tokens."
            )
        into = found.setdefault(name, [None] * n_rows)
        for row, place in enumerate(places):
            value = values[row]
            into[place] = value if axis is None else np.moveaxis(value, axis - 1, 0)[np.asarray(batch.mask[row])]


def _check_rows(out: Any, n_rows: int) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(out)
    if not leaves:
        raise ValueError("fn gives no array.")
    for path, leaf in leaves:
        if not np.ndim(leaf) or leaf.shape[0] != n_rows:
            raise ValueError(
                f"fn gives {_name(path)!r} of shape {listing(np.shape(leaf))}, and it must lead with the {n_rows} rows of the "
                "batch."
            )


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "values"


def _names(reading: Reading) -> list[str]:
    return [f"{reading.site.name}.{layer}" for layer in reading.layers] or [reading.site.name]


def _captured(
    model: Any, batch: Batch, *, readings: tuple[Reading, ...], interventions: Interventions
) -> dict[str, Array]:
    """Each row's sites, layer by layer; tokens first, where they are not at some positions."""
    ids, mask, _ = check_prompts(model.config, batch.tokens, batch.mask)
    mesh = getattr(model.device, "mesh", None)  # prompts over `data`, where a model is on several devices
    if mesh is not None and len(ids) % mesh.shape.get("data", 1) == 0:
        ids, mask = jax.device_put((ids, mask), NamedSharding(mesh, PartitionSpec("data")))
    frames = [Frame(model.config, model.dtype, ids.shape[1], np.asarray(row)) for row in batch.mask]
    seen = programs_of(model).run_variants(model, ids, mask, Rows.of(interventions, frames)[0], readings=readings)
    return _by_layer(dict(seen.activations), readings)


@partial(jax.jit, static_argnums=1)
def _by_layer(found: dict[str, Array], readings: tuple[Reading, ...]) -> dict[str, Array]:
    parts = {}
    for reading in readings:
        value = found[reading.site.name][:, 0]
        axis = reading.site.axes.index("T") if reading.positions is None and "T" in reading.site.axes else 0
        each = [value[:, i] for i in range(len(reading.layers))] if reading.site.layered else [value]
        parts |= {name: jnp.moveaxis(x, 1 + axis, 1) for name, x in zip(_names(reading), each, strict=True)}
    return parts
