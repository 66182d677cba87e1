"""Compiled programs on disk: `enable_compilation_cache`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import jax


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Keeps compiled programs on disk from now on, so that the first calls of later processes compile nothing.

    It is JAX's own cache, and holds programs of your own too; nothing in it is ever deleted. Call it before anything is compiled:
    JAX stays with the first directory that a process uses. Off by default, but for the command line.

    Args:
        directory: where; it is made. For None where JAX keeps them already (`JAX_COMPILATION_CACHE_DIR`), else `oculi_jax/xla` in
            the user's directory for such things: `XDG_CACHE_HOME` or `~/.cache`, on a Mac `~/Library/Caches`, on Windows
            `LOCALAPPDATA`.

    Returns:
        The directory.

    Raises:
        OSError: nothing can be written there.

    Examples:
        >>> enable_compilation_cache("programs").name
        'programs'
    """
    given = jax.config.jax_compilation_cache_dir if directory is None else directory  # type: ignore[attr-defined]
    if "://" in os.fspath(given or ""):
        raise ValueError(
            f"directory is {given!r}, and one on this machine is needed; for others see JAX's documentation."
        )
    path = Path(os.path.abspath(Path(given).expanduser() if given else _of_user() / "oculi_jax" / "xla"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise type(error)(
            f"Programs cannot be kept in {str(path)!r}: {reason}. Give a directory that can be written."
        ) from error
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX itself leaves out what was compiled within a second, of which a session has hundreds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return path


def _of_user() -> Path:
    """The user's directory for what can be made again."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"])
    return Path.home() / ".cache"
