"""One file for each chunk of a data set's rows: how it is written, and how it is read without reading it whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ..utils.files import write_aside, write_tensors

OFFSETS, IDS = "offsets", "ids"  # of every chunk: where each row's tokens begin, and which they are
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # as safetensors has it


def file_of(directory: Path, number: int) -> Path:
    return directory / f"part-{number:06}.safetensors"


def write_chunk(path: Path, tensors: Mapping[str, np.ndarray], by_token: Sequence[str]) -> None:
    """Writes arrays `[rows, …]`, and those `by_token` `[tokens, …]`; the same bytes for the same values."""
    sums = {name: zlib.crc32(_bytes(array)) for name, array in sorted(tensors.items())}
    # One text: safetensors writes several in an order that is drawn anew.
    about = json.dumps({"by_token": sorted(by_token), "sums": sums}, sort_keys=True)
    with write_aside(path) as aside:
        write_tensors(aside, tensors, {"about": about}, name=path)


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk's file, of which only the head was read.

    Attributes:
        places: name → dtype, shape, and where its bytes begin.
        by_token: names of what leads with tokens; the others lead with rows.
        sums: name → checksum of the bytes.
    """

    path: Path
    places: Mapping[str, tuple[np.dtype, tuple[int, ...], int]]
    by_token: tuple[str, ...]
    sums: Mapping[str, int]

    @classmethod
    def open(cls, path: Path) -> Chunk:
        """FileNotFoundError where there is no such file; ValueError where it is not whole."""
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                    raise ValueError("its head is missing")
                header = json.loads(file.read(length))
            about = json.loads(header.pop("__metadata__")["about"])
            places = {}
            for name, item in header.items():
                dtype, shape = np.dtype(_DTYPES[item["dtype"]]), tuple(map(int, item["shape"]))
                begin, end = item["data_offsets"]
                if end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)) or min((*shape, begin)) < 0:
                    raise ValueError(f"{name} does not fit its shape")
                places[name] = dtype, shape, 8 + length + begin
            if max(item["data_offsets"][1] for item in header.values()) != size - 8 - length:
                raise ValueError("it was cut off")
            return cls(path, places, tuple(about["by_token"]), dict(about["sums"]))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not a whole chunk: {error}.") from None

    def array(self, name: str) -> np.ndarray:
        """An array, memory-mapped."""
        dtype, shape, begin = self.places[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, mode="r", offset=begin, shape=shape)

    def check(self) -> None:
        """ValueError where a byte of it is not what was written."""
        for name in self.places:
            if zlib.crc32(_bytes(self.array(name))) != self.sums.get(name):
                raise ValueError(f"{str(self.path)!r} is damaged: {name} is not what was written.")


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
