"""`forward`, the one pure function: a model, tokens and interventions in; logits and activations out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .arrays import on_device
from .backends import EXIST, find_model, programs_of
from .capture import readings_of
from .intervention.canonical import canonical
from .intervention.frame import Frame
from .output import Output
from .prompts import check_mask, check_tokens
from .rules import check_rules
from .tail import check_start

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .capture import CaptureLike
    from .intervention.protocol import Interventions
    from .models.decoder.model import Decoder
    from .rules import Rules

LOGITS = ("all", "last", "none")


def forward(
    model: Decoder,
    tokens: ArrayLike,
    interventions: Interventions = (),
    *,
    capture: CaptureLike = (),
    logits: Literal["all", "last", "none"] = "all",
    mask: ArrayLike | None = None,
    remat: bool = False,
    attention: Literal["auto", "explicit"] = "auto",
    rules: Rules | None = None,
    start: tuple[int, ArrayLike] | None = None,
) -> Output:
    """Runs a model on one sequence, with edits, and returns whatever is asked for. Pure; compiled once a kind of call.

    `capture`, `logits`, `remat` and `attention` are static, as are the kinds of the interventions, the length and the layer of
    `start`; all else is data, so other layers, heads, positions and strengths run the same program. For a batch, `vmap` it over
    `tokens`.

    Args:
        model: a model of any family, or Hugging Face's own, which torch runs where it lies.
        tokens: ids `[T]`, integers.
        interventions: one intervention or a list of them, applied in order (see `oculi_jax.intervention`).
        capture: site names, a `CaptureSpec`, or a tuple of those.
        logits: `"all"`, `"last"` (at the last real token) or `"none"`; for the last, layers that no capture needs are
            not run.
        mask: bool `[T]`, True at real tokens. Padding on either side changes nothing at the real ones.
        remat: recompute each layer in the backward pass instead of keeping its intermediates.
        attention: `"auto"` fuses it, in half precision on an accelerator, where nobody reads or edits `scores`, `allowed` or
            `pattern`: no scores are kept, and values differ by the dtype's rounding. Derivatives of any order remain those of
            the steps. (A model that torch runs has torch's own, in any dtype.) `"explicit"` never fuses: for exporting to other
            platforms, and for comparing.
        rules: other derivatives, of `oculi_jax.rules`, for whoever differentiates this: data; no value changes by them.
        start: `(layer, resid)`: the run begins with `resid` `[T, E]` as `resid_pre` of that layer, and earlier ones do not run; of
            the ids, none is looked at. What edits or captures anything before it is refused (a layer that is only known on the
            device acts nowhere, which `applied` shows).

    Returns:
        An `Output`.

    Raises:
        ValueError, TypeError: something that can be seen to be wrong, before anything runs.

    Examples:
        >>> out = forward(model, ids, Ablation("mlp_out", 0), capture="pattern")
        >>> out["pattern"].shape, says(out)
        ((4, 6, 6, 6), 'warm')
        >>> says(forward(model, ids, start=(2, run["resid_pre"][2])))  # from layer 2 on, with what another prompt left there
        'Paris'
    """
    if logits not in LOGITS:
        raise ValueError(f"logits is {logits!r}, and must be one of {', '.join(map(repr, LOGITS))}.")
    if attention not in tuple(EXIST):
        raise ValueError(
            f"attention is {attention!r}, and must be 'auto' (fused where nobody looks inside) or 'explicit' (never)."
        )
    model = find_model(model)
    config = model.config
    tokens = check_tokens(tokens, config.vocab_size)
    mask = check_mask(mask, tokens.shape[0])
    frame = Frame(config, model.dtype, tokens.shape[0], mask)
    edits = canonical(interventions, frame)
    n_real = tokens.shape[0] if mask is None or on_device(mask) else int(mask.sum())
    readings = readings_of(capture, config, n_real)
    rules = None if rules is None else check_rules(rules, config)
    first, resid = (0, None) if start is None else check_start(start, frame, edits, readings)
    return programs_of(model).run(
        model, tokens, mask, edits, readings, logits=logits, remat=bool(remat), attention=attention, rules=rules,
        start=first, resid=resid,
    )  # fmt: skip
