"""What `torch.save` writes, where it is dicts, lists, numbers, texts and tensors: read and written without torch.

Such a file is a zip archive of a pickle and of each tensor's bytes. A pickle can call anything that it names; here the few names
that tensors need are looked up in a table, and any other is refused, so that a stranger's file is parsed and nothing in it runs.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(bool),
}  # fmt: skip
# What makes objects in other ways than by a name that is looked up, or changes one that is there.
_REFUSED = {"BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_ROOT = "archive"


def read_torch(path: Path) -> Any:
    """What a file holds, its tensors as NumPy arrays.

    Raises:
        OSError: there is no such file. ValueError: it is none of `torch.save`, or holds what is no plain value or tensor.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory, and a file is needed.")
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            code = archive.read(pickled)
            if odd := {op.name for op, _, _ in pickletools.genops(code)} & _REFUSED:
                raise ValueError(f"it has {', '.join(sorted(odd))}, which no plain tensor needs")
            return _Reader(io.BytesIO(code), archive, f"{root}data/").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail anywhere
        raise ValueError(
            f"{str(path)!r} is no whole file of plain tensors that torch.save wrote: {type(error).__name__}: {error}."
        ) from None


class _Reader(pickle.Unpickler):
    """Knows the names that tensors need, and no others."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, data: str):
        super().__init__(file)
        self.archive, self.data = archive, data

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {("collections", "OrderedDict"): dict, ("torch._utils", "_rebuild_tensor_v2"): _tensor}
        if (module, name) not in known:
            raise ValueError(f"it asks for {module}.{name}, which no plain tensor needs")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self.archive.read(f"{self.data}{key}"), dtype)


def _tensor(storage: np.ndarray, offset: int, shape: Any, strides: Any, *_: object) -> np.ndarray:
    """A view of a storage, of which NumPy checks that it lies within."""
    size = storage.dtype.itemsize
    return np.ndarray(tuple(shape), storage.dtype, storage, offset * size, tuple(step * size for step in strides))


def write_torch(file: BinaryIO, values: Mapping[Any, Any]) -> None:
    """Writes dicts, lists, numbers, texts and NumPy arrays as `torch.save` does: `torch.load(…, weights_only=True)` reads them."""
    arrays: list[np.ndarray] = []
    pickled = b"\x80\x02" + _pickled(values, arrays) + b"."
    with zipfile.ZipFile(file, "w") as archive:
        parts = {
            "data.pkl": pickled,
            "byteorder": b"little",
            **{f"data/{i}": x for i, x in enumerate(arrays)},
            "version": b"3\n",
        }
        for name, part in parts.items():
            archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), part if isinstance(part, bytes) else part.tobytes())


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The opcodes of a value, in protocol 2; its arrays are appended to those that are written beside it."""
    if isinstance(value, np.ndarray):
        return _pickled_tensor(value, arrays)
    if isinstance(value, Mapping):
        items = b"".join(_pickled(x, arrays) for item in value.items() for x in item)
        return b"}(" + items + b"u"
    return pickle.dumps(value, 2)[2:-1]


def _pickled_tensor(value: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    names = {dtype: name for name, dtype in _STORAGES.items()}
    strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(value.ndim))
    key, plain = str(len(arrays)), lambda x: pickle.dumps(x, 2)[2:-1]
    arrays.append(np.ascontiguousarray(value))
    storage = (
        plain("storage") + f"ctorch\n{names[value.dtype]}\n".encode() + plain(key) + plain("cpu") + plain(value.size)
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + plain(0) + plain(value.shape) + plain(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
