"""The guide's four configs: what an adapter is asked to capture, and the sites that this means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..arrays import integer, integers
from ..capture import CaptureSpec, float_dtype
from ..sites import SITES

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from ..models.decoder.config import DecoderConfig

QK_STAGES = ("post_rope", "pre_rope")


class _OfSites(ABC):
    """A config whose fields are sites of the layers, and some outside them."""

    layers: Sequence[int] | None
    dtype: DTypeLike | None

    @abstractmethod
    def fields(self, model: DecoderConfig | None = None) -> dict[str, str]:
        """Field of the capture → site."""

    def specs(self, model: DecoderConfig | None = None) -> tuple[CaptureSpec, ...]:
        """The sites as `forward` is asked for them; with a model's config, those that its family has besides too.

        Examples:
            >>> CaptureConfig(layers=[1]).specs()[0].sites
            ('q', 'k', 'v', 'pattern', 'z')
        """
        sites = tuple(dict.fromkeys(self.fields(model).values()))
        # Norm scales stay float32: attribution multiplies everything by them.
        layered, scales = (
            tuple(name for name in sites if SITES[name].layered and name.endswith("_scale") == scale)
            for scale in (False, True)
        )
        outside = [
            CaptureSpec(name, dtype=self.dtype if name == "embed" else None)
            for name in sites
            if name not in layered + scales
        ]
        inside = [CaptureSpec(layered, self.layers, dtype=self.dtype)] if layered else []
        return (*inside, *([CaptureSpec(scales, self.layers)] if scales else []), *outside)


@dataclass(frozen=True)
class CaptureConfig(_OfSites):
    """Attention: queries, keys, values and patterns, and always the heads' outputs `z`, which attribution reads.

    Where every layer is captured, the final norm's scale comes with them, which attribution reads too.

    Args:
        layers: which layers, in the order wanted; None for all.
        capture_queries, capture_keys, capture_values, capture_patterns: what to keep.
        qk_stage: `"post_rope"`, what attention uses, or `"pre_rope"`, the projections before rotation.
        dtype: what to store them as; None for the model's own.

    Raises:
        ValueError, TypeError: when it captures, layers, a stage or a dtype that cannot be.

    Examples:
        >>> adapter.capture(text, CaptureConfig(layers=[1, 3])).patterns.shape
        (2, 6, 6, 6)
        >>> CaptureConfig(qk_stage="pre_rope").fields()["queries"]
        'q_pre_rope'
    """

    layers: Sequence[int] | None = None
    capture_queries: bool = True
    capture_keys: bool = True
    capture_values: bool = True
    capture_patterns: bool = True
    qk_stage: str = "post_rope"
    dtype: DTypeLike | None = None

    def fields(self, model: DecoderConfig | None = None) -> dict[str, str]:
        """Field of the capture → site."""
        if self.qk_stage not in QK_STAGES:
            raise ValueError(f"qk_stage is {self.qk_stage!r}, and must be one of {', '.join(map(repr, QK_STAGES))}.")
        stage = "" if self.qk_stage == "post_rope" else "_pre_rope"
        wanted = {
            "queries": (self.capture_queries, f"q{stage}"),
            "keys": (self.capture_keys, f"k{stage}"),
            "values": (self.capture_values, "v"),
            "patterns": (self.capture_patterns, "pattern"),
            "z": (True, "z"),
            "final_scale": (self.layers is None, "final_scale"),
            "post_scale": (model is not None and model.post_norm, "attn_post_scale"),
        }
        return {field: site for field, (on, site) in wanted.items() if on}


@dataclass(frozen=True)
class ResidualConfig(_OfSites):
    """The four points of the residual stream; `post_attn` and `pre_mlp` are one and the same point.

    What a layer's attention or MLP added between two points that are kept is kept as well, for attribution.

    Args:
        layers: which layers, in the order wanted; None for all.
        capture_pre_attn, capture_post_attn, capture_pre_mlp, capture_post_mlp: what to keep.
        dtype: what to store them as; None for the model's own.

    Raises:
        ValueError, TypeError: when it captures, layers or a dtype that cannot be.

    Examples:
        >>> adapter.capture_residual(text, ResidualConfig(layers=[3])).post_mlp.shape
        (1, 6, 192)
        >>> ResidualConfig().fields()["post_mlp"]
        'resid_post'
    """

    layers: Sequence[int] | None = None
    capture_pre_attn: bool = True
    capture_post_attn: bool = True
    capture_pre_mlp: bool = True
    capture_post_mlp: bool = True
    dtype: DTypeLike | None = None

    def fields(self, model: DecoderConfig | None = None) -> dict[str, str]:
        """Field of the capture → site."""
        middle = self.capture_post_attn or self.capture_pre_mlp
        wanted = {
            "pre_attn": (self.capture_pre_attn, "resid_pre"),
            "post_attn": (self.capture_post_attn, "resid_mid"),
            "pre_mlp": (self.capture_pre_mlp, "resid_mid"),
            "post_mlp": (self.capture_post_mlp, "resid_post"),
            "attn_out": (self.capture_pre_attn and middle, "attn_out"),
            "mlp_out": (middle and self.capture_post_mlp, "mlp_out"),
            "embedding": (True, "embed"),
            "final_scale": (True, "final_scale"),
            "final_norm": (True, "final_norm"),
        }
        return {field: site for field, (on, site) in wanted.items() if on}


@dataclass(frozen=True)
class MLPConfig(_OfSites):
    """The MLP's projections, neurons and output.

    Where every layer is captured, the final norm's scale comes with them, which attribution reads.

    Args:
        layers: which layers, in the order wanted; None for all.
        capture_gate, capture_up, capture_post_activation, capture_output: what to keep.
        dtype: what to store them as; None for the model's own.

    Raises:
        ValueError, TypeError: when it captures, layers or a dtype that cannot be.

    Examples:
        >>> adapter.capture_mlp(text, MLPConfig(layers=[0])).post_activation.shape
        (1, 6, 512)
        >>> MLPConfig().fields()["post_activation"]
        'act'
    """

    layers: Sequence[int] | None = None
    capture_gate: bool = True
    capture_up: bool = True
    capture_post_activation: bool = True
    capture_output: bool = True
    dtype: DTypeLike | None = None

    def fields(self, model: DecoderConfig | None = None) -> dict[str, str]:
        """Field of the capture → site."""
        wanted = {
            "gate": (self.capture_gate, "gate"),
            "up": (self.capture_up, "up"),
            "post_activation": (self.capture_post_activation, "act"),
            "output": (self.capture_output, "mlp_out"),
            "final_scale": (self.layers is None, "final_scale"),
            "post_scale": (model is not None and model.post_norm, "mlp_post_scale"),
        }
        return {field: site for field, (on, site) in wanted.items() if on}


@dataclass(frozen=True)
class LogitConfig:
    """The logit lens at every layer: what the model would say if it stopped there.

    Args:
        layers: which layers, in the order wanted; None for all.
        top_k: keep only the k likeliest tokens of each position; the full `[L, T, V]` is then never held.
        positions: which positions, counting real tokens, negative ones from the last; None for all.
        tokens: ids whose probabilities to keep as well, exactly.
        dtype: what to store logits and probabilities as; None for float32.

    Raises:
        ValueError, TypeError: when it captures, a layer, k, position, id or dtype that cannot be.

    Examples:
        >>> found = adapter.capture_logits(text, LogitConfig(tokens=[rome], top_k=1, positions=[-1]))
        >>> [f"{p:.2f}" for p in found.probabilities[:, 0, 0]]  # that it is Rome, layer by layer
        ['0.00', '0.01', '0.45', '1.00']
        >>> LogitConfig(dtype=jnp.bfloat16).canonical(model.config).dtype, LogitConfig().specs()[0].sites
        ('bfloat16', 'resid_post')
    """

    layers: Sequence[int] | None = None
    top_k: int | None = None
    positions: Sequence[int] | None = None
    tokens: Sequence[int] | None = None
    dtype: DTypeLike | None = None

    def canonical(self, config: DecoderConfig) -> LogitConfig:
        """The same with every field checked and of one type: tuples of ints, an int, a dtype's name."""
        size = config.vocab_size
        tokens = None if self.tokens is None else integers(self.tokens, "LogitConfig.tokens")
        if tokens == ():
            raise ValueError("LogitConfig.tokens is empty; leave it out to keep no token's probabilities.")
        if wrong := [token for token in tokens or () if not 0 <= token < size]:
            raise ValueError(f"LogitConfig.tokens holds {wrong}, and this model's vocabulary has ids 0 to {size - 1}.")
        return LogitConfig(
            layers=self.layers,
            top_k=None if self.top_k is None else integer(self.top_k, "LogitConfig.top_k", 1, size),
            positions=None if self.positions is None else integers(self.positions, "LogitConfig.positions"),
            tokens=tokens,
            dtype=float_dtype(self.dtype or "float32", "LogitConfig.dtype"),
        )

    def specs(self, model: DecoderConfig | None = None) -> tuple[CaptureSpec, ...]:
        """The sites as `forward` is asked for them: the residual stream that the lens reads."""
        return (CaptureSpec("resid_post", self.layers, self.positions),)


Config = CaptureConfig | ResidualConfig | MLPConfig | LogitConfig
