"""What is cheaper to trace gives what JAX's own forms give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax.traced import entry, mapped

ROWS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("out_axes", [0, 1])
def test_a_map_is_vmaps_whether_of_one_or_of_several(n: int, out_axes: int) -> None:
    given = {"rows": ROWS[:n], "scale": np.float32(2)}, (np.arange(n), None)

    def fn(tree: dict[str, Any], rest: tuple[Any, None]) -> tuple[Any, Any]:
        return jnp.sum(tree["rows"] * tree["scale"], axis=0), rest[0][None] + 1

    axes = {"rows": 0, "scale": None}, (0, None)
    for run in (mapped, lambda fn, size, *axes: jax.vmap(fn, *axes)):
        found = jax.jit(run(fn, n, axes, out_axes))(*given)
        np.testing.assert_array_equal(found[0], np.moveaxis(2 * ROWS[:n].sum(1), 0, out_axes))
        np.testing.assert_array_equal(found[1], np.moveaxis(np.arange(n)[:, None] + 1, 0, out_axes))


@pytest.mark.quick
def test_an_entry_is_what_indexing_finds() -> None:
    found = jax.jit(lambda x, i: (entry(x, i), entry(ROWS, i)))(ROWS, np.int32(1))
    for x in found:
        np.testing.assert_array_equal(x, ROWS[1])
