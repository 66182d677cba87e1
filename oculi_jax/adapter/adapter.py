"""`LlamaAttentionAdapter`: the guide's object API, a thin layer that calls the pure function."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from .. import prompts
from ..arrays import listing
from ..backends import find_model, programs_of
from ..capture import Reading, check_layers, readings_of
from ..decoding.continuation import both, continue_ids, continue_texts
from ..intervention.canonical import canonical, sweep_axes
from ..intervention.context import active
from ..intervention.frame import Frame
from ..intervention.rows import Rows
from ..models.decoder.model import Decoder
from ..utils import tokens as token_utils
from .configs import CaptureConfig, Config, LogitConfig, MLPConfig, ResidualConfig
from .parts import merged, parts_of, trim
from .structures import AttentionCapture, FullCapture, LogitCapture, MLPCapture, ResidualCapture

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ..backends.protocol import Model, ModelLike
    from ..intervention.protocol import Interventions
    from ..prompts import PromptLike
    from ..reading import Translator
    from ..utils.tokens import Tokenizer

_CONFIGS: dict[str, type] = {
    "attention": CaptureConfig, "residual": ResidualConfig, "mlp": MLPConfig, "logits": LogitConfig,
}  # fmt: skip


class LlamaAttentionAdapter:
    """Captures from a model, and continues its texts, in the guide's words. It holds a model and a tokenizer, and no state.

    Every method takes a text, a list of texts (padded for you), or ids `[T]` or `[B, T]` as a list or an array of NumPy,
    JAX or torch, with `attention_mask` where they are padded. One prompt gives the guide's shapes, several a leading `B`.
    Lengths are padded inside so that near ones share a compiled program; results never show it. Inside an
    `InterventionContext` of this adapter, every method is under its interventions.

    The model is one of any family, or Hugging Face's own, which stays where and as it is and is run by torch.

    Examples:
        >>> LlamaAttentionAdapter(model, tokenizer)
        LlamaAttentionAdapter(Llama(1.8M parameters, float32, L=4, H=6, K=2, D=32, E=192, F=512, V=576))
    """

    def __init__(self, model: ModelLike, tokenizer: Tokenizer | None = None):
        self.model, self.tokenizer = find_model(model), tokenizer
        if not programs_of(self.model).traceable:
            from ..trust import warn_once

            warn_once(self.model.device)

    def __repr__(self) -> str:
        return f"LlamaAttentionAdapter({self.model!r})"

    def capture(
        self,
        ids_or_text: PromptLike,
        config: CaptureConfig | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
        **others: object,
    ) -> AttentionCapture:
        """Queries, keys, values, patterns and head outputs: `[L, H, T, D]`, `[L, K, T, D]` twice, `[L, H, T, T]`, `[L, H, T, D]`.

        Args:
            ids_or_text: a text, a list of texts, or ids `[T]` or `[B, T]`.
            config: what to keep; everything at every layer for None.
            attention_mask: of the ids' shape, 1 or True at real tokens.
            allow_longer: go beyond the length that the model was made for.

        Raises:
            ValueError, TypeError: a prompt or config that cannot be run, before anything runs.

        Examples:
            >>> adapter.capture(text, CaptureConfig(layers=[1, 3])).queries.shape
            (2, 6, 6, 32)
        """
        _refuse(others, "capture", CaptureConfig)
        return self._run(
            ids_or_text, {"attention": CaptureConfig() if config is None else config}, attention_mask, allow_longer
        )["attention"]

    def capture_residual(
        self,
        ids_or_text: PromptLike,
        config: ResidualConfig | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
        **others: object,
    ) -> ResidualCapture:
        """The residual stream's four points, `[L, T, E]` each, with what attribution needs. Arguments as in `capture`.

        Examples:
            >>> adapter.capture_residual(text, ResidualConfig(layers=[3])).pre_attn.shape
            (1, 6, 192)
        """
        _refuse(others, "capture_residual", ResidualConfig)
        return self._run(
            ids_or_text, {"residual": ResidualConfig() if config is None else config}, attention_mask, allow_longer
        )["residual"]

    def capture_mlp(
        self,
        ids_or_text: PromptLike,
        config: MLPConfig | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
        **others: object,
    ) -> MLPCapture:
        """The MLP's projections and neurons, `[L, T, F]` each, and output `[L, T, E]`. Arguments as in `capture`.

        Examples:
            >>> adapter.capture_mlp(text, MLPConfig(layers=[0])).gate.shape
            (1, 6, 512)
        """
        _refuse(others, "capture_mlp", MLPConfig)
        return self._run(ids_or_text, {"mlp": MLPConfig() if config is None else config}, attention_mask, allow_longer)[
            "mlp"
        ]

    def capture_logits(
        self,
        ids_or_text: PromptLike,
        config: LogitConfig | None = None,
        *,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
        lens: Translator | None = None,
        **others: object,
    ) -> LogitCapture:
        """The logit lens at every layer, `[L, T, V]`; with `top_k`, which never holds as much, `[L, T, k]`.

        Arguments as in `capture`, and `lens`: a `TunedLens` or a `JacobianLens`, which translates each layer's stream first.

        Examples:
            >>> adapter.capture_logits(text, LogitConfig(tokens=[rome], top_k=1, positions=[-1])).top_k_indices.shape
            (4, 1, 1)
        """
        _refuse(others, "capture_logits", LogitConfig)
        configs: dict[str, Config] = {"logits": LogitConfig() if config is None else config}
        return self._run(ids_or_text, configs, attention_mask, allow_longer, lens)["logits"]

    def batch(self, ids_or_texts: PromptLike, *, allow_longer: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Texts (or lists of ids) as the arrays that `forward` under `vmap`, `sweep` and `oculi_jax.causal` take.

        Returns:
            Ids int32 `[B, T]`, padded on the right, and mask bool `[B, T]`, True at real tokens; T is the longest length.

        Examples:
            >>> tokens, mask = adapter.batch([text, "Rome"])
            >>> tokens.shape, mask.sum(axis=1)
            ((2, 6), array([6, 2]))
        """
        rows = [ids_or_texts] if isinstance(ids_or_texts, str) else ids_or_texts
        found = prompts.prepare(rows, self.tokenizer, self.model.config, attention_mask=None, allow_longer=allow_longer)
        return found.tokens[:, : found.n_tokens], found.mask[:, : found.n_tokens]

    def capture_full(
        self,
        ids_or_text: PromptLike,
        *,
        attention: CaptureConfig | None = None,
        residual: ResidualConfig | None = None,
        mlp: MLPConfig | None = None,
        logits: LogitConfig | None = None,
        attention_mask: ArrayLike | None = None,
        allow_longer: bool = False,
    ) -> FullCapture:
        """All four in one pass, each in full by default; of the lens the ten likeliest tokens. Arguments as in `capture`.

        Examples:
            >>> adapter.capture_full(text).residual.n_layers
            4
        """
        configs: dict[str, Config] = {
            "attention": CaptureConfig() if attention is None else attention,
            "residual": ResidualConfig() if residual is None else residual,
            "mlp": MLPConfig() if mlp is None else mlp,
            "logits": LogitConfig(top_k=10) if logits is None else logits,
        }
        return FullCapture(**self._run(ids_or_text, configs, attention_mask, allow_longer))

    def generate(
        self, ids_or_text: PromptLike, max_new_tokens: int = 20, interventions: Interventions = (), **options: Any
    ) -> Any:
        """Continues a prompt or several, greedily by default, under the context's interventions and then the call's own.

        Args:
            ids_or_text: as in `capture`.
            max_new_tokens: how many tokens at most.
            interventions: one or a list; with one leading axis on their index and strength fields, variants that are
                decoded side by side in one program, each prompt under all of them.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `stop_tokens`, `key` and `capture` as in
                `oculi_jax.generate`; `attention_mask`; `allow_longer`.

        Returns:
            For a text, the text with its continuation; a list for several texts, or for variants, and for both a list for
            each text. For a chat, its messages and the assistant's. For ids, the prompt's ids and the new ones, as
            `model.generate` returns them. With `capture`, that and the captured values, which lead alike.

        Examples:
            >>> adapter.generate(text, 2)
            'The capital of Italy is Rome.'
        """
        ambient = active(self)
        if not (prompts.is_text(ids_or_text) or prompts.is_chat(ids_or_text)):
            return continue_ids(self.model, ids_or_text, max_new_tokens, ambient, interventions, **options)
        return continue_texts(
            self.model, self.tokenizer, ids_or_text, max_new_tokens, both(ambient, interventions), **options
        )

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token; ValueError otherwise, with the tokens that it is.

        Examples:
            >>> adapter.to_single_token(" Rome") == rome
            True
        """
        return token_utils.to_single_token(self.tokenizer, text)

    def str_tokens(self, text_or_ids: PromptLike) -> list[str]:
        """The text of each token of a prompt.

        Examples:
            >>> adapter.str_tokens(text)
            ['<s>', ' The', ' capital', ' of', ' Italy', ' is']
        """
        return token_utils.str_tokens(self.tokenizer, text_or_ids)

    def first_difference(self, one: str | Sequence[int], other: str | Sequence[int]) -> int | None:
        """The first position at which two prompts' tokens differ; None where they are the same.

        Examples:
            >>> adapter.first_difference(text, "The capital of France is")
            4
        """
        return token_utils.first_difference(self.tokenizer, one, other)

    def _run(
        self,
        prompt: Any,
        configs: dict[str, Config],
        attention_mask: Any,
        allow_longer: bool,
        translator: Translator | None = None,
    ) -> dict[str, Any]:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((self.model, prompt))):
            raise TypeError(
                "An adapter runs on the host, and was called inside a trace (jit, vmap, grad): use the pure "
                "oculi_jax.forward(model, tokens, interventions, capture=…)."
            )
        model = self.model
        batch = prompts.prepare(
            prompt,
            self.tokenizer,
            model.config,
            attention_mask=attention_mask,
            allow_longer=allow_longer,
            exact=not programs_of(model).compiles_per_length,
        )
        configs = {name: _checked(name, config, model) for name, config in configs.items()}
        shortest = int(batch.mask.sum(axis=1).min())
        wanted = {
            name: readings_of(config.specs(model.config), model.config, shortest) for name, config in configs.items()
        }
        lens = configs.get("logits", LogitConfig())
        assert isinstance(lens, LogitConfig)
        if translator is not None:
            if not hasattr(translator, "translate"):
                raise TypeError(f"lens is a {type(translator).__name__}, and a TunedLens or a JacobianLens is needed.")
            translator.check(model.config)
        tokens: Any = batch.tokens[0] if batch.single else batch.tokens
        mask: Any = batch.mask[0] if batch.single else batch.mask
        wanted_parts = tuple(wanted.items())
        seen = self._seen(batch, readings_of(merged(wanted_parts), model.config, batch.tokens.shape[1]))
        values = parts_of(seen, mask, wanted_parts)
        if "logits" in values:
            layers = dict(wanted)["logits"][0].layers
            values["logits"] = _lens_of(model, values["logits"]["resid_post"], lens, translator, layers)
        if batch.n_tokens != batch.tokens.shape[1]:
            values = trim(values, wanted_parts, batch.n_tokens, lead=0 if batch.single else 1)
        prompt_arrays = {
            "tokens": jax.device_put(tokens[..., : batch.n_tokens]),
            "mask": jax.device_put(mask[..., : batch.n_tokens]),
        }
        kind = "logit" if translator is None else translator.kind
        return {name: _structure(model, config, values[name], prompt_arrays, kind) for name, config in configs.items()}

    def _seen(self, batch: prompts.Prompts, readings: tuple[Reading, ...]) -> Mapping[str, Array]:
        """What readings find in one pass over each prompt, under the context's interventions; of several, all lead with `B`."""
        model, interventions = self.model, active(self)
        if axes := sweep_axes(interventions, len(batch.tokens)):
            raise ValueError(
                f"The interventions of this context have axes {listing(axes)}, and a capture is of one run: use scalars "
                "(a list is a set, one entry for each layer a PerLayer). generate decodes variants side by side, and sweep "
                "measures them."
            )
        frames = [Frame(model.config, model.dtype, batch.n_tokens, row, len(row)) for row in batch.mask]
        programs = programs_of(model)
        if batch.single:
            own = canonical(interventions, frames[0])
            return programs.run(model, batch.tokens[0], batch.mask[0], own, readings).activations
        rows, _ = Rows.of(interventions, frames)
        tokens: Any = batch.tokens
        mask: Any = batch.mask
        found = programs.run_variants(model, tokens, mask, rows, readings=readings).activations
        return {name: x.reshape(x.shape[0], *x.shape[2:]) for name, x in found.items()}


def _checked(name: str, config: Config, model: Model) -> Config:
    """A config with every field in canonical form."""
    if not isinstance(config, _CONFIGS[name]):
        raise TypeError(f"The {name} config is a {type(config).__name__}, and a {_CONFIGS[name].__name__} is needed.")
    return config.canonical(model.config) if isinstance(config, LogitConfig) else config


def _lens_of(
    model: Any,
    resid: Float[Array, "*B L T E"],
    config: LogitConfig,
    translator: Translator | None,
    layers: tuple[int, ...],
) -> dict[str, Array]:
    """What a `LogitCapture` keeps of the lens, each leading with `[*B, L, T]`."""
    if translator is not None:
        translate = partial(translator.translate, layers=layers)
        resid = translate(resid) if resid.ndim == 3 else jnp.stack([translate(row) for row in resid])
    keep = ["normalized", "log_normalizer"]
    keep += ["probabilities"] if config.tokens is not None else []
    keep += ["logits"] if config.top_k is None else ["top_k_logits", "top_k_indices"]
    ids: Any = None if config.tokens is None else np.array(config.tokens, np.int32)
    rows = resid.reshape(-1, *resid.shape[-2:])
    found = programs_of(model).lens(model, rows, tuple(keep), top_k=config.top_k, tokens=ids, dtype=str(config.dtype))
    return {name: x.reshape(*resid.shape[:-2], *x.shape[1:]) for name, x in found.items()}


def _structure(
    model: Decoder, config: Config, values: dict[str, Array], prompt: dict[str, Array], kind_of_lens: str
) -> Any:
    """The guide's structure from the values of its part."""
    layers = check_layers(config.layers, model.config)
    common = {**prompt, "captured_layers": layers}
    sizes = model.config.sizes
    arrays = {}
    if not isinstance(config, LogitConfig):
        arrays = {name: values[site] for name, site in config.fields(model.config).items()}
    scale, cap = model.config.logit_scale, model.config.logit_cap
    match config:
        case CaptureConfig():
            return AttentionCapture(
                **arrays, **common, qk_stage=config.qk_stage,
                n_heads=sizes["H"], n_kv_heads=sizes["K"], head_dim=sizes["D"],
                windows=tuple(model.config.windows[layer] for layer in layers if model.config.windows),
            )  # fmt: skip
        case ResidualConfig():
            weight = model.final_weight
            if prompt["tokens"].ndim == 2:  # one for each prompt, so that jax.vmap maps over all that a batch holds
                weight = jnp.broadcast_to(weight, (len(prompt["tokens"]), *weight.shape))
            return ResidualCapture(**arrays, **common, final_weight=weight, model_layers=sizes["L"], logit_scale=scale)
        case MLPConfig():
            return MLPCapture(**arrays, **common)
        case LogitConfig():
            positions = None if config.positions is None else tuple(config.positions)
            ids = None if config.tokens is None else jax.device_put(np.array(config.tokens, np.int32))
            return LogitCapture(
                **values, **common, probability_tokens=ids, positions=positions, unembedding=model.lm_head.weight,
                lens=kind_of_lens, logit_scale=scale, logit_cap=cap,
            )  # fmt: skip


def _refuse(others: Mapping[str, object], method: str, config: type) -> None:
    """TypeError for arguments that there are not; names the config where they are fields of it."""
    if not others:
        return
    fields = {field.name for field in dataclasses.fields(config)}
    if set(others) <= fields:
        given = ", ".join(f"{name}={_brief(value)}" for name, value in others.items())
        raise TypeError(f"{method} takes that in its config: config={config.__name__}({given}).")
    near = {name: difflib.get_close_matches(name, fields, 1) for name in others if name not in fields}
    hints = [f" Did you mean {config.__name__}({found[0]}=…)?" for found in near.values() if found]
    raise TypeError(f"{method} has no argument {', '.join(near)}.{''.join(hints)}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else "…"
