"""`forward`, the one pure function: a model, tokens and interventions in; logits and activations out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .arrays import on_device
from .backends import find_model, programs_of
from .capture import readings_of
from .intervention.canonical import canonical
from .intervention.frame import Frame
from .output import Output
from .prompts import check_mask, check_tokens

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .capture import CaptureLike
    from .intervention.protocol import Interventions
    from .models.llama.model import Llama

LOGITS = ("all", "last", "none")


def forward(
    model: Llama,
    tokens: ArrayLike,
    interventions: Interventions = (),
    *,
    capture: CaptureLike = (),
    logits: Literal["all", "last", "none"] = "all",
    mask: ArrayLike | None = None,
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

    Examples:
        >>> out = forward(model, ids, Ablation("mlp_out", 0), capture="pattern")
        >>> out["pattern"].shape, says(out)
        ((4, 6, 6, 6), 'warm')
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
    return programs_of(model).run(model, tokens, mask, edits, readings, logits=logits, remat=bool(remat))
