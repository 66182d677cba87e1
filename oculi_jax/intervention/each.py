"""`PerLayer` and `PerPrompt`: what says that an array leads with the layers, or with the prompts. Never guessed from a shape.
And `Whole`, which says inside an edit that an array has no axes of the site.
"""

from __future__ import annotations

from typing import Any

import jax

from ..pytrees import pytree


@pytree
class PerLayer:
    """One entry for each layer of the model: a whole run's capture, a direction for each layer.

    The row of the layer where the intervention acts is taken inside the program, and a sweep's variants share it.

    Args:
        x: `[L, …]`, then what the field takes: `[L, E]` for a direction, `[L, H, T, D]` for a value at `z`. A value holds the
            head axis also where `head` is given, as a capture does.

    Examples:
        >>> says(forward(model, ids, ActivationPatch("resid_post", 2, PerLayer(run["resid_post"]))))  # row 2 of [L, T, E]
        'Paris'
    """

    x: Any

    def __repr__(self) -> str:
        return f"PerLayer({_what(self.x)})"


@pytree
class PerPrompt:
    """One entry for each prompt, where several are given: in `sweep`, `generate`, patching and the adapter.

    Args:
        x: an array that leads with `B` and then is what the field takes; a list of `B` such things, of sets for instance; or a
            `PerLayer` of `[B, L, …]`. The outermost axis is the prompts', whatever the container: `[1, 4, 2]` is one position
            for each of three prompts, `[[1, 2], [3]]` a set for each of two.

    Examples:
        >>> patch = ActivationPatch("resid_pre", 2, PerLayer(run["resid_pre"]), positions=PerPrompt([4, -1]))
        >>> sweep(model, [ids, other], patch, metric).shape
        (2,)
    """

    x: Any

    def of(self, number: int) -> Any:
        """The entry of one prompt.

        Examples:
            >>> PerPrompt([4, -1]).of(1)
            -1
        """
        if isinstance(self.x, list | tuple | range):
            return self.x[number]
        return jax.tree.map(lambda leaf: leaf[number], self.x)

    def check(self, n_prompts: int, where: str) -> None:
        """ValueError where it does not hold an entry for each of so many prompts."""
        if isinstance(self.x, list | tuple | range):
            lengths = {len(self.x)}
        else:
            leaves = jax.tree.leaves(self.x)
            if not leaves or not all(getattr(leaf, "ndim", 0) for leaf in leaves):
                raise ValueError(
                    f"{where} is {self!r}, and a PerPrompt holds one entry for each prompt: a list or arrays."
                )
            lengths = {leaf.shape[0] for leaf in leaves}
        if lengths != {n_prompts}:
            have = " and ".join(map(str, sorted(lengths)))
            raise ValueError(f"{where} is a PerPrompt of {have} entries, and there are {n_prompts} prompts.")

    def __repr__(self) -> str:
        return f"PerPrompt({_what(self.x)})"


@pytree
class Whole:
    """In the value of an edit whose function is `site_shaped`: an array that has not the site's axes, and is never cut to tokens.

    Args:
        x: an array, or a `PerLayer` of one for each layer.
    """

    x: Any


def _what(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return repr(x) if shape is None else f"{list(shape)}"
