"""The file of a job: its tables as dataclasses, read and checked before anything slow is imported."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from ..sites import SITES, unknown_site


@dataclass(frozen=True)
class Mesh:
    """How the devices of a host, or of all, are arranged: copies of the model, and devices that each copy is cut over."""

    data: int = 1
    model: int = 1


@dataclass(frozen=True)
class ModelTable:
    """Which model: a directory or a Hub id, tiny-facts where it is left out."""

    source: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    mesh: Mesh | None = None


@dataclass(frozen=True)
class DataTable:
    """Which rows, a file of them or texts, and the column that the model runs on: the first text where it is left out."""

    file: str | None = None
    texts: tuple[str, ...] | None = None
    column: str | None = None


@dataclass(frozen=True)
class StoreTable:
    """Where to."""

    directory: str
    chunk_size: int = 512


@dataclass(frozen=True)
class Capture:
    """What sites hold, under interventions written as those of `--intervene`."""

    sites: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    intervene: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What is measured: the log-probability of the target, or its logit less another's. Both are columns, of one token each."""

    target: str
    against: str | None = None


@dataclass(frozen=True)
class Sweep(Measured):
    """What becomes of it without each head, neuron, MLP or attention, of all layers or some: their outputs are set to zero."""

    each: Literal["head", "neuron", "mlp", "attention"] = "head"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Pairs(Measured):
    """What takes pairs of prompts: a column of corrupted ones."""

    corrupted: str = "corrupted"


@dataclass(frozen=True)
class Patch(Pairs):
    """Activation patching of a site; what is patched at a time as `oculi patch --by` has it."""

    site: str = "resid_pre"
    by: str = "layer"
    direction: Literal["denoising", "noising"] = "denoising"


@dataclass(frozen=True)
class Attribute(Pairs):
    """Attribution patching of some sites."""

    sites: tuple[str, ...] = ("z", "mlp_out")
    steps: int = 1


@dataclass(frozen=True)
class Curve(Pairs):
    """How much of the metric some circuits keep, each in a file as `oculi circuit -o` writes it."""

    circuits: tuple[str, ...] = ()
    ablation: Literal["corrupted", "zero"] = "corrupted"


Computation: TypeAlias = Capture | Sweep | Patch | Attribute | Curve
COMPUTATIONS: dict[str, type[Computation]] = {
    "capture": Capture, "sweep": Sweep, "patch": Patch, "attribute": Attribute, "curve": Curve,
}  # fmt: skip
_TABLES = {"model": ModelTable, "data": DataTable, **COMPUTATIONS, "store": StoreTable}


@dataclass(frozen=True)
class JobFile:
    """A file of a job.

    Attributes:
        kind: which of `COMPUTATIONS` is asked for.
        what: its table.
    """

    model: ModelTable
    data: DataTable
    kind: str
    what: Computation
    store: StoreTable

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of prompts beside the one that the model runs on."""
        return (self.what.corrupted,) if isinstance(self.what, Pairs) else ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The columns of one token each."""
        if not isinstance(self.what, Measured):
            return ()
        return (self.what.target,) if self.what.against is None else (self.what.target, self.what.against)


def read_job(path: Path) -> JobFile:
    """What a file asks for.

    Raises:
        FileNotFoundError: there is none. ValueError: it is no TOML, or has tables, keys or values that cannot be.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not TOML: {error}") from None
    try:
        return _job(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _job(given: Mapping[str, Any]) -> JobFile:
    for name in given:
        if name not in _TABLES:
            raise ValueError(f"there is no table [{name}].{_hint(name, _TABLES)} There are {_listed(_TABLES)}.")
    kinds = [name for name in COMPUTATIONS if name in given]
    if len(kinds) != 1:
        what = f"{' and '.join(f'[{kind}]' for kind in kinds)} are both given" if kinds else "nothing is to be computed"
        raise ValueError(f"{what}: a job has one table of {_listed(COMPUTATIONS)}.")
    tables = {name: _table(cls, given[name], f"[{name}]") for name, cls in _TABLES.items() if name in given}
    missing = [name for name in ("data", "store") if name not in given]
    if missing:
        raise ValueError(f"the table [{missing[0]}] is missing.")
    data, store, what = tables["data"], tables["store"], tables[kinds[0]]
    if (data.file is None) == (data.texts is None):
        raise ValueError("[data] needs either file or texts.")
    if store.chunk_size < 1:
        raise ValueError(f"[store] chunk_size is {store.chunk_size}, and must be at least 1.")
    _check_sites(kinds[0], what)
    return JobFile(tables.get("model", ModelTable()), data, kinds[0], what, store)


def _check_sites(kind: str, what: Computation) -> None:
    """What a computation's own values must be."""
    names = (what.site,) if isinstance(what, Patch) else what.sites if isinstance(what, Capture | Attribute) else ()
    for name in names:
        if name not in SITES:
            raise ValueError(f"[{kind}] {unknown_site(name)}")
    if isinstance(what, Curve) and not what.circuits:
        raise ValueError("[curve] circuits is missing: one file or several, as oculi circuit writes them.")
    if isinstance(what, Attribute) and what.steps < 1:
        raise ValueError(f"[attribute] steps is {what.steps}, and must be at least 1.")


def _table(cls: type[Any], given: object, where: str) -> Any:
    """A table as its dataclass."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}, and a table is needed.")
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    for name in given:
        if name not in fields:
            raise ValueError(f"{where} has no {name!r}.{_hint(name, fields)} There are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} {name} is missing.")
    return cls(**{name: _value(value, hints[name], f"{where} {name}") for name, value in given.items()})


def _value(given: Any, kind: Any, where: str) -> Any:
    """A value as its field has it; a list may be written as its only entry."""
    if get_origin(kind) is UnionType:
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _table(kind, given, where)
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if given not in allowed:
            raise ValueError(
                f"{where} is {given!r}, and must be {' or '.join(map(repr, allowed))}.{_hint(given, allowed)}"
            )
        return given
    if get_origin(kind) is tuple:
        part = get_args(kind)[0]
        values = given if isinstance(given, list) else [given]
        if not all(type(value) is part for value in values):
            raise ValueError(f"{where} is {given!r}, and a list of {_WORDS[part]}s is needed.")
        return tuple(values)
    if type(given) is not kind:
        raise ValueError(f"{where} is {given!r}, and {_ARTICLES[kind]} {_WORDS[kind]} is needed.")
    return given


_WORDS, _ARTICLES = {str: "text", int: "integer"}, {str: "a", int: "an"}


def _hint(given: object, names: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(str(given), list(names), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"[{name}]" for name in names)
