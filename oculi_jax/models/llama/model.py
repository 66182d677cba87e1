"""`Llama`: a `Decoder` of that family, and the door to its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..decoder.model import Decoder

if TYPE_CHECKING:
    import os

    import jax
    from jax.typing import DTypeLike

    from ...utils.devices import DeviceLike


class Llama(Decoder):
    """A Llama (Touvron et al. 2023, arXiv:2302.13971) as a pytree: pass it to `forward`, map over it, differentiate it.

    What it has is what every `Decoder` has; other families come from `oculi_jax.from_pretrained`.

    Examples:
        >>> model
        Llama(1.8M parameters, float32, L=4, H=6, K=2, D=32, E=192, F=512, V=576)
        >>> model.n_params, model.dtype, model.device.platform, model.final_weight.shape
        (1795776, dtype('float32'), 'cpu', (192,))
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike = "auto",
        device: DeviceLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *,
        ignore_fields: tuple[str, ...] = (),
        backend: str = "jax",
    ) -> Any:
        """`oculi_jax.from_pretrained` of a Llama: arguments and errors are its; ValueError for another family.

        Examples:
            >>> model.save_pretrained("copy")
            >>> Llama.from_pretrained("copy", dtype="bfloat16").dtype
            dtype(bfloat16)
        """
        from ..loading import from_pretrained

        options: dict[str, Any] = dict(ignore_fields=ignore_fields, backend=backend, family="llama")
        return from_pretrained(source, dtype, device, mesh, revision, local_files_only, **options)
