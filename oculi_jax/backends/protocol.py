"""`Programs`, the contract that a backend keeps, and what its programs return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax import Array
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedModel

    from ..arrays import AnyArray
    from ..buckets import Window
    from ..capture import Reading
    from ..decoding.sampling import Sampler
    from ..intervention.rows import Rows
    from ..metrics import MetricLike
    from ..models.decoder.config import DecoderConfig
    from ..models.decoder.model import Decoder
    from ..output import Output
    from ..rules import Rules
    from .torch.model import TorchDecoder


# How attention is computed → the sites that exist in any case, whether or not somebody touches them.
EXIST: dict[str, tuple[str, ...]] = {"auto": (), "explicit": ("pattern",)}

ModelLike: TypeAlias = "Decoder | TorchDecoder | PreTrainedModel"


class Model(Protocol):
    """What every model says of itself, whatever runs it."""

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def backend(self) -> str: ...


M = TypeVar("M", contravariant=True)
Base = TypeVar("Base")


class Seen(NamedTuple):
    """What `Programs.run_variants` returns: the metric of every row, and site → what was captured; both lead with `[C, N]`."""

    value: Any
    activations: Mapping[str, Array]


class Written(NamedTuple):
    """What `Programs.decode_rows` returns of C prompts × N variants.

    Attributes:
        tokens: int32 `[C, N, n]`, the new ids, filled with the pad id after a stop.
        alive: bool `[C, N, n]`, True at those that precede a row's end, the stop itself included.
        activations: site → what was captured of the finished texts, leading with `[C, N]`.
    """

    tokens: Int[AnyArray, "C N n"]
    alive: Bool[Array, "C N n"]
    activations: Mapping[str, Array]


class Programs(Protocol[M, Base]):
    """What a backend is: five programs over canonical, checked arguments, and what it says of itself.

    A module satisfies it; `backends/jax` and `backends/torch` do, each for its own class of models. Prompts `[C, T]` ×
    variants of their interventions are
    the `Rows` that programs take; letters are those of `oculi_jax.sites`.
    """

    @property
    def compiles_per_length(self) -> bool:
        """Whether another number of tokens is another program, so that prompts are better padded to shared lengths."""
        ...

    @property
    def traceable(self) -> bool:
        """Whether JAX's transformations reach into its programs, and JAX's devices and meshes run them."""
        ...

    def room(self, model: M) -> tuple[str, int]:
        """The platform that a model runs on, and how many bytes are free there."""
        ...

    def rate(self, model: M) -> float:
        """How many floating-point operations a second a matrix product of the model's dtype does on a device, measured once."""
        ...

    def spread(self, model: M) -> tuple[int, int]:
        """How many copies of a model there are, and over how many devices each is cut: `data` and `model` of its mesh."""
        ...

    def run(
        self,
        model: M,
        tokens: Int[AnyArray, "T"],
        mask: Bool[AnyArray, "T"] | None,
        interventions: tuple[Any, ...],
        readings: tuple[Reading, ...],
        *,
        logits: str = "none",
        remat: bool = False,
        attention: str = "auto",
        rules: Rules | None = None,
        start: int = 0,
        resid: Float[AnyArray, "T E"] | None = None,
    ) -> Output:
        """One run: what `forward` returns; `attention` is a key of `EXIST`. With `resid`, which enters layer `start`, that layer
        and later ones alone run. A backend that is not traceable refuses `rules` and `resid`.
        """
        ...

    def lens(
        self,
        model: M,
        resid: Float[AnyArray, "N T E"],
        keep: tuple[str, ...],
        *,
        top_k: int | None = None,
        tokens: Int[AnyArray, "M"] | None = None,
        dtype: str = "float32",
    ) -> dict[str, Array]:
        """The final norm and the unembedding of N residual streams, one after the other, keeping what `keep` names.

        `"normalized"` [N T E] in the model's dtype; `"log_normalizer"` [N T], float32; as `dtype`: `"logits"` [N T V],
        `"top_k_logits"` with `"top_k_indices"` [N T k], `"chosen"` [N T M], the logits of `tokens` and no others, and
        `"probabilities"` [N T M] of `tokens`.
        """
        ...

    def run_variants(
        self,
        model: M,
        tokens: Int[AnyArray, "C T"],
        mask: Bool[AnyArray, "C T"] | None,
        rows: Rows,
        *,
        size: int = 1,
        metric: MetricLike | None = None,
        metric_by_prompt: tuple[bool, ...] = (),
        readings: tuple[Reading, ...] = (),
        window: Window | None = None,
        base: Base | None = None,
        which: Int[AnyArray, "C"] | None = None,
        start: AnyArray | int = 0,
        first: int = 0,
        shared: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Seen:
        """Each prompt under `size` variants, judged by a metric, read, or both.

        Args:
            metric_by_prompt: for each of the metric's leaves, whether it leads with the prompts.
            window: which columns `tokens` are of those that the interventions' arrays cover, and a metric's function sees.
            base: of `Programs.run_base`, whose prompts `which` names: then layers run from `start` on, and nothing is read.
            first: then so many tokens do not run, and are as in the base run; or, where they are `shared`, the same in all
                prompts, and no intervention depends on the prompt, they run once for each variant.
            mesh: spreads the variants over its `data` axis.
        """
        ...

    def run_base(
        self,
        model: M,
        tokens: Int[AnyArray, "C T"],
        mask: Bool[AnyArray, "C T"] | None,
        rows: Rows,
        *,
        keys: bool,
        window: Window | None = None,
    ) -> Base:
        """What runs under interventions without variants leave for `run_variants` to start from; with or without `keys`."""
        ...

    def decode_rows(
        self,
        model: M,
        tokens: Int[AnyArray, "C T"],
        real: Bool[AnyArray, "C T"],
        rows: Rows,
        *,
        size: int,
        n_covered: AnyArray | int,
        sampler: Sampler,
        keys: Array | None,
        stops: Int[AnyArray, "M"],
        n_new: int,
        readings: tuple[Reading, ...],
    ) -> Written:
        """Continues each prompt under `size` variants.

        Args:
            n_covered: how many tokens the arrays of interventions cover; they leave later ones alone.
            keys: typed random keys `[C, N]`; None where decoding is greedy.
            readings: what to read of the finished texts, over `T + n_new` tokens.
        """
        ...
