"""Interventions as files hold them: arrays, and a description that is read and never run."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jax.core import Tracer

from ..arrays import as_array
from .each import PerLayer, PerPrompt
from .edit import Edit
from .named import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Freeze,
    HeadAblation,
    KScaler,
    QScaler,
    SpectraScaler,
    Steer,
)
from .protocol import Interventions, as_list
from .rank_one import RankOne
from .subspace import Subspace

# What JSON writes: plain values as they are, everything else as an object of one entry, which says what it is.
Node: TypeAlias = bool | int | float | str | dict[str, Any] | None

CLASSES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Ablation, ActivationPatch, AttentionKnockout, Blend, DirectionAblation, Edit, Freeze, HeadAblation, KScaler, QScaler,
        RankOne, SpectraScaler, Steer, Subspace,
    )
}  # fmt: skip
_EACH: dict[str, type[Any]] = {"PerLayer": PerLayer, "PerPrompt": PerPrompt}


def packed(interventions: Interventions) -> tuple[dict[str, np.ndarray], Node]:
    """The arrays of an intervention or a list of them, each under a name, and all else as a description.

    Raises:
        TypeError: a class or a function of one's own, which is code, and a traced array.
    """
    arrays: dict[str, np.ndarray] = {}
    for item in as_list(interventions):
        if type(item) not in CLASSES.values():
            raise TypeError(
                f"A {type(item).__name__} cannot be saved: a file holds data, and names of classes that are known where it is "
                f"read: {', '.join(CLASSES)}."
            )
        if getattr(item, "fn", None) is not None:
            raise TypeError(
                "An Edit with a function of one's own, fn, cannot be saved: a file holds data, and a function is code. Save its "
                "value, and write the Edit anew where it is read."
            )
    return arrays, _node(interventions, (), arrays)


def _node(value: Any, path: tuple[str, ...], arrays: dict[str, np.ndarray]) -> Node:
    name = ".".join(path) or "value"
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, list | tuple):
        parts = [_node(part, (*path, str(number)), arrays) for number, part in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if type(value) in _EACH.values():
        return {type(value).__name__: _node(value.x, path, arrays)}
    if type(value) is Freeze:  # of a whole run, what is held
        run = getattr(value.run, "activations", value.run)
        value = dataclasses.replace(value, run={site: run[site] for site in value.sites})
    if type(value) in CLASSES.values():
        fields = {x.name: getattr(value, x.name) for x in dataclasses.fields(value)}
        return {type(value).__name__: {key: _node(part, (*path, key), arrays) for key, part in fields.items()}}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _node(part, (*path, str(key)), arrays) for key, part in value.items()}}
    if isinstance(value, Tracer) or not hasattr(value, "__array__"):
        raise TypeError(f"{name} is {value!r}, and what a file holds are arrays, numbers, names and sets of these.")
    arrays[name] = np.asarray(as_array(value), order="C")
    return {"array": name}


def unpacked(node: Node, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `packed` was given, its arrays as NumPy's; ValueError for a description of anything else."""
    if node is None or type(node) in (bool, int, float, str):
        return node
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"it describes {str(node)[:60]!r}, which is nothing that is known here.")
    kind, inner = next(iter(node.items()))
    if kind in ("list", "tuple") and isinstance(inner, list):
        found = [unpacked(part, arrays) for part in inner]
        return tuple(found) if kind == "tuple" else found
    if (
        kind == "range"
        and isinstance(inner, list)
        and len(inner) == 3
        and all(type(x) is int for x in inner)
        and inner[2]
    ):
        return range(*inner)
    if kind == "dict" and isinstance(inner, dict):
        return {key: unpacked(part, arrays) for key, part in inner.items()}
    if kind == "array" and isinstance(inner, str):
        if inner not in arrays:
            raise ValueError(f"it lacks the array {inner!r}.")
        return arrays[inner]
    if kind in _EACH and not isinstance(inner, list):
        return _EACH[kind](unpacked(inner, arrays))
    if kind not in CLASSES or not isinstance(inner, dict):
        near = difflib.get_close_matches(kind, CLASSES, 1)
        hint = f" Is {near[0]} meant?" if near else ""
        raise ValueError(f"it holds a {kind!r}, which is no intervention that is known here.{hint}")
    return _made(CLASSES[kind], {key: unpacked(part, arrays) for key, part in inner.items()})


def _made(cls: type[Any], fields: dict[str, Any]) -> Any:
    there = {x.name for x in dataclasses.fields(cls)}
    if set(fields) != there:
        raise ValueError(
            f"it holds a {cls.__name__} of {', '.join(sorted(fields)) or 'nothing'}, and its fields are {', '.join(sorted(there))}."
        )
    for x in dataclasses.fields(cls):
        value = fields[x.name]
        names = value if isinstance(value, tuple) else (value,)
        if x.metadata.get("static") and not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"{cls.__name__}.{x.name} is {value!r}, and a name is needed.")
    return cls(**fields)
