"""What runs layers. A backend is a module of five programs that satisfies `Programs`; a model finds its own here.

Checks, canonical interventions, plans and metrics are the same for all backends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .protocol import EXIST, Model, ModelLike, Programs

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig

__all__ = ["EXIST", "Model", "ModelLike", "Programs", "check_model", "find_model", "programs_of"]


def programs_of(model: Model) -> Programs[Any, Any]:
    """The programs that run a model that `find_model` returned."""
    if model.backend == "torch":
        from . import torch

        return torch
    from . import jax

    return jax


def find_model(model: object) -> Any:
    """A model as the programs of its backend take it: a `Decoder`, or a `TorchDecoder`, also of a Hugging Face module.

    Raises:
        TypeError: it is none of these.
    """
    if _is_of_transformers(model):
        from .torch import TorchDecoder

        module: Any = model
        return TorchDecoder.of(module)
    if getattr(model, "backend", "jax") == "jax":
        check_model(model)
    return model


def check_model(model: object) -> DecoderConfig:
    """The config of a JAX model; TypeError for what is none."""
    if _is_of_transformers(model) or getattr(model, "backend", "jax") != "jax":
        raise TypeError(
            "This differentiates or reads the model as a JAX pytree, and was given one that is none: load it with "
            "oculi_jax.from_pretrained(directory)."
        )
    if isinstance(model, type) or not hasattr(model, "config") or not hasattr(model, "embed_tokens"):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(f"The model is {what}; give one as from_pretrained(source) makes, or one of transformers.")
    config: Any = getattr(model, "config", None)
    return config


def _is_of_transformers(model: Any) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
