"""`LlamaConfig`: what a Llama's `config.json` says, every field either used, known to be inert, or refused by name."""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...sites import SITES, Site
from .activations import ACTIVATIONS

# Fields of a rotary type: (required, optional). `rope_theta` belongs to all of them.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        (
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
            "mscale", "mscale_all_dim", "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_USED = {
    *_SIZES, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "model_type",
}  # fmt: skip
ANY = object()
# Fields that cannot change a forward pass while they hold one of these values.
_INERT: dict[str, Any] = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "pruned_heads": ({}, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, True, None),
    **dict.fromkeys(
        (
            # training and serving
            "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "use_cache",
            "cache_implementation", "gradient_checkpointing", "attn_implementation", "_attn_implementation",
            "_attn_implementation_autoset", "experts_implementation", "_experts_implementation", "use_flash_attention",
            # bookkeeping
            "architectures", "auto_map", "transformers_version", "transformers.js_config", "_name_or_path", "_model_name_or_path",
            "name_or_path", "_commit_hash", "is_llama_config", "unsloth_version", "unsloth_fixed", "unk_token_id",
            "sep_token_id", "cls_token_id", "decoder_start_token_id", "max_length", "min_length", "max_sequence_length",
            "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "tf_legacy_loss",
            "tie_encoder_decoder", "cross_attention_hidden_size", "chunk_size_feed_forward", "finetuning_task",
            "id2label", "label2id", "num_labels", "problem_type", "tokenizer_class", "prefix", "task_specific_params",
            "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
            "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
            "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
            "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
            "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
        ),
        ANY,
    ),
}  # fmt: skip
# What this library knows of a config; a Hugging Face model that is loaded already reads nothing else of its own.
KNOWN_FIELDS = frozenset((*_USED, *_INERT, "original_max_position_embeddings"))
_INERT_ROPE = {"partial_rotary_factor": (1, None), "finetuned": ANY}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the type and the numbers that its formula reads (see `rope.py`)."""

    type: str
    theta: float
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


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
        """What each layer's attention sees and how it turns; here the same for all."""
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
        """Up to which length the rotary frequencies do not depend on it; None where they never do."""
        lengths = {"dynamic": self.max_position_embeddings, "longrope": self.rope.original_max_position_embeddings}
        return lengths.get(self.rope.type)

    @property
    def limit(self) -> int | None:
        """The longest prompt that the model was made for; None where its rotary type grows with the prompt."""
        return None if self.rope.type == "dynamic" else self.max_position_embeddings

    def kv_head(self, head: int) -> int:
        """The key/value head that query head `head` reads: `head // G`."""
        head = operator.index(head)
        if not 0 <= head < self.num_attention_heads:
            raise IndexError(
                f"head is {head}, but this model has {self.num_attention_heads} query heads, "
                f"so it must be 0 to {self.num_attention_heads - 1}."
            )
        return head // (self.num_attention_heads // self.num_key_value_heads)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], *, ignore_fields: Iterable[str] = ()) -> LlamaConfig:
        """Reads `config.json` in a directory. Raises OSError or ValueError with the file's name."""
        path = Path(directory) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no config.json in {str(directory)!r}.") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; a model's config is an object.")
        try:
            return cls.from_dict(values, ignore_fields=ignore_fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, ignore_fields: Iterable[str] = ()) -> LlamaConfig:
        """Reads the dictionary of a `config.json`, in either spelling of the rotary fields.

        Args:
            values: the parsed file.
            ignore_fields: names of fields to leave out although this library does not know them to be harmless;
                a rotary one is named `rope_scaling.NAME`.

        Raises:
            ValueError: one message with every field that is missing, malformed, or not implemented.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"A config is a dictionary, and a {type(values).__name__} was given.")
        ignored = {ignore_fields} if isinstance(ignore_fields, str) else set(ignore_fields)
        fields = {name: value for name, value in values.items() if name not in ignored}
        problems: list[str] = []
        read = _Reader(fields, problems)
        if fields.get("model_type", "llama") != "llama":
            problems.append(f"model_type is {fields['model_type']!r}, and only 'llama' is implemented")
        read.refuse_unknown(_USED | {_ORIGINAL}, _INERT, ignore_as="{}")

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
            dtype = dtype.removeprefix("torch.")
        elif dtype is not None:
            problems.append(f"dtype is {dtype!r}, and a name such as 'bfloat16' is expected")
        rope = _read_rope(fields, head_dim, sizes["max_position_embeddings"], ignored, problems)
        eos = fields.get("eos_token_id")
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
            bos_token_id=fields.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=fields.get("pad_token_id"),
        )
        if problems:
            raise ValueError("this config cannot be used: " + "; ".join(problems) + ".")
        return cls(**config)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model, in the spelling that transformers 4 and 5 both read."""
        values = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("rope", "dtype") and getattr(self, name) is not None
        }
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
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


class _Reader:
    """Typed access to a dictionary that notes every problem and goes on."""

    def __init__(self, fields: Mapping[str, Any], problems: list[str]):
        self.fields, self.problems = fields, problems

    def _get(self, name: str, default: Any, ok, expected: str) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is None:
                self.problems.append(f"{name} is missing")
            return default
        if not ok(value):
            self.problems.append(f"{name} is {value!r}, and {expected} is expected")
            return default
        return value

    def integer(self, name: str, default: int | None = None) -> Any:
        return self._get(
            name,
            default,
            lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31,
            "a positive integer",
        )

    def number(self, name: str, default: float | None = None) -> Any:
        value = self._get(name, default, _is_number, "a positive number")
        return None if value is None else float(value)

    def boolean(self, name: str) -> Any:
        return self._get(name, False, lambda v: isinstance(v, bool), "true or false")

    def refuse_unknown(self, used: Iterable[str], inert: Mapping[str, Any], ignore_as: str) -> None:
        for name, value in self.fields.items():
            if name in used:
                continue
            known = inert.get(name)
            if known is ANY or (known is not None and value in known):
                continue
            what = "is not implemented" if known is None else "is implemented only as " + " or ".join(map(repr, known))
            self.problems.append(
                f"field {ignore_as.format(name)} = {value!r} {what} "
                f"(ignore_fields=({ignore_as.format(name)!r},) loads the model without it)"
            )


def _is_number(value: Any) -> bool:
    """A positive number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


def _read_rope(
    fields: Mapping[str, Any], head_dim: Any, longest: Any, ignored: set[str], problems: list[str]
) -> RopeConfig | None:
    """Both spellings: transformers 5's `rope_parameters`, and `rope_theta` beside `rope_scaling`."""
    spelling = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    if fields.get("rope_parameters") and fields.get("rope_scaling"):
        problems.append("rope_parameters and rope_scaling are both given, and they may disagree")
    group = fields.get(spelling) or {}
    if not isinstance(group, dict):
        problems.append(f"{spelling} is {group!r}, and an object or null is expected")
        return None
    group = {name: value for name, value in group.items() if f"{spelling}.{name}" not in ignored}
    kind = group.pop("rope_type", None)
    kind = group.pop("type", None) if kind is None else (group.pop("type", None), kind)[1]
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        problems.append(f"the rotary type {kind!r} is not one of {', '.join(ROPE_FIELDS)}")
        return None
    theta = group.pop("rope_theta", None)
    theta = fields.get("rope_theta") if theta is None else theta
    required, optional = ROPE_FIELDS[kind]
    if _ORIGINAL in fields:  # a few checkpoints keep it outside; transformers lets that one win
        if _ORIGINAL in optional:
            group[_ORIGINAL] = fields[_ORIGINAL]
        else:
            problems.append(f"{_ORIGINAL} is given, and the rotary type {kind!r} does not read it")
    _Reader(group, problems).refuse_unknown((*required, *optional), _INERT_ROPE, ignore_as=f"{spelling}.{{}}")
    for name in required:
        if group.get(name) is None:
            problems.append(f"{spelling}.{name} is missing, and the rotary type {kind!r} needs it")
    given = [name for name in (*required, *optional) if group.get(name) is not None]
    n_angles = (head_dim or 0) // 2
    values = {name: _rope_value(name, group[name], f"{spelling}.{name}", n_angles, problems) for name in given}
    values = {name: value for name, value in values.items() if value is not None}
    if _ORIGINAL in optional:
        values.setdefault(_ORIGINAL, longest)
    if "factor" in optional and longest and values.get(_ORIGINAL):
        values.setdefault("factor", longest / values[_ORIGINAL])
    if values.get("low_freq_factor") and values.get("low_freq_factor") == values.get("high_freq_factor"):
        problems.append(
            f"{spelling}: low_freq_factor and high_freq_factor are equal, so the ramp between them is undefined"
        )
    if kind == "dynamic" and head_dim == 2:
        problems.append("the rotary type 'dynamic' is undefined for head_dim 2")
    if theta is not None and not (_is_number(theta) and theta > 1):
        problems.append(f"rope_theta is {theta!r}, and a number above 1 is expected")
        return None
    return RopeConfig(type=kind, theta=10000.0 if theta is None else float(theta), **values)


def _rope_value(name: str, value: Any, where: str, n_angles: int, problems: list[str]) -> Any:
    """One field of a rotary type, checked; None where it cannot be."""
    if name in ("short_factor", "long_factor"):
        if isinstance(value, list) and all(map(_is_number, value)) and len(value) == n_angles:
            return tuple(float(v) for v in value)
        problems.append(f"{where} must be a list of head_dim/2 = {n_angles} positive numbers")
    elif name == "truncate":
        if isinstance(value, bool):
            return value
        problems.append(f"{where} is {value!r}, and true or false is expected")
    elif name == _ORIGINAL:
        if isinstance(value, int) and not isinstance(value, bool) and 1 < value < 2**31:
            return value
        problems.append(f"{where} is {value!r}, and an integer above 1 is expected")
    elif _is_number(value):
        return float(value)
    else:
        problems.append(f"{where} is {value!r}, and a positive number is expected")
    return None
