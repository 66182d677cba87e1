"""`from_pretrained`: a checkpoint of any family as a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .decoder.checkpoint import load, placement
from .decoder.model import Decoder
from .llama.model import Llama

if TYPE_CHECKING:
    import os

    import jax
    from jax.typing import DTypeLike

    from ..utils.devices import DeviceLike


def from_pretrained(
    source: str | os.PathLike[str],
    dtype: DTypeLike = "auto",
    device: DeviceLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    ignore_fields: tuple[str, ...] = (),
    backend: str = "jax",
    family: str | None = None,
) -> Any:
    """Loads a model from a directory or a Hugging Face Hub id. torch is not needed, but for the backend of that name.

    Args:
        source: a directory with `config.json` and safetensors files (one, or shards with an index), or a Hub id.
        dtype: `"auto"` (the config's, else that of the file), or float32, bfloat16 or float16 as a string or dtype.
        device: a `jax.Device` or a platform name (`"cpu"`, `"gpu"`, `"tpu"`); JAX's default where None. With torch, one of
            its devices (`"cpu"`, `"cuda"`, `"mps"`); for None the GPU where it has one, else the CPU.
        mesh: a mesh with axes `("data", "model")`, both Auto: parameters are sharded over `model`, and each device
            reads only its slice. Not together with `device`.
        revision: branch, tag or commit on the Hub.
        local_files_only: never look at the network.
        ignore_fields: config fields to load without, although this library does not implement them.
        backend: `"jax"`; or `"torch"`, for a `TorchDecoder`, which every function takes as it takes a model of JAX's.
        family: the `model_type` that alone is taken; None for any that loads.

    Returns:
        A `Llama`, or of another family a `Decoder`.

    Raises:
        OSError: something is not there or cannot be read. ValueError: it is there and is of no family that can be
            loaded exactly; one message lists every missing, unexpected and mis-shaped tensor.

    Examples:
        >>> model.save_pretrained("copy")
        >>> from_pretrained("copy", dtype="bfloat16").dtype
        dtype(bfloat16)
    """
    options: dict[str, Any] = dict(
        revision=revision, local_files_only=local_files_only, ignore_fields=ignore_fields, family=family
    )
    if backend == "torch":
        from ..backends.torch import TorchDecoder

        if mesh is not None:
            raise ValueError("A mesh is of JAX's devices: with backend='torch' give a device.")
        return TorchDecoder.from_pretrained(source, dtype, device, **options)
    if backend != "jax":
        raise ValueError(f"backend is {backend!r}, and must be 'jax' or 'torch'.")
    config, params = load(source, dtype=dtype, place=placement(device, mesh), **options)
    return (Llama if config.model_type == "llama" else Decoder)(config, params)
