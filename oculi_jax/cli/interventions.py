"""`--intervene kind:field=value,…`: interventions in one line of text."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from ..intervention import Ablation, HeadAblation, KScaler, QScaler, SpectraScaler
from ..intervention.fields import Strength
from ..intervention.indices import Index
from ..sites import find_site

# What can be written in a line: those whose fields are numbers (and a site's name).
KINDS: dict[str, type] = {
    "spectra": SpectraScaler,
    "head": HeadAblation,
    "queries": QScaler,
    "keys": KScaler,
    "ablate": Ablation,
}


def usage() -> str:
    """Each kind with its fields."""
    return "; ".join(f"{kind}:{','.join(f'{name}=…' for name in _fields(cls))}" for kind, cls in KINDS.items())


def parse(text: str) -> Any:
    """An intervention from `kind:field=value,…`, for instance `spectra:layer=15,head=5,alpha=2.5`."""
    kind, _, rest = text.partition(":")
    kind = kind.strip()
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--intervene {text!r}: there is no kind {kind!r}.{hint} There are {usage()}.")
    cls = KINDS[kind]
    fields = _fields(cls)
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in fields:
            raise ValueError(f"--intervene {text!r}: {part!r} is not one of {', '.join(f'{f}=…' for f in fields)}.")
        if name in values:
            raise ValueError(f"--intervene {text!r}: {name} is given twice.")
        values[name] = _value(fields[name], value, f"--intervene {text!r}: {name}")
    if "site" in values and not find_site(values["site"])[0].layered:
        values.setdefault("layer", None)  # it occurs once, outside the layers
    if missing := [
        name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING
    ]:
        raise ValueError(
            f"--intervene {text!r}: {', '.join(missing)} is missing; write {kind}:{','.join(f'{f}=…' for f in fields)}."
        )
    return cls(**values)


def _fields(cls: Any) -> dict[str, Any]:
    """The fields that a line can hold: numbers and names."""
    simple = (Index, Strength, type(None))
    return {field.name: field for field in dataclasses.fields(cls) if isinstance(field.metadata["kind"], simple)}


def _value(field: Any, text: str, where: str) -> Any:
    kind = field.metadata["kind"]
    if kind is None:
        return text
    try:
        number = int(text) if isinstance(kind, Index) else float(text)
    except ValueError:
        what = "an integer" if isinstance(kind, Index) else "a number"
        raise ValueError(f"{where} is {text!r}, and {what} is needed.") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {text}, and a finite number is needed.")
    return number
