"""`--intervene kind:field=value,…`: interventions in one line of text."""

from __future__ import annotations

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..intervention import Ablation, HeadAblation, KScaler, QScaler, SpectraScaler, Steer
from ..intervention.fields import Strength, Vector
from ..intervention.indices import Index
from ..sites import find_site
from ..utils.files import read_tensors

# What can be written in a line: those whose fields are numbers (and a site's name).
KINDS: dict[str, type] = {
    "spectra": SpectraScaler,
    "head": HeadAblation,
    "queries": QScaler,
    "keys": KScaler,
    "ablate": Ablation,
    "steer": Steer,
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
    if "file" in values:
        values["vector"] = _vector(values.pop("file"), text)
    if "site" in values and not find_site(values["site"])[0].layered:
        values.setdefault("layer", None)  # it occurs once, outside the layers
    if missing := [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and not (name == "file" and "vector" in values)
    ]:
        raise ValueError(
            f"--intervene {text!r}: {', '.join(missing)} is missing; write {kind}:{','.join(f'{f}=…' for f in fields)}."
        )
    return cls(**values)


def _fields(cls: Any) -> dict[str, Any]:
    """The fields that a line can hold: numbers and names."""
    simple = (Index, Strength, type(None))
    found = {field.name: field for field in dataclasses.fields(cls) if isinstance(field.metadata["kind"], simple)}
    if cls is Steer:  # its direction is in a file
        found = {"file": dataclasses.fields(cls)[1], **found}
    return found


def _value(field: Any, text: str, where: str) -> Any:
    kind = field.metadata["kind"]
    if kind is None or isinstance(kind, Vector):
        return text
    try:
        number = int(text) if isinstance(kind, Index) else float(text)
    except ValueError:
        what = "an integer" if isinstance(kind, Index) else "a number"
        raise ValueError(f"{where} is {text!r}, and {what} is needed.") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {text}, and a finite number is needed.")
    return number


def _vector(name: str, text: str) -> np.ndarray:
    """A direction from a file: NumPy's .npy, or safetensors with one array."""
    path = Path(name).expanduser()
    if path.suffix == ".npy":
        try:
            vector = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"--intervene {text!r}: there is no file {name!r}.") from None
        except (ValueError, EOFError) as error:
            raise ValueError(f"--intervene {text!r}: {name!r} is no .npy file of numbers: {error}.") from None
    else:
        arrays, _ = read_tensors(path)
        if len(arrays) != 1:
            raise ValueError(
                f"--intervene {text!r}: {name!r} holds {', '.join(arrays) or 'nothing'}, and one array is needed."
            )
        (vector,) = arrays.values()
    if vector.ndim != 1 or vector.dtype.kind != "f":
        raise ValueError(
            f"--intervene {text!r}: {name!r} holds {list(vector.shape)} of {vector.dtype}, and a direction [E] of floats is needed."
        )
    return vector
