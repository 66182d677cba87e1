"""`TorchDecoder`: a model whose weights torch holds, of its own or of a Hugging Face module, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from ...models.decoder.config import DecoderConfig
from ...models.decoder.model import Decoder, RMSNorm, Unembedding
from ...models.decoder.parameters import Parameter, parameter_table
from ...models.families import FAMILIES
from ...models.llama.model import Llama
from .arrays import DTYPES, from_numpy, to_jax, to_numpy
from .devices import find_device
from .hugging_face import class_of, intervened
from .layers import Weights

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from numpy.typing import ArrayLike
    from transformers import PreTrainedModel

    from ...intervention.protocol import Interventions
    from ...utils.devices import DeviceLike


class TorchDecoder:
    """A model that torch runs: what `forward`, `sweep`, `generate`, `lens` and the adapter take, as they take a `Decoder`.

    Attributes:
        config: its `DecoderConfig`.
        hf: the Hugging Face module whose weights it reads, or None where it has its own.
    """

    backend = "torch"

    def __init__(self, config: DecoderConfig, read: Callable[[str], Tensor], hf: PreTrainedModel | None = None):
        """`read` gives the tensor that a checkpoint calls by a name; it is asked anew for every run."""
        self.config, self.hf, self._read = config, hf, read
        self._unembedding: jax.Array | None = None

    @classmethod
    def of(cls, hf: PreTrainedModel) -> TorchDecoder:
        """Of a Hugging Face module of a family; TypeError for another class, ValueError for weights that cannot be read."""
        kind = class_of(hf)
        if kind is None:
            name, known = type(hf).__name__, ", ".join(family.architecture for family in FAMILIES.values())
            hint = ""
            if name.endswith("ForConditionalGeneration"):
                hint = " Of Gemma 3 with pictures, from_pretrained(directory, backend='torch') reads the text part."
            raise TypeError(
                f"The model is a {name}, and of transformers' classes those that are known are {known}.{hint}"
            )
        if type(hf).forward is not kind.forward:
            raise TypeError(
                f"The model is a {type(hf).__name__} with a forward of its own, which would not be run; a plain {kind.__name__} "
                "is needed."
            )
        generation = getattr(hf, "generation_config", None)
        config = DecoderConfig.of_transformers(hf.config.to_dict()).with_generation(
            generation.to_dict() if generation else {}
        )
        return cls(config, partial(_read_module, hf), hf)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        dtype: DTypeLike = "auto",
        device: DeviceLike | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *,
        ignore_fields: tuple[str, ...] = (),
        family: str | None = None,
    ) -> TorchDecoder:
        """Of a checkpoint; arguments as in `from_pretrained`."""
        from ...models.decoder.checkpoint import load

        place = find_device(device)
        options: Any = dict(revision=revision, local_files_only=local_files_only, ignore_fields=ignore_fields)
        options["family"] = family
        return cls.from_arrays(*load(source, dtype=dtype, place=None, **options), place)

    @classmethod
    def from_arrays(cls, config: DecoderConfig, params: dict[str, np.ndarray], device: torch.device) -> TorchDecoder:
        """Of parameters named and shaped as the table says; each is let go once its tensors are on the device."""
        tensors: dict[str, Tensor] = {}
        for row in parameter_table(config):
            array = params.pop(row.name)
            for name, part in zip(row.tensors(), array if row.stacked else array[None], strict=True):
                tensor = from_numpy(part.reshape(row.stored)).to(device)
                if row.n_rows is not None:
                    whole = tensors.setdefault(name, tensor.new_empty(row.tensor_shape))
                    whole[row.rows] = tensor
                else:
                    tensors[name] = tensor
        return cls(config, tensors.__getitem__)

    def weights(self) -> Weights:
        """References to the weights, as they are now."""
        layers: list[dict[str, Tensor]] = [{} for _ in range(self.config.num_hidden_layers)]
        outer: dict[str, Tensor] = {}
        for row in parameter_table(self.config):
            for number, name in enumerate(row.tensors()):
                into = layers[number] if row.stacked else outer
                into[row.name.removeprefix("layers.")] = self._tensor(name, row)
        head = self._read("lm_head.weight") if self.hf is not None else outer.get("unembed", outer["embed"])
        return Weights(self.config, outer["embed"], layers, outer["norm.weight"], head)

    def _tensor(self, name: str, row: Parameter) -> Tensor:
        found = _checked(name, self._read(name))
        if found.shape != row.tensor_shape:
            raise ValueError(
                f"{name} is {list(found.shape)}, and by the model's config {list(row.tensor_shape)} is needed."
            )
        return found if row.n_rows is None else found[row.rows]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the embedding and of the residual stream."""
        return jnp.dtype(DTYPES[_checked("model.embed_tokens.weight", self._read("model.embed_tokens.weight")).dtype])

    @property
    def device(self) -> torch.device:
        """The device of the embedding."""
        return self._read("model.embed_tokens.weight").device

    @property
    def lm_head(self) -> Unembedding:
        """`.weight` is the unembedding `[V, E]`, tied or not, as a JAX array: a copy, made anew once the weights have changed."""
        here, kept = to_numpy(self.weights().unembed), self._unembedding
        if (
            kept is None
            or kept.dtype != here.dtype
            or not np.array_equal(np.asarray(kept).view(np.uint8), here.view(np.uint8))
        ):
            kept = self._unembedding = to_jax(here.copy())
        return Unembedding(kept)

    @property
    def final_weight(self) -> jax.Array:
        """What the final norm multiplies by, `[E]`, a copy."""
        return RMSNorm(self._norm()).gain(self.config.norm)

    def _norm(self) -> jax.Array:
        return to_jax(self._read("model.norm.weight").detach().cpu().clone())

    @property
    def embed(self) -> jax.Array:
        """The embedding `[V, E]`, a copy."""
        return to_jax(self._read("model.embed_tokens.weight").detach().cpu().clone())

    def as_jax(self) -> Decoder:
        """The same model as a `Decoder` on the CPU, its weights copied: for derivatives, and for what reads the weights."""
        params: dict[str, jax.Array] = {}
        for row in parameter_table(self.config):
            parts = [to_numpy(self._tensor(name, row)) for name in row.tensors()]
            params[row.name] = to_jax((np.stack(parts) if row.stacked else parts[0].copy()).reshape(row.shape))
        return (Llama if self.config.model_type == "llama" else Decoder)(self.config, params)

    @property
    def layers(self) -> Any:
        """`as_jax().layers`, for analyses of the weights."""
        return self.as_jax().layers

    @property
    def norm(self) -> Any:
        """The final norm, as of `as_jax`."""
        return RMSNorm(self._norm())

    @property
    def n_params(self) -> int:
        """Number of parameters, the embedding counted once where it is tied."""
        return self.config.n_params

    def generate(
        self, input_ids: ArrayLike, max_new_tokens: int = 20, interventions: Interventions = (), **options: Any
    ) -> Any:
        """As `Llama.generate`."""
        from ...decoding.continuation import continue_ids
        from ...intervention.context import active_on

        return continue_ids(self, input_ids, max_new_tokens, active_on(self), interventions, **options)

    def intervened(self) -> Any:
        """A context in which the Hugging Face module's forward is under the interventions that are active where it is called."""
        return nullcontext() if self.hf is None else intervened(self)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{letter}={self.config.sizes[letter]}" for letter in "LHKDEFV")
        return f"TorchDecoder({self.n_params / 1e6:.1f}M parameters, {self.dtype}, {self.device}, {sizes})"


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} is of {tensor.dtype}, and {', '.join(DTYPES.values())} is needed: hf.float() makes it float32."
        )
    return tensor


def _read_module(hf: Any, name: str) -> Tensor:
    *path, leaf = name.split(".")
    try:
        owner = attrgetter(".".join(path))(hf)
    except AttributeError:
        raise ValueError(f"The model has no {'.'.join(path)}, and its config says that it has.") from None
    is_matrix = leaf == "weight" and path[-1].endswith(("_proj", "lm_head"))
    if is_matrix and getattr(type(owner), "forward", None) is not torch.nn.Linear.forward:
        raise TypeError(
            f"{'.'.join(path)} is a {type(owner).__name__}, whose result does not follow from its weight alone, and a plain "
            "torch.nn.Linear is needed: merge adapters into the model, and load it without quantisation."
        )
    tensor = getattr(owner, leaf)
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is not in memory (it is offloaded): load the model without offloading.")
    return tensor
