"""`map_dataset` and `capture_dataset`: a whole data set, chunk by chunk, kept in files, interrupted and gone on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ..arrays import listing
from ..backends import find_model, programs_of
from ..capture import Reading, readings_of
from ..intervention.frame import Frame
from ..intervention.protocol import as_list
from ..intervention.rows import Rows
from ..prompts import check_prompts
from .batches import Batch
from .record import contents, named
from .running import ROWS_OF_A_CHUNK, Function, Job, check_host, set_of
from .store import Store

if TYPE_CHECKING:
    from ..backends.protocol import ModelLike
    from ..capture import CaptureLike
    from ..intervention.protocol import Interventions
    from ..sweeps.running import Progress
    from ..utils.tokens import Tokenizer
    from .dataset import DatasetLike


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
    after the chunk at hand. Under `jax.distributed`, where every host calls the same lines, host i of n does every n-th chunk, from
    the i-th; where the model's mesh is of several hosts, they run every chunk together and host i writes it.

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
    return mapped(
        model, dataset, fn, directory, tokenizer=tokenizer, tokens=tokens, chunk_size=chunk_size, about=about
    ).run(progress)


def mapped(
    model: ModelLike,
    dataset: DatasetLike,
    fn: Function,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    tokens: Mapping[str, int] | None = None,
    chunk_size: int = ROWS_OF_A_CHUNK,
    about: Mapping[str, Any] | None = None,
) -> Job:
    """What `map_dataset` will do."""
    if not callable(fn):
        raise TypeError(f"fn is {fn!r}, and a function of a model and a Batch is needed.")
    check_host(model, "map_dataset")
    what = {"function": named(fn), "tokens": dict(tokens or {}), "about": dict(about or {})}
    return Job.of(find_model(model), set_of(dataset, tokenizer), fn, directory, dict(tokens or {}), chunk_size, what)


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
    return captured(
        model, dataset, capture, directory, interventions=interventions, tokenizer=tokenizer, chunk_size=chunk_size
    ).run(progress)


def captured(
    model: ModelLike,
    dataset: DatasetLike,
    capture: CaptureLike,
    directory: str | os.PathLike[str],
    *,
    interventions: Interventions = (),
    tokenizer: Tokenizer | None = None,
    chunk_size: int = ROWS_OF_A_CHUNK,
) -> Job:
    """What `capture_dataset` will do."""
    check_host(model, "capture_dataset")
    found, given = find_model(model), set_of(dataset, tokenizer)
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
    what = {"capture": asked, "interventions": contents(as_list(interventions))}
    tokens = {name: 1 for r in readings if r.positions is None for name in _names(r) if "T" in r.site.axes}
    fn = partial(_captured, readings=readings, interventions=interventions)
    return Job.of(found, given, fn, directory, tokens, chunk_size, what)


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
