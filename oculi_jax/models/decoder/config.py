"""`DecoderConfig`: what a model's `config.json` says, every field either used, known to be inert, or refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...sites import SITES, Site
from ..families import FAMILIES, family_of, text_part
from .activations import ACTIVATIONS
from .family import Family, LayerKind
from .fields import INERT, Reader, read_object
from .rope_config import ORIGINAL, RopeConfig, write_rope

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_USED = {
    *_SIZES, "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "model_type",
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
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


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a model and what its family has. Field names are those of Hugging Face's `config.json` where all families
    agree on one.

    In the letters of the contract: `L = num_hidden_layers`, `E = hidden_size`, `H = num_attention_heads`,
    `K = num_key_value_heads`, `D = head_dim`, `F = intermediate_size`, `V = vocab_size`.

    Attributes:
        model_type: the family's name in `config.json`.
        layer_kinds: what each layer's attention sees, and how it turns.
        attention_bias: whether queries, keys and values have a bias; `output_bias`, `mlp_bias`: the other projections.
        norm: how a norm applies its weight: `"narrow"`, in the dtype of the stream, or `"wide"`, in float32 before it is rounded
            to it; `"offset"` is wide, with 1 + weight.
        qk_norm: over what queries and keys are normalised before they turn: each `"head"`, all heads of a `"token"`, or None.
        pre_norm, post_norm: whether a sublayer's input, and what it adds to the stream, are normalised.
        embed_scale, attention_scale, residual_scale, logit_scale: what embeddings, scores, what a sublayer adds, and logits are
            multiplied by.
        score_cap, logit_cap: `c` of a soft cap `c · tanh(x / c)` of scores and of logits; None for none.

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
    layer_kinds: tuple[LayerKind, ...]
    tie_word_embeddings: bool
    model_type: str = "llama"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm: str = "narrow"
    qk_norm: str | None = None
    pre_norm: bool = True
    post_norm: bool = False
    embed_scale: float = 1.0
    attention_scale: float
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def family(self) -> Family:
        """The row of the table of families.

        Examples:
            >>> model.config.family.title, model.config.family.norms["mlp_norm"]
            ('Llama', 'post_attention_layernorm')
        """
        return FAMILIES[self.model_type]

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites that this model has, by name: rows of `oculi_jax.SITES`, and what transformers calls them in this family."""
        return _sites(self)

    @property
    def rope(self) -> RopeConfig:
        """The rotary embedding of layers that see all tokens; of others where there are none.

        Examples:
            >>> model.config.rope.type, model.config.rope.theta
            ('default', 10000.0)
        """
        kinds = sorted(self.layer_kinds, key=lambda kind: kind.window is not None)
        found = next((kind.rope for kind in kinds if kind.rope is not None), None)
        return RopeConfig(type="default", theta=10000.0) if found is None else found

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer sees, its own included, None for all; empty where no layer has a window.

        Examples:
            >>> model.config.windows
            ()
        """
        found = tuple(kind.window for kind in self.layer_kinds)
        return found if any(window is not None for window in found) else ()

    @property
    def sizes(self) -> dict[str, int]:
        """Letter → size, for the letters that a model fixes."""
        return {
            "L": self.num_hidden_layers, "E": self.hidden_size, "H": self.num_attention_heads,
            "K": self.num_key_value_heads, "D": self.head_dim, "F": self.intermediate_size, "V": self.vocab_size,
        }  # fmt: skip

    def shares(self, n_parts: int) -> dict[str, int]:
        """Letter → size of what each device has of a model that is cut over `n_parts`: of the heads, the neurons and the
        vocabulary a part, where they are divisible; of all else the whole.

        Examples:
            >>> [model.config.shares(2)[letter] for letter in "HKE"]
            [3, 1, 192]
        """
        from .parameters import CUT

        cut = [letter for letter in CUT if self.sizes[letter] % n_parts == 0]
        return {letter: size // n_parts if letter in cut else size for letter, size in self.sizes.items()}

    @property
    def n_params(self) -> int:
        """Number of parameters, the embedding counted once where it is tied."""
        return self.n_params_on(1)

    def n_params_on(self, n_parts: int) -> int:
        """How many parameters each device has of a model that is cut over `n_parts`.

        Examples:
            >>> model.config.n_params_on(1) == model.config.n_params, model.config.n_params_on(2) / model.config.n_params < 0.51
            (True, True)
        """
        from .parameters import parameter_table

        return sum(row.share(n_parts) for row in parameter_table(self))

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
        steady = {"dynamic": self.max_position_embeddings, "longrope": self.rope.original_max_position_embeddings}
        return steady.get(self.rope.type)

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
    def from_pretrained(cls, directory: str | os.PathLike[str], *, ignore_fields: Iterable[str] = ()) -> DecoderConfig:
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

    def with_generation(self, values: Mapping[str, Any]) -> DecoderConfig:
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
    def from_dict(cls, values: Mapping[str, Any], *, ignore_fields: Iterable[str] = ()) -> DecoderConfig:
        """Reads the dictionary of a `config.json`, in either spelling of the rotary fields.

        Args:
            values: the parsed file; of a model that sees pictures too, its `text_config` counts.
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
        values, ignored = text_part(values), {ignore_fields} if isinstance(ignore_fields, str) else set(ignore_fields)
        family = family_of(values)
        given = {name: value for name, value in values.items() if name not in ignored}
        fields = family.prepare({**family.defaults, **given})
        problems: list[str] = []
        read = Reader(fields, problems)
        inert = {**INERT, **family.inert}
        read.refuse_unknown(_USED | family.used | {ORIGINAL}, inert, ignore_as="{}")

        common = _common(read, family, ignored)
        own = family.read(read, common) if not problems else {}
        if problems:
            raise ValueError("this config cannot be used: " + "; ".join(problems) + ".")
        rope, n_layers = common.pop("rope"), common["num_hidden_layers"]
        common.pop("local_rope")
        common |= {"layer_kinds": (LayerKind(rope),) * n_layers, "attention_scale": common["head_dim"] ** -0.5}
        return cls(model_type=family.model_type, **{**common, **own})

    @classmethod
    def of_transformers(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Of the dictionary of a loaded model's config, which has fields of all models: what its own family reads counts alone.

        Examples:
            >>> LlamaConfig.of_transformers({**model.config.to_dict(), "return_dict": True}) == model.config
            True
        """
        family = family_of(values)
        known = {*_USED, *family.used, *family.inert, "partial_rotary_factor", ORIGINAL}
        return cls.from_dict({name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` of this model, in the spelling that transformers 4 and 5 both read.

        Examples:
            >>> model.config.to_dict()["rope_theta"]
            10000.0
        """
        rope = self.rope
        names = (*_SIZES, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
        return {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            **{name: getattr(self, name) for name in names},
            "rope_theta": rope.theta,
            "rope_scaling": write_rope(rope) if rope.type != "default" else None,
            **self.family.write(self),
            **{name: None for name in _TOKENS if name in self.family.defaults},  # which to leave out would mean
            **self.generation_dict(),
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


@cache
def _sites(config: DecoderConfig) -> Mapping[str, Site]:
    """See `DecoderConfig.sites`."""
    normed, before, after = config.qk_norm is not None, config.pre_norm, config.post_norm
    there = {
        "q_proj": normed, "k_proj": normed, "q_scale": normed, "k_scale": normed, "attn_scale": before, "mlp_scale": before,
        "attn_proj": after, "mlp_proj": after, "attn_post_scale": after, "mlp_post_scale": after,
    }  # fmt: skip
    # Module → the site that it gives; where one is normalised after it, that is the norm's.
    gives = {"self_attn.q_norm": "q_pre_rope", "self_attn.k_norm": "k_pre_rope"}
    if normed:
        gives |= {"self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj"}
    if after:
        gives |= {
            "self_attn.o_proj": "attn_proj",
            "self_attn": "attn_proj",
            "mlp.down_proj": "mlp_proj",
            "mlp": "mlp_proj",
        }
    of_norms = {"attn_norm": "attn_in", "attn_post_norm": "attn_out", "mlp_norm": "mlp_in", "mlp_post_norm": "mlp_out"}
    gives |= {tensor: of_norms[norm] for norm, tensor in config.family.norms.items()}
    named = {f"model.layers.{{}}.{module}": site for module, site in gives.items()}

    def of_family(site: Site) -> Site:
        kept = [a for a in site.aliases if named.get(a, site.name) == site.name and a not in config.family.multiplied]
        own = [alias for alias, name in named.items() if name == site.name and alias not in kept]
        return dataclasses.replace(site, aliases=(*kept, *own))

    return MappingProxyType({name: of_family(site) for name, site in SITES.items() if there.get(name, True)})


def _common(read: Reader, family: Family, ignored: set[str]) -> dict[str, Any]:
    """The fields that all families have, by their names in `DecoderConfig`; and `rope` and `local_rope`, of layers with a window
    where those have one of their own.
    """
    fields, problems = read.fields, read.problems
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
    rope, local = family.ropes(fields, head_dim, sizes["max_position_embeddings"], ignored, problems)
    return dict(
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=act,
        rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
        rope=rope,
        local_rope=local,
        tie_word_embeddings=read.boolean("tie_word_embeddings"),
        dtype=dtype,
        **{name: read.ids(name) for name in _TOKENS},
    )
