"""`forward`, the one pure function: a model, tokens and interventions in; logits and activations out."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Int

from .arrays import as_array, listing, on_device
from .capture import Reading, at_positions, readings_of
from .intervention.canonical import canonical
from .intervention.edit import Edit, apply_edit, limit_to_covered
from .intervention.frame import Frame
from .output import Output

if TYPE_CHECKING:
    from .models.llama.config import LlamaConfig
    from .models.llama.model import Llama

LOGITS = ("all", "last", "none")


def forward(
    model: Llama,
    tokens: Any,
    interventions: Any = (),
    *,
    capture: Any = (),
    logits: Literal["all", "last", "none"] = "all",
    mask: Any = None,
    remat: bool = False,
) -> Output:
    """Runs a model on one sequence, with edits, and returns whatever is asked for. Pure; compiled once a kind of call.

    `capture`, `logits` and `remat` are static, as are the kinds of the interventions and the length; all else is data,
    so other layers, heads, positions and strengths run the same program. For a batch, `vmap` it over `tokens`.

    Args:
        model: a `Llama`, or a Hugging Face `LlamaForCausalLM`, which torch runs where it lies.
        tokens: ids `[T]`, integers.
        interventions: one intervention or a list of them, applied in order (see `oculi_jax.intervention`).
        capture: site names, a `CaptureSpec`, or a tuple of those.
        logits: `"all"`, `"last"` (at the last real token) or `"none"`; for the last, layers that no capture needs are
            not run.
        mask: bool `[T]`, True at real tokens. Padding on either side changes nothing at the real ones.
        remat: recompute each layer in the backward pass instead of keeping its intermediates.

    Returns:
        An `Output`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.
    """
    if logits not in LOGITS:
        raise ValueError(f"logits is {logits!r}, and must be one of {', '.join(map(repr, LOGITS))}.")
    model = find_model(model)
    config = model.config
    tokens = check_tokens(tokens, config.vocab_size)
    mask = check_mask(mask, tokens.shape[0])
    frame = Frame(config, model.dtype, tokens.shape[0], mask)
    edits = canonical(interventions, frame)
    n_real = tokens.shape[0] if mask is None or on_device(mask) else int(mask.sum())
    readings = readings_of(capture, config, n_real)
    return program(model, run)(model, tokens, mask, edits, readings, logits, bool(remat))


def find_model(model: Any) -> Any:
    """A model as the programs of its backend take it: a `Llama`, or a `TorchLlama`, also of a Hugging Face module.

    Raises:
        TypeError: it is none of these.
    """
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        from .backends.torch import TorchLlama

        return TorchLlama.of(model)
    if not hasattr(type(model), "backend"):
        check_model(model)
    return model


def program(model: Any, own: Any) -> Any:
    """`own`, a JAX program of this library; or what has its name and signature in the model's backend, for a model of another."""
    backend = getattr(type(model), "backend", None)
    return own if backend is None else getattr(import_module(backend), own.__name__)


def check_model(model: Any) -> LlamaConfig:
    """The config of a JAX model; TypeError for what is none."""
    if hasattr(type(model), "backend") or any(
        kind.__module__.startswith("transformers.") for kind in type(model).__mro__
    ):
        raise TypeError(
            "This differentiates or reads the model as a JAX pytree, and was given one that torch runs: load it with "
            "Llama.from_pretrained(directory)."
        )
    if isinstance(model, type) or not hasattr(model, "config") or not hasattr(model, "embed_tokens"):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise TypeError(f"The model is {what}; give a Llama, as Llama.from_pretrained(source) makes.")
    return model.config


def check_tokens(tokens: Any, vocab_size: int) -> Any:
    """Ids `[T]` as int32, checked by value where the host can see them."""
    if isinstance(tokens, str):
        raise TypeError(
            "tokens is text, and ids [T] are needed: encode it with the tokenizer, or give it to the adapter."
        )
    array = as_array(tokens)
    if array.ndim != 1:
        hint = " Map forward over a batch with jax.vmap." if array.ndim == 2 else ""
        raise ValueError(f"tokens has shape {listing(array.shape)}, and one sequence [T] is needed.{hint}")
    if array.shape[0] == 0:
        raise ValueError("The prompt is empty: tokens has shape [0], and at least one token is needed.")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"tokens has dtype {array.dtype}, and integers are needed.")
    if on_device(array):
        return jax.lax.convert_element_type(array, np.int32)
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if wrong.size:
        raise ValueError(
            f"tokens[{wrong[0]}] is {array[wrong[0]]}, and this model's vocabulary has ids 0 to {vocab_size - 1}."
        )
    return array.astype(np.int32)


def check_mask(mask: Any, n_tokens: int) -> Any:
    """bool `[T]`, or None; checked by value where the host can see it."""
    if mask is None:
        return None
    array = as_array(mask)
    if array.shape != (n_tokens,):
        raise ValueError(f"mask has shape {listing(array.shape)}, and tokens [{n_tokens}].")
    if array.dtype != bool:
        raise TypeError(f"mask has dtype {array.dtype}, and bool is needed: True at real tokens.")
    if not on_device(array) and not array.any():
        raise ValueError("mask is False everywhere: there is no real token.")
    return array


class Taps:
    """The `tap` of one layer while it is traced: edits what is to be edited, remembers what is to be captured.

    Its arguments are as in `apply_edit`; the edits are numbered by their intervention.

    Attributes:
        seen: site → value, of the sites wanted.
        changed: one bool for each intervention: whether it changed an element here.
    """

    def __init__(
        self,
        edits: list[tuple[int, Edit]],
        wanted: set[str],
        n_interventions: int,
        real: Array | None,
        layer: Array | None,
        keys: Array | None = None,
    ):
        self.edits, self.wanted, self.real, self.layer, self.keys = edits, wanted, real, layer, keys
        self.seen: dict[str, Array] = {}
        self.changed: list[Array] = [jnp.zeros((), bool)] * n_interventions

    def __call__(self, site: str, value: Array) -> Array:
        for number, edit in self.edits:
            if edit.site == site:
                before, value = value, apply_edit(edit, value, self.layer, self.real, self.keys)
                self.changed[number] = self.changed[number] | jnp.any(value != before)
        if site in self.wanted:
            self.seen[site] = value
        return value

    def counts(self) -> Int[Array, "N"]:
        return jnp.stack(self.changed).astype(jnp.int32) if self.changed else jnp.zeros(0, jnp.int32)


def lower(interventions: tuple[Any, ...], sizes: dict[str, int], n_covered: Any = None) -> list[tuple[int, Edit]]:
    """The edits of canonical interventions, numbered by these, for a run of `sizes`; their arrays cover `n_covered` tokens."""
    edits = [(number, edit) for number, item in enumerate(interventions) for edit in item.edits(sizes)]
    return (
        edits if n_covered is None else [(number, limit_to_covered(edit, n_covered, sizes)) for number, edit in edits]
    )


def laid_out(
    model: Llama, tokens: Int[Array, "T"], mask: Bool[Array, "T"] | None
) -> tuple[Int[Array, "T"], tuple[Array, Array], Bool[Array, "T S"]]:
    """The ids that are embedded, the rotation of each token, and which keys each may see, of a padded prompt or a whole one."""
    n_tokens = tokens.shape[0]
    allowed = jnp.tril(jnp.ones((n_tokens, n_tokens), bool))
    if mask is None:
        return tokens, model.rotation(jnp.arange(n_tokens), n_tokens), allowed
    rotation = model.rotation(jnp.maximum(jnp.cumsum(mask) - 1, 0), jnp.sum(mask))
    # Whatever stands in for padding may be no token at all.
    return jnp.where(mask, tokens, 0), rotation, allowed & mask[:, None] & mask[None, :]


@partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def run(
    model: Llama,
    tokens: Int[Array, "T"],
    mask: Bool[Array, "T"] | None,
    interventions: tuple[Any, ...],
    readings: tuple[Reading, ...],
    logits: str = "none",
    remat: bool = False,
    n_covered: Int[Array, ""] | None = None,
) -> Output:
    """The program behind `forward`, for callers that have canonical interventions; their arrays cover `n_covered` tokens."""
    config = model.config
    n_tokens = tokens.shape[0]
    sizes = {**config.sizes, "T": n_tokens, "S": n_tokens}
    edits = lower(interventions, sizes, n_covered)
    wanted = {reading.site.name for reading in readings}

    def taps(layer: Array | None) -> Taps:
        return Taps(edits, wanted, len(interventions), mask, layer)

    tokens, rotation, allowed = laid_out(model, tokens, mask)

    def read(reading: Reading, value: Array) -> Array:
        if reading.positions is not None:
            value = at_positions(value, reading.site.axes.index("T"), reading.positions, mask)
        return value if reading.dtype is None else value.astype(reading.dtype)

    outside = taps(None)
    resid = model.embed_tokens(tokens, outside)

    whole = logits != "none" or any(name in wanted for name in ("final_scale", "final_norm"))
    layered = [reading for reading in readings if reading.site.layered]
    n_run = config.num_hidden_layers if whole else max((max(r.layers) + 1 for r in layered), default=0)
    # Where each layer's value goes in its buffer, which holds the layers asked for and no others; −1: nowhere.
    slots = {
        r.site.name: np.array([r.layers.index(i) if i in r.layers else -1 for i in range(n_run)], np.int32)
        for r in layered
    }

    def layer_step(resid: Array, layer: Array, block: Any) -> tuple[Array, dict[str, Array], Array]:
        tap = taps(layer)
        resid = block(resid, rotation, allowed, config, tap)
        return resid, {r.site.name: read(r, tap.seen[r.site.name]) for r in layered}, tap.counts()

    if remat:
        layer_step = jax.checkpoint(layer_step)

    def step(carry: tuple[Array, dict[str, Array], Array], xs: tuple[Array, Any]) -> tuple[Any, None]:
        resid, buffers, applied = carry
        layer, block = xs
        if block is None:
            block = jax.tree.map(lambda leaf: leaf[layer], model.layers)
        resid, values, counts = layer_step(resid, layer, block)
        buffers = {name: _store(buffers[name], value, slots[name], layer) for name, value in values.items()}
        return (resid, buffers, applied + counts), None

    applied = jnp.zeros(len(interventions), jnp.int32)
    buffers: dict[str, Array] = {}
    if n_run:
        first = jax.eval_shape(
            lambda r: layer_step(r, jnp.int32(0), jax.tree.map(lambda leaf: leaf[0], model.layers))[1], resid
        )
        buffers = {
            r.site.name: jnp.zeros((len(r.layers), *first[r.site.name].shape), first[r.site.name].dtype)
            for r in layered
        }
        # The scan slices the weights where all layers run; where few do, indexing them copies no more than those few.
        blocks = model.layers if n_run == config.num_hidden_layers else None
        (resid, buffers, applied), _ = jax.lax.scan(step, (resid, buffers, applied), (jnp.arange(n_run), blocks))

    out = None
    if whole:
        normalised = model.normalise(resid, outside)
        if logits == "last":
            out = model.logits(at_positions(normalised, 0, (-1,), mask)[0])
        elif logits == "all":
            out = model.logits(normalised)
    activations = {
        r.site.name: buffers[r.site.name] if r.site.layered else read(r, outside.seen[r.site.name]) for r in readings
    }
    return Output(out, activations, applied + outside.counts(), mask)


def _store(buffer: Array, value: Array, slots: np.ndarray, layer: Array) -> Array:
    """Writes one layer's value into its slot of a carried buffer; a layer without one leaves it as it is."""
    slot = jnp.asarray(slots)[layer]

    def write() -> Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)

    # A cond rather than a select, which would hold one value more beside the buffer.
    return jax.lax.cond(slot >= 0, write, lambda: buffer) if (slots < 0).any() else write()
