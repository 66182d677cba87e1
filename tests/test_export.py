"""The programs export for cpu, cuda and tpu, from any machine."""

import jax
import numpy as np
import pytest
from jax import export

from oculi_jax import CaptureSpec, forward, generate
from oculi_jax.intervention import AttentionKnockout, HeadAblation, SpectraScaler, Steer
from oculi_jax.models.decoder import attention

from .margins import assert_leads
from .test_forward_laws import near
from .tiny import SITES, prompt, tiny_llama
from .tolerances import ROUNDING


def written(a):
    return [SpectraScaler(0, 1, a), Steer(1, np.ones(24), a, positions=[3, 12])]


PROGRAMS = {
    "plain": lambda m, t, a: forward(m, t).logits,
    "capturing": lambda m, t, a: forward(m, t, capture=(CaptureSpec(("pattern", "z"), layers=[2]), "resid_post")).activations,
    "every site": lambda m, t, a: forward(m, t, capture=tuple(SITES)).activations,
    "intervened": lambda m, t, a: forward(
        m, t, (HeadAblation(1, 2), SpectraScaler(0, 1, a), AttentionKnockout(2, 0, -1, 0), Steer(1, np.ones(24), a)), logits="last"
    ).logits,
    "generation": lambda m, t, a: generate(m, t, 4, written(a), stop_tokens=()),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_export_for_every_platform_and_run(name: str) -> None:
    model, alpha = tiny_llama(), np.float32(1.5)
    leaves, structure = jax.tree.flatten(model)

    def program(leaves, tokens, alpha):
        return PROGRAMS[name](jax.tree.unflatten(structure, leaves), tokens, alpha)

    if name == "generation":  # tokens that no rounding changes
        text = [*map(int, prompt()), *map(int, program(leaves, prompt(), alpha))]
        assert_leads(forward(model, text, written(alpha)).logits[len(prompt()) - 1 : -1])
    exported = export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(leaves, prompt(), alpha)
    assert {"cpu", "cuda", "tpu"} == set(exported.platforms) and exported.mlir_module()
    for got, want in zip(
        jax.tree.leaves(exported.call(leaves, prompt(), alpha)),
        jax.tree.leaves(program(leaves, prompt(), alpha)),
        strict=True,
    ):
        near(got, want, ROUNDING)


def test_half_precision_exports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a CPU; and from a machine with a GPU, of a short prompt, fused in part of the platforms, and step by step."""
    leaves, structure = jax.tree.flatten(tiny_llama(dtype=jax.numpy.bfloat16, head_dim=8, max_position_embeddings=2048))

    def is_fused(how: str, n_tokens: int) -> bool:
        program = jax.jit(
            lambda leaves, tokens: forward(jax.tree.unflatten(structure, leaves), tokens, attention=how).logits
        )
        exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(leaves, prompt(n_tokens))
        assert {"cpu", "cuda", "tpu"} == set(exported.platforms)
        return "accumulation_type" in exported.mlir_module()  # which a product has that says how it adds: the library's

    assert not is_fused("auto", 1024)
    monkeypatch.setattr(attention, "accelerator", lambda: "cuda")
    assert is_fused("auto", 64) and not is_fused("explicit", 1024)
