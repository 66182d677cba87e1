"""What an intervention is, and how one or several of them are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from .edit import Edit


@runtime_checkable
class Intervention(Protocol):
    """What can be run: a frozen dataclass of `pytree`, whose fields `field` declares, and which lowers to edits.

    `field(kind)` is data, checked and made canonical by its kind (`Index`, `Strength`, `Positions`, `Values`, …), and
    `field(None)` is static. Four names mean more than their kind: `site` is the site whose axes `Values` have and whose
    heads `head` counts; a `head` that is given takes the head axis from `Values`; a `layer` that is None stands for every
    layer, in which `Values` lead with `L`; `positions` are where it acts.

    A method `check()`, where there is one, raises ValueError or TypeError for static fields that make no intervention. What
    is data is checked when it is run, against the model and the prompt, and refused by the same two errors.

    Examples:
        >>> @pytree
        ... class Silence:  # an intervention of one's own: the MLPs of some layers
        ...     layers: object = field(Layer())
        ...     def edits(self, sizes):
        ...         return (Edit("mlp_out", "set", self.layers, value=0.0),)
        >>> isinstance(Silence(0), Intervention), says(forward(model, ids, Silence(0)))
        (True, 'warm')
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def edits(self, sizes: Mapping[str, int]) -> tuple[Edit, ...]:
        """The edits that it stands for, in order, in a run of these sizes (letter → size)."""
        ...


# What functions take: one intervention, or several in the order in which they act.
Interventions: TypeAlias = Intervention | Sequence[Intervention]


def as_list(interventions: Interventions) -> list[Intervention]:
    """Interventions as a list, where one was given alone.

    Raises:
        TypeError: what is given is no intervention, or a list that holds something else.
    """
    if isinstance(interventions, Intervention | type):
        interventions = (interventions,)
    if not isinstance(interventions, list | tuple):
        raise TypeError(
            f"interventions is a {type(interventions).__name__}; give an intervention or a list of interventions."
        )
    for number, item in enumerate(interventions):
        if isinstance(item, type):
            raise TypeError(f"interventions[{number}] is the class {item.__name__}; give an instance of it.")
        if not isinstance(item, Intervention):
            raise TypeError(f"interventions[{number}] is a {type(item).__name__}, not an intervention.")
    return list(interventions)


def are_interventions(given: object) -> TypeGuard[Interventions]:
    """Whether one intervention is given, or a list of at least one, and not token ids or texts."""
    items = given if isinstance(given, list | tuple) else (given,)
    return len(items) > 0 and all(isinstance(item, Intervention) for item in items)
