"""The memory of a test process: so much that two of them fit into a laptop of 8 GB."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import jax

try:
    import resource
except ImportError:  # Windows
    resource = None

# What a process may hold before it lets go of its programs: of memory, and of memory maps, of which Linux gives a process
# 65,530, beyond which XLA's compiler crashes.
MOST_MEMORY, MOST_MAPS = 2.2, 30_000
# What programs have in any case, in GB, where real models alone are about as much: without programs every test makes its own anew.
ROOM = 0.4
stays = 0.0  # what a process held after it had last let go
PROCESS = Path("/proc/self")


def trim() -> None:
    """What nobody holds any more, which glibc keeps until it is told; most of it is left behind by compiling."""
    gc.collect()
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


def let_go() -> None:
    """Compiled programs, and what compiling left behind."""
    global stays
    jax.clear_caches()
    trim()
    stays = held()


def held() -> float:
    """What this process holds now, in GB; 0 where the system does not say."""
    if not PROCESS.exists() or resource is None:
        return 0.0
    return int((PROCESS / "statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def is_full() -> bool:
    """Whether this process holds too much; elsewhere than on Linux, letting go between files has to do."""
    if not PROCESS.exists() or resource is None:
        return False
    return held() > max(MOST_MEMORY, stays + ROOM) or (PROCESS / "maps").read_bytes().count(b"\n") > MOST_MAPS


def most_held() -> float | None:
    """The most that this process ever held, in GB. macOS counts bytes, Linux kilobytes."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
