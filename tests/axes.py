"""What `test_axes.py` runs beside the laws of the core: that a wrong axis is found, and that the checks are on."""

from __future__ import annotations

import jax.numpy as jnp
import jaxtyping
import pytest

from oculi_jax.models.decoder.rope import rotate


@pytest.mark.quick
def test_axes_that_differ_are_found() -> None:
    turn = (jnp.ones((5, 3)), jnp.zeros((5, 3)))
    assert rotate(jnp.ones((2, 5, 6)), turn).shape == (2, 5, 6)
    with pytest.raises(jaxtyping.TypeCheckError):
        rotate(jnp.ones((5, 6)), turn)
