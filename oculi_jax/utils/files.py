"""Tensors in files: a half-written one never exists under its own name, and what cannot be read is said in a sentence."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there is renamed to `path` on success and deleted on failure."""
    path = Path(os.path.realpath(Path(path).expanduser()))  # a link stays one, and what it names is replaced
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write {str(path)!r}: it is a directory.")
    with write_together(path.parent, path.name) as (aside,):
        yield aside


@contextmanager
def write_together(directory: Path, first: str, *others: str) -> Iterator[list[Path]]:
    """The same for several files of one directory, which are renamed in the order in which they are named.

    They are written in a folder of their own, `.NAME.HOST.PROCESS.….part`, which is called `….commit` while they are renamed:
    one that is left says that the directory is neither the old nor the new, and `cut_off` finds it. What others left under the
    same first name is removed here, such a folder when our own first file is there, and ours says the same or all is well.
    """
    names = (first, *others)
    directory = Path(os.path.realpath(Path(directory).expanduser()))
    if not directory.is_dir():
        raise FileNotFoundError(f"Cannot write {str(directory / first)!r}: there is no directory {str(directory)!r}.")
    for name in names:
        if (directory / name).exists() and not (directory / name).is_file():
            raise OSError(f"Cannot write {str(directory / name)!r}: it is no regular file.")
    aside: Path | None = None
    try:
        _sweep(directory, first, "part")
        prefix = f".{first}.{_HOST}.{os.getpid()}."
        aside = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=directory))
        yield [aside / name for name in names]
        mask = os.umask(0)
        os.umask(mask)
        for name in names:
            old = directory / name
            os.chmod(aside / name, old.stat().st_mode & 0o777 if old.exists() else 0o666 & ~mask)
            with (aside / name).open("rb+") as file:
                os.fsync(file.fileno())
        if others:
            aside = aside.rename(aside.with_suffix(".commit"))
        for name in names:
            os.replace(aside / name, directory / name)
            _sweep(directory, first, "commit", aside)
    except OSError as error:
        own = error.filename is None or aside is None or str(error.filename).startswith(str(aside))
        if not own or error.errno is None:
            raise
        what = " and ".join(names) if others else str(directory / first)
        where = f" in {str(directory)!r}" if others else ""
        raise type(error)(f"Cannot write {what!r}{where}: {os.strerror(error.errno)}.") from error
    finally:
        if aside is not None and not _tells_of_a_mixture(aside):
            shutil.rmtree(aside, ignore_errors=True)


def cut_off(directory: Path) -> bool:
    """Whether a process that writes several files of a directory was stopped, or is, between the first and the last of them."""
    return any(map(_tells_of_a_mixture, directory.glob(".*.commit")))


def _tells_of_a_mixture(folder: Path) -> bool:
    """Whether some of a folder's files were renamed and some were not: the first one goes first."""
    try:
        left = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return False  # its writer has just finished
    renaming = folder.suffix == ".commit"
    return renaming and bool(left) and not any(folder.name.startswith(f".{name}.") for name in left)


def _sweep(directory: Path, name: str, kind: str, own: Path | None = None) -> None:
    """Removes what dead processes left of a file of this name; what a living one has stays, and so does our own.

    Folders of other machines count as left once they are a minute old where they are called `.commit`, since renaming takes none.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.(\w+)\.(\d+)\.\w+\.{kind}")
    for found in directory.iterdir():
        match = pattern.fullmatch(found.name)
        if match is None or found == own:
            continue
        here, process = match[1] == _HOST, int(match[2])
        old = kind == "commit" and _age(found) > 60
        if old or (here and (not _is_alive(process) or (kind == "commit" and process == os.getpid()))):
            shutil.rmtree(found, ignore_errors=True)


def _age(path: Path) -> float:
    """Seconds since anything changed in a folder; 0 where it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # elsewhere to ask a process may end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_HOST = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


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
