"""`Hosts`: which chunks are whose, where several processes of `jax.distributed` run one job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import multihost_utils

if TYPE_CHECKING:
    from ..backends.protocol import Model


@dataclass(frozen=True)
class Hosts:
    """The i-th of n hosts writes every n-th chunk, from the i-th.

    Attributes:
        together: whether the devices of the model are of several hosts, so that all of them run every chunk. Else each has the
            model whole and runs its own.
    """

    together: bool

    @classmethod
    def of(cls, model: Model) -> Hosts:
        device = getattr(model, "device", None)  # or how it is sharded, where there are several
        return cls(not getattr(device, "is_fully_addressable", True))

    def own(self, n_chunks: int) -> range:
        """The chunks that this host writes."""
        return range(jax.process_index(), n_chunks, jax.process_count())

    def to_run(self, own: Sequence[int], n_chunks: int) -> list[int]:
        """The chunks that this host runs, of those of its own that are wanted: also the others' where they run together."""
        if not self.together:
            return list(own)
        wanted = np.isin(np.arange(n_chunks), own)
        return np.flatnonzero(multihost_utils.process_allgather(wanted).any(axis=0)).tolist()

    def largest(self, number: int) -> int:
        """A number of each host's where they run one by one; the largest of all where they run together, for all to do the same."""
        return int(multihost_utils.process_allgather(np.int32(number)).max()) if self.together else number


def meet(name: str) -> None:
    """Waits for all hosts, if there are several.

    Before their work and not only after it: the first time CPUs of several hosts look for one another, they give up after half a
    minute, and hosts are never done at the same time.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"oculi_jax {name}")
