"""Writing files so that a half-written one never exists under its own name."""

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
