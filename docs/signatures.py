"""What griffe, which reads docstrings for the reference, does not know: constructors that `pytree` makes, and names in a row."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any

import griffe

SEVERAL = re.compile(r"^ +[a-z]\w*(?:, [a-z]\w*)+(?=: )", re.M)


class Signatures(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Keeps the names of `attn, mlp: what both are` together, of which griffe takes the second for a type."""
        if obj.docstring:
            obj.docstring.value = SEVERAL.sub(
                lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), obj.docstring.value
            )

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Gives a dataclass of a module the `__init__` that it has."""
        if not isinstance(cls.parent, griffe.Module) or not cls.decorators or "__init__" in cls.members:
            return
        found = getattr(import_module(cls.parent.path), cls.name)
        if not dataclasses.is_dataclass(found):
            return
        taken = [
            griffe.Parameter(
                name,
                annotation=None if x.annotation == "Any" else x.annotation,
                kind=griffe.ParameterKind(x.kind.description),
                default=None if x.default is x.empty else repr(x.default),
            )
            for name, x in inspect.signature(found).parameters.items()
        ]
        me = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(me, *taken), parent=cls))
