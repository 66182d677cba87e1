"""The contract in JAX: `layout` says where tokens stand, `layers` runs them, the rest are short programs over these two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...utils.devices import memory
from .decode import decode_rows
from .programs import lens, run
from .variants import run_base, run_variants

if TYPE_CHECKING:
    from ...models.llama.model import Llama

__all__ = ["compiles_per_length", "decode_rows", "lens", "room", "run", "run_base", "run_variants", "traceable"]

compiles_per_length = True
traceable = True


def room(model: Llama) -> tuple[str, int]:
    """The platform that a model runs on, and how many bytes are free there; 4 GiB where its driver does not say."""
    device = next(iter(model.embed[...].devices()))
    free = memory(device)[1]
    return device.platform, 4 << 30 if free is None else free
