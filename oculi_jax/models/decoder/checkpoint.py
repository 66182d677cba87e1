"""Checkpoints in Hugging Face's layout: find the files, check every tensor before anything is allocated, load, save."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open

from ...arrays import full_name
from ...utils.devices import find_device
from ...utils.files import cut_off, write_tensors, write_together
from ...utils.progress import progress
from .config import CONFIG, GENERATION, DecoderConfig
from .parameters import Parameter, parameter_table

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from ...utils.devices import DeviceLike
    from .model import Decoder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# safetensors' names for the dtypes that a model's weights may have.
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Buffers that old versions of transformers wrote and that follow from the config.
_DERIVED = ".rotary_emb.inv_freq"
_CHUNK_BYTES = 64 << 20
# Of a model that sees pictures too: where its text part is → where that would be alone; and what else it has.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_SIGHT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Stored:
    """A tensor as a file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike,
    place: Callable[[Parameter], jax.sharding.Sharding] | None,
    revision: str | None,
    local_files_only: bool,
    ignore_fields: tuple[str, ...],
    family: str | None = None,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The config of a checkpoint and its parameters by their names in the table: JAX arrays placed as `place` says, or, for
    None, NumPy arrays. The other arguments are those of `from_pretrained`.
    """
    directory = _find(source, revision, local_files_only)
    if cut_off(directory):
        raise ValueError(
            f"{str(directory)!r} is neither the old checkpoint nor the new one: a process that was saving to it was cut off, or "
            "is at it now. Save to it again."
        )
    before = _versions(directory)
    config = DecoderConfig.from_pretrained(directory, ignore_fields=ignore_fields)
    if family not in (None, config.model_type):
        raise ValueError(
            f"{str(directory)!r} holds a model of type {config.model_type!r}, and one of type {family!r} is asked for: "
            "oculi_jax.from_pretrained loads every family that there is."
        )
    table = parameter_table(config)
    stored = _of_text(directory, _read_headers(directory))
    if config.tie_word_embeddings and EMBEDDING not in stored and HEAD in stored:
        # One tensor under two names, of which safetensors' save_model keeps this one.
        stored[EMBEDDING] = stored.pop(HEAD)
    _check(directory, config, table, stored)
    target = _target_dtype(dtype, config, stored, table)

    params: dict[str, Any] = {}
    total = sum(int(np.prod(row.shape)) * target.itemsize for row in table)
    with progress(f"Loading {directory.name}", total, in_bytes=True) as advance:
        # The largest first: while a parameter is copied to its device it exists twice.
        for row in sorted(table, key=lambda row: -int(np.prod(row.shape))):
            if place is None:
                whole = tuple(slice(None) for _ in row.shape)
                params[row.name] = _read(row, whole, stored, target, advance)
                continue
            there: dict[str, np.ndarray] = {}  # slices that several devices have are read once

            def read(index: Any, row: Parameter = row, there: dict[str, np.ndarray] = there) -> np.ndarray:
                if str(index) not in there:
                    there[str(index)] = _read(row, index, stored, target, advance)
                return there[str(index)]

            params[row.name] = jax.make_array_from_callback(row.shape, place(row), read)
            params[row.name].block_until_ready()
    if _versions(directory) != before:
        raise ValueError(f"{str(directory)!r} was saved to while it was read: load it again.")
    return dataclasses.replace(config, dtype=target.name), params


def _versions(directory: Path) -> dict[str, tuple[int, int]]:
    """Which files a checkpoint is made of now."""
    files = [path for path in directory.iterdir() if path.suffix in (".json", ".safetensors") and path.is_file()]
    return {path.name: (stat.st_ino, stat.st_mtime_ns) for path in files for stat in [path.stat()]}


def save(model: Decoder, directory: str | os.PathLike[str]) -> None:
    """See `Llama.save_pretrained`."""
    directory = Path(directory).expanduser()
    if (directory / INDEX).exists():
        raise ValueError(f"{directory} holds a sharded checkpoint; save to a directory without {INDEX}.")
    fresh = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    arrays = named_parameters(model)
    found: dict[str, list[np.ndarray]] = {}
    for row in parameter_table(model.config):
        array = np.asarray(arrays[row.name])
        parts = array if row.stacked else array[None]
        for name, part in zip(row.tensors(), parts, strict=True):
            found.setdefault(name, []).append(np.asarray(part, order="C").reshape(row.stored))
    tensors = {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in found.items()}
    config = dataclasses.replace(model.config, dtype=model.dtype.name)
    texts = {CONFIG: config.to_dict(), GENERATION: config.generation_dict()}
    try:
        with write_together(directory, SINGLE, *texts) as (weights, *others):
            write_tensors(weights, tensors, {"format": "pt"}, name=directory / SINGLE)
            for path, values in zip(others, texts.values(), strict=True):
                path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except BaseException:
        if fresh and not any(directory.iterdir()):
            directory.rmdir()
        raise


def named_parameters(model: Decoder) -> dict[str, Array]:
    """The parameters of a model under the names of the table."""
    named: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = ".".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
        named[name.removesuffix(".value").replace(".act_params.", ".act_fn.")] = leaf
    return named


def placement(
    device: DeviceLike | None, mesh: jax.sharding.Mesh | None
) -> Callable[[Parameter], jax.sharding.Sharding]:
    """Where each parameter goes: onto a device (None: the default one), or over a mesh."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(find_device(device))
        return lambda row: single
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}; give a jax.sharding.Mesh, as jax.make_mesh makes.")
    if device is not None:
        raise ValueError("Give either device or mesh: a mesh already says which devices are used.")
    if set(mesh.axis_names) != {"data", "model"}:
        raise ValueError(f"The mesh has axes {mesh.axis_names}, and must have 'data' and 'model'.")
    if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"The mesh's axes are {tuple(str(kind) for kind in mesh.axis_types)}, and must be Auto: with explicit axes JAX "
            "asks for a sharding at every gather and contraction. Make it with jax.make_mesh(shape, ('data', 'model'), "
            "axis_types=(jax.sharding.AxisType.Auto,) * 2)."
        )
    size, whole = mesh.shape["model"], mesh
    return lambda row: jax.sharding.NamedSharding(whole, jax.sharding.PartitionSpec(*row.split(size)))


def _find(source: str | os.PathLike[str], revision: str | None, local_files_only: bool) -> Path:
    """The directory that holds the checkpoint, downloaded where `source` is an id on the Hub."""
    try:
        path = Path(source).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"There is no directory {os.fspath(source)!r}.") from None
    if path.is_dir():
        return path
    text = os.fspath(source)
    if path.is_file():
        raise NotADirectoryError(f"{text!r} is a file; give the directory that holds config.json and the weights.")
    parts = text.split("/")
    if len(parts) != 2 or not all(parts) or text[0] in "./~" or path.is_absolute():
        raise FileNotFoundError(f"There is no directory {text!r}, and it has not the form 'owner/name' of a Hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                text,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"],
                ignore_patterns=["original/*"],
            )
        )
    except Exception as error:  # the Hub's errors have many types; ours is one, with the reason kept
        where = "in the local cache" if local_files_only else "on the Hugging Face Hub, nor a directory here"
        raise OSError(f"Could not find {text!r} {where}: {str(error).splitlines()[0]}") from error


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, closed after use so that its pages leave memory; failures name the file."""
    try:
        with safe_open(file, framework="numpy") as handle:
            yield handle
    except FileNotFoundError:
        raise FileNotFoundError(f"The weights file {str(file)!r} is missing.") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise OSError(f"The weights file {str(file)!r} cannot be read: {error}") from None


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor that the checkpoint's files hold. Reads headers alone."""
    index = directory / INDEX
    if (directory / SINGLE).exists():
        files = {SINGLE: None}
    elif index.exists():
        files = _read_index(index)
    else:
        raise FileNotFoundError(
            f"There are no weights in {str(directory)!r}: neither {SINGLE} nor {INDEX}. "
            "Other formats (.bin, .pth, .gguf) are not read; convert them to safetensors first."
        )
    missing = [name for name in files if not (directory / name).exists()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are missing: {', '.join(sorted(missing))}.")
    stored: dict[str, Stored] = {}
    for name, expected in files.items():
        file = directory / name
        with _opened(file) as handle:
            for tensor in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(tensor)
                if tensor in stored:
                    raise ValueError(f"{tensor} is in two files, {stored[tensor].file.name} and {name}: one is wrong.")
                stored[tensor] = Stored(file, tuple(part.get_shape()), part.get_dtype(), tensor)
            absent = sorted((expected or set()) - set(handle.keys()))
        if absent:
            raise ValueError(f"{index} places {', '.join(absent[:5])} in {name}, which does not hold it.")
    return stored


def _of_text(directory: Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """Of a model that sees pictures too, the tensors of its text part under the names that they would have alone."""
    places = {name: next((part for part in _TEXT if name.startswith(part)), None) for name in stored}
    if not any(places.values()):
        return stored
    left = [name for name in stored if name.startswith(_SIGHT)]
    if left:
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in left})
        warnings.warn(
            f"{str(directory)!r} holds a model that sees pictures too: its text part is read, and {' and '.join(parts)} are left.",
            stacklevel=4,
        )
    kept = {name: part for name, part in places.items() if name not in left}
    return {_TEXT[part] + name.removeprefix(part) if part else name: stored[name] for name, part in kept.items()}


def _read_index(index: Path) -> dict[str, set[str]]:
    """Shard file → the tensors that the index places in it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(tensor), str(name)) for tensor, name in places.items()]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index with a 'weight_map' of tensors to files: {error!r}.") from None
    files: dict[str, set[str]] = {}
    for tensor, name in items:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(
                f"{index} places {tensor!r} in {name!r}; shards must be plain file names in its own directory."
            )
        files.setdefault(name, set()).add(tensor)
    return files


def _check(directory: Path, config: DecoderConfig, table: list[Parameter], stored: dict[str, Stored]) -> None:
    """Compares what the config needs with what the files hold, both ways; one error lists everything."""
    problems: list[str] = []
    numbers = [int(name.split(".")[2]) for name in stored if re.match(r"model\.layers\.\d{1,9}\.", name)]
    n_layers = max(numbers, default=-1) + 1
    if config.num_hidden_layers > 2 * n_layers + 10:
        raise ValueError(
            f"config.json in {str(directory)!r} says {config.num_hidden_layers} layers, and the weights hold {n_layers}."
        )
    expected = {tensor: row for row in table for tensor in row.tensors()}
    for tensor, row in expected.items():
        found = stored.get(tensor)
        if found is None:
            problems.append(f"missing: {tensor} {list(row.tensor_shape)}")
        elif found.shape != row.tensor_shape:
            problems.append(
                f"shape: {tensor} is {list(found.shape)} in {found.file.name}, config.json makes it {list(row.tensor_shape)}"
            )
        elif found.dtype not in _FLOATS:
            problems.append(
                f"dtype: {tensor} is {found.dtype} in {found.file.name}; only {', '.join(_FLOATS)} can be loaded"
            )
    for tensor, found in stored.items():
        if tensor in expected or tensor.endswith(_DERIVED):
            continue
        if tensor == HEAD and config.tie_word_embeddings:
            if not _same(found, stored.get(EMBEDDING)):
                problems.append("unexpected: lm_head.weight differs from the embedding that config.json ties it to")
            continue
        problems.append(f"unexpected: {tensor} {list(found.shape)} in {found.file.name}")
    if problems:
        if len(problems) > 60:
            problems[60:] = [f"… and {len(problems) - 60} more"]
        hint = ""
        if any(name.startswith("layers.") for name in stored):
            hint = " (These look like weights of a bare LlamaModel: names lack the 'model.' prefix.)"
        raise ValueError(
            f"The weights in {str(directory)!r} do not match its config.json{hint}:\n  " + "\n  ".join(problems)
        )


def _same(one: Stored, other: Stored | None) -> bool:
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    with _opened(one.file) as first, _opened(other.file) as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        step = max(1, _CHUNK_BYTES // max(1, 4 * one.shape[-1]))
        rows = [(i, min(i + step, one.shape[0])) for i in range(0, one.shape[0], step)]
        return all(np.array_equal(a[i:j], b[i:j]) for i, j in rows)


def _target_dtype(dtype: Any, config: DecoderConfig, stored: dict[str, Stored], table: list[Parameter]) -> np.dtype:
    given = dtype
    if isinstance(dtype, str) and dtype == "auto":
        dtype = config.dtype or _FLOATS[stored[table[0].tensors()[0]].dtype]
    try:
        # torch's print as torch.float16; torch itself may not be installed.
        target = jnp.dtype(str(dtype)[6:] if str(dtype).startswith("torch.") else full_name(dtype))
    except TypeError:
        target = None
    if target is None or target.name not in _FLOATS.values():
        what = "config.json's dtype" if isinstance(given, str) and given == "auto" else "dtype"
        raise ValueError(f"{what} is {dtype!r}; it can be 'auto', {', '.join(map(repr, _FLOATS.values()))}.")
    return target


def _read(
    row: Parameter,
    index: tuple[slice, ...],
    stored: dict[str, Stored],
    dtype: np.dtype,
    advance: Callable[[int], None],
) -> np.ndarray:
    """The slice `index` of a parameter, read from the files into one buffer of the final dtype."""
    bounds = [slice(*part.indices(size)) for part, size in zip(index, row.shape, strict=True)]
    out = _aligned_empty([part.stop - part.start for part in bounds], dtype)
    tensors = row.tensors()
    layers = range(bounds[0].start, bounds[0].stop) if row.stacked else (0,)
    inner = bounds[1:] if row.stacked else bounds
    for slot, layer in enumerate(layers):
        part = out[slot : slot + 1].reshape(out.shape[1:]) if row.stacked else out  # a view, of a scalar too
        _read_tensor(stored[tensors[layer]], row, inner, part)
        advance(part.nbytes)
    return out


def _read_tensor(found: Stored, row: Parameter, inner: list[slice], out: np.ndarray) -> None:
    """One tensor's slice into `out`, in chunks of rows of its first axis, each with the file opened anew."""
    name, file = found.name, found.file
    if not row.stored:
        with _opened(file) as handle:
            out[...] = handle.get_tensor(name)
        return
    bounds = row.stored_slices(inner)
    width = max(1, int(np.prod([part.stop - part.start for part in bounds[1:]], dtype=np.int64)))
    unit = row.stored[0] // (row.shape[1] if row.stacked else row.shape[0])  # rows of the file to one of ours
    step = max(1, _CHUNK_BYTES // (4 * width * unit)) * unit
    for start in range(bounds[0].start, bounds[0].stop, step):
        stop = min(start + step, bounds[0].stop)
        with _opened(file) as handle:
            rows = handle.get_slice(name)[(slice(start, stop), *bounds[1:])]
        first, last = (start - bounds[0].start) // unit, (stop - bounds[0].start) // unit
        part = out[first:last]
        with np.errstate(over="ignore"):
            np.copyto(part, rows.reshape(part.shape), casting="unsafe")
        if out.dtype == np.float16 and np.isinf(part).any() and not np.isinf(rows).any():
            raise ValueError(
                f"{name} in {file.name} holds values beyond float16's 65504; load it as bfloat16 or float32."
            )


def _aligned_empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary, which a CPU backend can adopt without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
