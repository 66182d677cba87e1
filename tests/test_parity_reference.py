"""Every site of the committed tiny checkpoints against what Hugging Face computed on them; no torch, no network."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from oculi_jax import forward
from oculi_jax.models.llama import Llama

from .tiny import SITES
from .tolerances import assert_parity, parity

pytestmark = pytest.mark.quick

WEIGHTS = Path(__file__).parents[1] / "weights"


@pytest.mark.numerical
@pytest.mark.parametrize("name", ["tiny-gqa", "tiny-mqa"])
def test_every_site_agrees_with_hugging_face(name: str) -> None:
    model = Llama.from_pretrained(WEIGHTS / name, dtype="float32")
    reference = load_file(WEIGHTS / name / "reference.safetensors")
    mask = reference["mask"]
    out = forward(model, reference["tokens"], capture=tuple(SITES), mask=mask)
    assert set(out.activations) == set(SITES)
    assert_parity(parity(out.activations, out.logits, reference, mask))
    assert np.array_equal(out.activations["allowed"], reference["allowed"])
    assert not np.asarray(out.activations["pattern"])[:, :, ~mask].any()


def test_auto_dtype_is_the_checkpoints_own() -> None:
    assert Llama.from_pretrained(WEIGHTS / "tiny-gqa").dtype == "float32"
    assert Llama.from_pretrained(WEIGHTS / "tiny-mqa").dtype == "bfloat16"
