"""Tensors in files: a half-written one never exists under its own name, and what cannot be read is said in a sentence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` on success and deletes it on failure."""
    path = Path(os.path.realpath(Path(path).expanduser()))  # a link stays one, and what it names is replaced
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {str(path)!r}: there is no directory {str(path.parent)!r}.")
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a directory.")
    if path.exists() and not path.is_file():
        raise OSError(f"Cannot write {str(path)!r}: it is no regular file.")
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], *, name: Path) -> None:
    """Writes NumPy arrays as safetensors to `path`; what goes wrong is told as an OSError or ValueError of `name`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"Could not write {str(name)!r}: {error}") from error
    except (KeyError, AttributeError) as error:
        raise ValueError(f"Could not write {str(name)!r}: safetensors has no such dtype: {error}.") from error


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The NumPy arrays and the metadata of a whole safetensors file; OSError where there is none, ValueError for any other."""
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no file.")
    try:
        with safe_open(path, framework="numpy") as handle:
            names = list(handle.keys())
            return {name: handle.get_tensor(name) for name in names}, handle.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except (
        SafetensorError,
        OSError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # NumPy lacks some dtypes of theirs
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
