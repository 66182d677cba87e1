"""`Rows`: interventions of prompts × variants, as every program takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from ..pytrees import pytree, static
from ..traced import mapped
from .broadcast import Carried
from .canonical import by_value, field_of_prompts, sweep_axes, with_leaves
from .frame import Frame
from .protocol import as_list

if TYPE_CHECKING:
    from ..intervention.protocol import Interventions


@pytree
class Rows:
    """Canonical interventions of prompts × variants: what they share is there once, what differs leads with their axes.

    Attributes:
        leaves: of their tree; each has an axis of prompts, one of variants, both in this order, or neither.
        tree: the tree.
        by_prompt, by_variant: for each leaf, whether it has the axis.
    """

    leaves: list[Any]
    tree: Any = static()
    by_prompt: tuple[bool, ...] = static()
    by_variant: tuple[bool, ...] = static()

    @classmethod
    def single(cls, interventions: tuple[Any, ...]) -> Rows:
        """Canonical interventions of one run, as those of one prompt and one variant."""
        leaves, tree = jax.tree.flatten(interventions)
        return cls(leaves, tree, (False,) * len(leaves), (False,) * len(leaves))

    @classmethod
    def of(cls, interventions: Interventions, frames: Sequence[Frame]) -> tuple[Rows, tuple[int, ...]]:
        """Checks interventions and makes them canonical.

        Args:
            interventions: one or a list, as users give them.
            frames: of each prompt.

        Returns:
            The rows, and the axes that their variants make.
        """
        given = [by_value(item) for item in as_list(interventions)]
        axes = sweep_axes(given, len(frames))
        frames = [dataclasses.replace(frame, axes=axes) for frame in frames]
        by_prompt: list[bool] = []
        by_variant: list[bool] = []

        def leaf(item: Any, data: Any, where: str) -> Any:
            found, leads = field_of_prompts(data.metadata["kind"], getattr(item, data.name), item, frames, where)
            carried = isinstance(found, Carried)
            n_leaves = len(jax.tree.leaves(found))
            by_prompt.extend([leads] * n_leaves)
            by_variant.extend([carried] * n_leaves)
            return found.rows if carried else found

        leaves, tree = jax.tree.flatten(with_leaves(given, leaf))
        return cls(leaves, tree, tuple(by_prompt), tuple(by_variant)), axes

    @property
    def n_interventions(self) -> int:
        return len(jax.tree.unflatten(self.tree, list(range(len(self.leaves)))))

    def split(self) -> tuple[Rows, Rows]:
        """The interventions without an axis of variants, and the others; all of them where none has one."""
        numbers = jax.tree.unflatten(self.tree, list(range(len(self.leaves))))
        varies = [any(self.by_variant[i] for i in jax.tree.leaves(item)) for item in numbers]
        if not any(varies):
            varies = [True] * len(varies)

        def of(which: bool) -> Rows:
            chosen = tuple(item for item, own in zip(numbers, varies, strict=True) if own == which)
            places, tree = jax.tree.flatten(chosen)
            by_prompt, by_variant = (tuple(leads[i] for i in places) for leads in (self.by_prompt, self.by_variant))
            return Rows([self.leaves[i] for i in places], tree, by_prompt, by_variant)

        return of(False), of(True)

    def map(self, fn: Callable[..., Any], size: int, axis_name: str | None = None) -> Callable[..., Any]:
        """`fn(interventions, prompt, *own)` over prompts and, inside, `size` variants.

        Returns:
            A function of `prompt`, whose first leaf leads with the prompts; of its axes (0 for what leads with them, else None;
            a tree of those where it is a tree); of arrays `own` that lead with prompts × variants; and of `alike`, whether
            these lead with the variants alone, and are every prompt's. What it returns leads with these two axes.
        """
        prompt_axes = [0 if lead else None for lead in self.by_prompt]

        def of_prompt(leaves: list[Any], prompt: Any, own: tuple[Any, ...]) -> Any:
            return self._each_variant(lambda items, own: fn(items, prompt, *own), size, axis_name)(leaves, own)

        def call(prompt: Any, axes: Any, *own: Any, alike: bool = False) -> Any:
            n_prompts = len(jax.tree.leaves(prompt)[0])
            leads = prompt_axes, axes, None if alike else 0
            return mapped(of_prompt, n_prompts, leads)(self.leaves, prompt, own)

        return call

    def map_variants(self, fn: Callable[..., Any], size: int, axis_name: str | None = None) -> Any:
        """`fn(interventions)` over `size` variants that are the same for every prompt; what it returns leads with them."""
        assert not any(self.by_prompt)
        return self._each_variant(lambda items, _: fn(items), size, axis_name)(self.leaves, ())

    def _each_variant(self, fn: Callable[..., Any], size: int, axis_name: str | None) -> Callable[..., Any]:
        axes = [0 if lead else None for lead in self.by_variant]

        def one(leaves: list[Any], own: tuple[Any, ...]) -> Any:
            return fn(jax.tree.unflatten(self.tree, leaves), own)

        return mapped(one, size, (axes, 0), axis_name=axis_name)
