"""`--intervene kind:field=value,…`: interventions in one line of text."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oculi_jax

from ..sites import find_site
from .common import config_of

# What can be written in a line: the class, those of its fields that must be given, and those that may be. These are numbers,
# a site's name, and the file of a direction, which may say the others itself; written out, so that a line is read without the
# library.
KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "spectra": ("SpectraScaler", ("layer", "head", "alpha"), ()),
    "head": ("HeadAblation", ("layer", "head"), ()),
    "queries": ("QScaler", ("layer", "head", "alpha"), ()),
    "keys": ("KScaler", ("layer", "kv_head", "alpha"), ()),
    "ablate": ("Ablation", ("site", "layer"), ("index",)),
    "steer": ("Steer", ("file",), ("layer", "scale", "site")),
}
NAMES, STRENGTHS = ("site", "file"), ("alpha", "scale")  # all other fields are integers


def usage() -> str:
    """Each kind with its fields."""
    return "; ".join(map(_form, KINDS))


def _form(kind: str) -> str:
    _, needed, optional = KINDS[kind]
    return f"{kind}:{','.join(f'{name}=…' for name in (*needed, *optional))}"


def chosen(model: str | None, lines: Sequence[str]) -> list[Any]:
    """The interventions of several lines; raises for those that a model cannot have, by its config, before it is loaded."""
    read = [read_line(line) for line in lines]
    if not read:
        return []
    config = config_of(model)
    found = [getattr(oculi_jax, name)(**values) for name, values in read]
    if config is not None:
        import numpy as np

        from ..intervention.canonical import canonical
        from ..intervention.frame import Frame

        canonical(tuple(found), Frame(config, np.dtype(np.float32), 1, None))
    return found


def parse(text: str) -> Any:
    """An intervention from `kind:field=value,…`, for instance `spectra:layer=15,head=5,alpha=2.5`."""
    name, values = read_line(text)
    return getattr(oculi_jax, name)(**values)


def read_line(text: str) -> tuple[str, dict[str, Any]]:
    """The class's name and its fields."""
    kind, _, rest = text.partition(":")
    kind = kind.strip()
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--intervene {text!r}: there is no kind {kind!r}.{hint} There are {usage()}.")
    cls, needed, optional = KINDS[kind]
    fields = (*needed, *optional)
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in fields:
            raise ValueError(f"--intervene {text!r}: {part!r} is not one of {', '.join(f'{f}=…' for f in fields)}.")
        if name in values:
            raise ValueError(f"--intervene {text!r}: {name} is given twice.")
        values[name] = _value(name, value, f"--intervene {text!r}: {name}")
    if "site" in values and not find_site(values["site"])[0].layered:
        values.setdefault("layer", None)  # it occurs once, outside the layers
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"--intervene {text!r}: {', '.join(missing)} is missing; write {_form(kind)}.")
    if "file" in values:
        values = {**_direction(values.pop("file"), text), **values}
        if "layer" not in values:
            raise ValueError(
                f"--intervene {text!r}: layer is missing: this file holds a direction and not where it belongs."
            )
    return cls, values


def _value(name: str, text: str, where: str) -> Any:
    if name in NAMES:
        return text
    try:
        number = float(text) if name in STRENGTHS else int(text)
    except ValueError:
        what = "a number" if name in STRENGTHS else "an integer"
        raise ValueError(f"{where} is {text!r}, and {what} is needed.") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {text}, and a finite number is needed.")
    return number


def _direction(name: str, text: str) -> dict[str, Any]:
    """The fields that a file gives: NumPy's .npy or safetensors with one array, a direction; or a `Steer` that was saved."""
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--intervene {text!r}: there is no file {name!r}.")
    import numpy as np

    if path.suffix == ".npy":
        try:
            found = {"vector": np.load(path, allow_pickle=False)}
        except (ValueError, EOFError) as error:
            raise ValueError(f"--intervene {text!r}: {name!r} is no .npy file of numbers: {error}.") from None
    else:
        from ..utils.files import read_tensors

        arrays, header = read_tensors(path)
        found = (
            _saved(path, text) if "interventions" in header.get("format", "") else {"vector": _only(arrays, name, text)}
        )
    vector = found["vector"]
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype.kind != "f":
        what = f"{list(vector.shape)} of {vector.dtype}" if isinstance(vector, np.ndarray) else repr(vector)
        raise ValueError(f"--intervene {text!r}: {name!r} holds {what}, and a direction [E] of floats is needed.")
    return found


def _only(arrays: dict[str, Any], name: str, text: str) -> Any:
    if len(arrays) != 1:
        raise ValueError(
            f"--intervene {text!r}: {name!r} holds {', '.join(arrays) or 'nothing'}, and one array is needed."
        )
    return next(iter(arrays.values()))


def _saved(path: Path, text: str) -> dict[str, Any]:
    """The fields of a `Steer`, as `oculi steer` and `oculi_jax.save` write it."""
    given = oculi_jax.load(path)
    items = given if isinstance(given, list | tuple) else [given]
    if len(items) != 1 or not isinstance(items[0], oculi_jax.Steer):
        names = ", ".join(type(item).__name__ for item in items)
        raise ValueError(f"--intervene {text!r}: {str(path)!r} holds {names}, and one Steer is needed.")
    return {part.name: getattr(items[0], part.name) for part in dataclasses.fields(items[0])}
