"""`LlamaConfig`: what a Llama's `config.json` says, every field either used, known to be inert, or refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sites import SITES, Site
from .activations import ACTIVATIONS
from .fields import INERT, Reader, read_object
from .rope_config import ORIGINAL, RopeConfig, read_rope

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_USED = {
    *_SIZES, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "model_type",
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a Hugging Face model that is loaded already reads of its own config, as far as this library knows of it.
READ_BY_TRANSFORMERS = frozenset((*_USED, "partial_rotary_factor", ORIGINAL))
CONFIG, GENERATION = "config.json", "generation_config.json"
# Fields of generation_config.json that change what the likeliest token is, with the values that do not; none is implemented.
_NOT_GENERATED: dict[str, Any] = {
    "repetition_penalty": (1.0, None), "encoder_repetition_penalty": (1.0, None), "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None), "bad_words_ids": (None, []), "sequence_bias": (None, {}),
    "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None, []), "min_length": (0, None), "min_new_tokens": (0, None), "num_beams": (1, None),
    "penalty_alpha": (0, None), "guidance_scale": (1, None), "stop_strings": (None, []),
    "exponential_decay_length_penalty": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class LayerKind:
    """What the attention of a layer has: its rotary embedding, and how many tokens a token sees, itself among them (None: all)."""

    rope: RopeConfig
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama. Field names are those of Hugging Face's `config.json`.

    In the letters of the contract: `L = num_hidden_layers`, `E = hidden_size`, `H = num_attention_heads`,
    `K = num_key_value_heads`, `D = head_dim`, `F = intermediate_size`, `V = vocab_size`.

    Examples:
        >>> model.config.sizes
        {'L': 4, 'E': 192, 'H': 6, 'K': 2, 'D': 32, 'F': 512, 'V': 576}
        >>> model.config.n_params, len(model.config.sites), model.config.limit, model.config.pad_id
        (1795776, 25, 128, 2)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites that this model has, by name: rows of `oculi_jax.SITES`."""
        return SITES

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What each layer's attention sees and how it turns; here the same for all.

        Examples:
            >>> model.config.layer_kinds[0].window is None
            True
        """
        return (LayerKind(self.rope),) * self.num_hidden_layers

    @property
    def sizes(self) -> dict[str, int]:
        """Letter → size, for the letters that a model fixes."""
        return {
            "L": self.num_hidden_layers, "E": self.hidden_size, "H": self.num_attention_heads,
            "K": self.num_key_value_heads, "D": self.head_dim, "F": self.intermediate_size, "V": self.vocab_size,
        }  # fmt: skip

    @property
    def n_params(self) -> int:
        """Number of parameters, the embedding counted once where it is tied."""
        from .parameters import parameter_table

        return sum(math.prod(row.shape) for row in parameter_table(self))

    @property
    def pad_id(self) -> int:
        """What stands where there is no token: the pad token, else the (first) end token, else 0. Always in the vocabulary."""
        eos = self.eos_token_id
        for found in (self.pad_token_id, eos[0] if isinstance(eos, tuple) and eos else eos):
            if isinstance(found, int) and 0 <= found < self.vocab_size:  # old configs say −1 for none
                return found
        return 0

    @property
    def steady_length(self) -> int | None:
        """Up to which length the rotary frequencies do not depend on it; None where they never do.

        Examples:
            >>> model.config.steady_length is None
            True
        """
        lengths = {"dynamic": self.max_position_embeddings, "longrope": self.rope.original_max_position_embeddings}
        return lengths.get(self.rope.type)

    @property
    def limit(self) -> int | None:
        """The longest prompt that the model was made for; None where its rotary type grows with the prompt."""
        return None if self.rope.type == "dynamic" else self.max_position_embeddings

    def kv_head(self, head: int) -> int:
        """The key/value head that query head `head` reads: `head // G`. IndexError for a head that there is not.

        Examples:
            >>> [model.config.kv_head(head) for head in range(6)]
            [0, 0, 0, 1, 1, 1]
        """
        head = operator.index(head)
        if not 0 <= head < self.num_attention_heads:
            raise IndexError(
                f"head is {head}, but this model has {self.num_attention_heads} query heads, "
                f"so it must be 0 to {self.num_attention_heads - 1}."
            )
        return head // (self.num_attention_heads // self.num_key_value_heads)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, ignore_fields: Iterable[str] = ()) -> LlamaConfig:
        """Reads `config.json` in a directory. Raises OSError or ValueError with the file's name.

        Examples:
            >>> model.save_pretrained("copy")
            >>> LlamaConfig.from_pretrained("copy").hidden_size
            192
        """
        path = Path(directory) / CONFIG
        values = read_object(path)
        if values is None:
            raise FileNotFoundError(f"There is no {CONFIG} in {str(directory)!r}.")
        try:
            config = cls.from_dict(values, ignore_fields=ignore_fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        path = Path(directory) / GENERATION
        try:
            return config.with_generation(read_object(path) or {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def with_generation(self, values: Mapping[str, Any]) -> LlamaConfig:
        """With the token ids of a `generation_config.json`, which come before those of `config.json` as in transformers.

        Fields of it that change which token is the likeliest are not implemented, and are named in a warning. ValueError for
        ids that cannot be.

        Examples:
            >>> model.config.with_generation({"eos_token_id": [1, 2]}).eos_token_id
            (1, 2)
        """
        problems: list[str] = []
        read = Reader(values, problems)
        given = {name: read.ids(name) for name in _TOKENS if values.get(name) is not None}
        if problems:
            raise ValueError("this file cannot be used: " + "; ".join(problems) + ".")
        if unused := [
            f"{name} = {values[name]!r}" for name, inert in _NOT_GENERATED.items() if values.get(name) not in inert
        ]:
            warnings.warn(
                f"{GENERATION} asks for {', '.join(unused)}, which generate does not do: its texts may differ from "
                "transformers'.",
                stacklevel=2,
            )
        return dataclasses.replace(self, **given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, ignore_fields: Iterable[str] = ()) -> LlamaConfig:
        """Reads the dictionary of a `config.json`, in either spelling of the rotary fields.

        Args:
            values: the parsed file.
            ignore_fields: names of fields to leave out although this library does not know them to be harmless;
                a rotary one is named `rope_scaling.NAME`.

        Raises:
            ValueError: one message with every field that is missing, malformed, or not implemented.

        Examples:
            >>> LlamaConfig.from_dict(model.config.to_dict()) == model.config
            True
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"A config is a dictionary, and a {type(values).__name__} was given.")
        ignored = {ignore_fields} if isinstance(ignore_fields, str) else set(ignore_fields)
        fields = {name: value for name, value in values.items() if name not in ignored}
        problems: list[str] = []
        read = Reader(fields, problems)
        if fields.get("model_type", "llama") != "llama":
            raise ValueError(
                f"this is a model of type {fields['model_type']!r}, and models of type 'llama' are what can be loaded."
            )
        read.refuse_unknown(_USED | {ORIGINAL}, INERT, ignore_as="{}")

        sizes = {name: read.integer(name) for name in _SIZES}
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        kv_heads = read.integer("num_key_value_heads", default=heads)
        if heads and kv_heads and heads % kv_heads:
            problems.append(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
        if fields.get("head_dim") is None and heads and width and width % heads:
            problems.append(f"hidden_size ({width}) is not a multiple of num_attention_heads ({heads})")
        head_dim = read.integer("head_dim", default=width // heads if width and heads else None)
        if head_dim and head_dim % 2:
            problems.append(f"head_dim is {head_dim}, and rotary embedding needs an even one")
        act = fields.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            near = difflib.get_close_matches(str(act), ACTIVATIONS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            problems.append(f"hidden_act is {act!r}{hint}; known ones are {', '.join(ACTIVATIONS)}")
        dtype = fields.get("dtype") or fields.get("torch_dtype")
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else dtype.removeprefix("torch.")
        elif dtype is not None:
            problems.append(f"dtype is {dtype!r}, and a name such as 'bfloat16' is expected")
        rope = read_rope(fields, head_dim, sizes["max_position_embeddings"], ignored, problems)
        config = dict(
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=act,
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            rope=rope,
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            attention_bias=read.boolean("attention_bias"),
            mlp_bias=read.boolean("mlp_bias"),
            dtype=dtype,
            **{name: read.ids(name) for name in _TOKENS},
        )
        if problems:
            raise ValueError("this config cannot be used: " + "; ".join(problems) + ".")
        return cls(**config)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model, in the spelling that transformers 4 and 5 both read.

        Examples:
            >>> model.config.to_dict()["rope_theta"]
            10000.0
        """
        values = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("rope", "dtype") and getattr(self, name) is not None
        }
        values |= self.generation_dict()
        scaling = {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.rope.__dataclass_fields__
            if name not in ("type", "theta") and (value := getattr(self.rope, name)) is not None
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **values,
            "rope_theta": self.rope.theta,
            "rope_scaling": {"rope_type": self.rope.type, **scaling} if self.rope.type != "default" else None,
            **({"dtype": self.dtype, "torch_dtype": self.dtype} if self.dtype else {}),
        }

    def generation_dict(self) -> dict[str, Any]:
        """The `generation_config.json` of this model.

        Examples:
            >>> model.config.generation_dict()
            {'bos_token_id': 0, 'pad_token_id': 2}
        """
        values = {name: getattr(self, name) for name in _TOKENS}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
