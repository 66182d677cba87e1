"""The fields of a config file: read one by one by their types, with every problem noted; and those that change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

ANY = object()
# Fields that cannot change a forward pass while they hold one of these values.
INERT: dict[str, Any] = {
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
            "pretraining_tp", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "use_cache",
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


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a model's config is an object.")
    return values


class Reader:
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
        value = self._get(name, default, is_number, "a positive number")
        return None if value is None else float(value)

    def optional(self, name: str) -> int | None:
        """A positive integer, or None."""
        return None if self.fields.get(name) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None."""
        return None if self.fields.get(name) is None else self.number(name)

    def count(self, name: str) -> Any:
        """An integer from 0 on."""
        return self._get(name, None, lambda v: type(v) is int and 0 <= v < 2**31, "an integer from 0 on") or 0

    def flags(self, name: str, default: list[int]) -> list[int]:
        """A list of zeros and ones, as long as the default."""

        def ok(v: Any) -> bool:
            return isinstance(v, list | tuple) and len(v) == len(default) and all(i in (0, 1) for i in v)

        return list(self._get(name, default, ok, f"a list of {len(default)} zeros and ones"))

    def ids(self, name: str) -> int | tuple[int, ...] | None:
        """A token's id, or for the end token several; −1 is how old configs say none."""
        value = self.fields.get(name)
        several = name == "eos_token_id" and isinstance(value, list | tuple)
        if value is None:
            return None
        if not all(
            isinstance(i, int) and not isinstance(i, bool) and -1 <= i < 2**31 for i in (value if several else [value])
        ):
            what = "a token's id or a list of them" if name == "eos_token_id" else "a token's id"
            self.problems.append(f"{name} is {value!r}, and {what} is expected")
            return None
        return tuple(value) if isinstance(value, list | tuple) else value

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


def is_number(value: object) -> TypeGuard[float]:
    """A positive number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30
