"""What a test process lets go of."""

from __future__ import annotations

import pytest

from . import memory


@pytest.mark.quick
def test_what_stays_does_not_fill_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would let go after every test, of what the next one needs."""
    monkeypatch.setattr(memory, "MOST_MEMORY", 0.0)
    monkeypatch.setattr(memory, "MOST_MAPS", 10**6)
    memory.let_go()
    assert not memory.is_full()
    monkeypatch.setattr(memory, "stays", memory.held() - 2 * memory.ROOM)
    assert memory.is_full() == (memory.held() > 0)
