"""`enable_compilation_cache`: a second process compiles nothing, and where programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from oculi_jax.utils import cache, enable_compilation_cache

PROGRAM = """
import sys
import jax
from oculi_jax.utils import enable_compilation_cache

seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
jax.jit(lambda x: x - 1)(1.0)  # too early to be kept
enable_compilation_cache(sys.argv[1])
jax.jit(lambda x: x + 1)(1.0)
print(seen.count("cache_hits"), seen.count("cache_misses"))
"""


def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def hits_and_misses() -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "kept")], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        return list(map(int, done.stdout.split()))

    (hits, misses), (later, none) = hits_and_misses(), hits_and_misses()
    assert hits == none == 0 and misses == later > 0


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """What would be set, of a user who has a home and nothing else."""
    found: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("system", "name", "place"),
    [
        ("linux", None, ".cache"),
        ("linux", "XDG_CACHE_HOME", "given"),
        ("darwin", None, "Library/Caches"),
        ("win32", "LOCALAPPDATA", "given"),
    ],
)
def test_the_users_own_directory(
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    system: str,
    name: str | None,
    place: str,
) -> None:
    monkeypatch.setattr(cache.sys, "platform", system)
    if name is not None:
        monkeypatch.setenv(name, str(tmp_path / "given"))
    found = enable_compilation_cache()
    assert found == tmp_path / place / "oculi_jax" / "xla" and found.is_dir() and not list(found.iterdir())
    assert settings["jax_compilation_cache_dir"] == str(found)
    assert settings["jax_persistent_cache_min_compile_time_secs"] == 0.0


@pytest.mark.quick
def test_where_nothing_can_be_written_is_said(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be kept in '.*file.within'.*Give a directory that can be written"):
        enable_compilation_cache(tmp_path / "file" / "within")
    with pytest.raises(OSError, match=r"cannot be kept in '.*file'"):
        enable_compilation_cache(tmp_path / "file")
    with pytest.raises(ValueError, match="on this machine is needed"):
        enable_compilation_cache("gs://bucket/programs")
    assert not settings
