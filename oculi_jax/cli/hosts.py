"""Whether this process is one of several that do a job together, and how they find one another."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# What JAX needs to join the tasks of `srun`; a script of `sbatch` has the count alone, and is one process.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")


def n_expected() -> int | None:
    """How many processes the environment says there are; None on a TPU, whose own service knows.

    By what JAX documents and reads itself: Slurm's and Open MPI's variables, the list of a TPU pod's hosts on Kubernetes, and of
    a TPU machine that it is one.
    """
    if all(name in os.environ for name in _SLURM):
        return _count("SLURM_NTASKS")
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return _count("OMPI_COMM_WORLD_SIZE")
    pod = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if pod:
        return len(pod.split(","))
    return None if _is_tpu() else 1


def join() -> None:
    """`jax.distributed.initialize()`, where there are several processes. Before anything else of JAX.

    Raises:
        OSError: they are there, and do not find one another.
    """
    expected = n_expected()
    if expected == 1:
        return
    import jax

    from ..data.hosts import meet

    try:
        jax.distributed.initialize()
        meet("oculi job")
    except (ValueError, RuntimeError) as error:
        if expected is None:
            return  # a TPU of one machine, of which no service tells
        raise OSError(
            f"The environment says that this is one of {expected} processes, and jax.distributed.initialize() could not join them: "
            f"{error} For Open MPI's version 5 start the processes by srun, or in a script of your own that calls it with "
            "arguments."
        ) from error


def _count(name: str) -> int:
    try:
        return int(os.environ.get(name, "1"))
    except ValueError:
        raise ValueError(f"{name} is {os.environ[name]!r}, and a number of processes is needed.") from None


def _is_tpu() -> bool:
    """Whether this machine has TPUs that JAX will use."""
    if os.environ.get("JAX_PLATFORMS", "tpu") not in ("", "tpu") or importlib.util.find_spec("libtpu") is None:
        return False
    return any(any(Path("/dev").glob(pattern)) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
