"""Programs for 64 devices at the shapes of large models: what they send in their loops over layers, and what a device holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from oculi_jax import plan, sweep
from oculi_jax.causal import attribution_patching
from oculi_jax.intervention import HeadAblation
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import Llama

from .lowered import MODELS, PROMPTS, VARIANTS, N, T
from .test_forward_laws import near
from .tiny import prompt, tiny_llama

METRIC = logit_difference(3, 41)
# Of a device: its share of the prompts of a set, of the variants of two prompts, of these on half their tokens, and two prompts.
ROWS = {
    "forward": PROMPTS // N * T,
    "sweep": 2 * VARIANTS // N * T,
    "softmax": 2 * VARIANTS // N * T,
    "resumed": VARIANTS // N * T,
    "base": 2 * T,
    "attribution": 2 * PROMPTS // N * T,
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    flags = f"--xla_force_host_platform_device_count={N * N} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-m", "tests.lowered"], Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def test_layers_send_two_sums_and_gather_nothing(compiled: dict[str, dict[str, Any]]) -> None:
    """Of the residual stream of a device's own rows, forward; and backward, where the CPU's compiler sends the addends of a sum
    side by side, which those of GPUs and TPUs add before.
    """
    assert {name.rpartition(" ")[2] for name in compiled} == set(ROWS)
    for name, program in compiled.items():
        model, _, kind = name.rpartition(" ")
        n_embed, _, n_kv, _ = MODELS[model]
        stream = ROWS[kind] * n_embed
        forward, *backward = program["loops"]
        assert forward == [["all-reduce", [stream]]] * 2, name
        assert len(backward) == (kind == "attribution"), name
        # Backward goes one run of the two. Of heads whose groups lie on several devices, keys and values have small sums of their own.
        one, small = stream // 2, PROMPTS // N * T * n_kv * 128
        of_attention = [one] * 3 if n_kv % N == 0 else [one, small, small]
        assert backward in ([], [[["all-reduce", [one] * 2], ["all-reduce", of_attention]]]), name


def test_outside_of_layers_no_more_is_sent_than_the_stream(compiled: dict[str, dict[str, Any]]) -> None:
    """Embeddings are looked up in parts of the vocabulary; logits and a softmax over them stay in theirs."""
    for name, program in compiled.items():
        model, _, kind = name.rpartition(" ")
        sums = [sizes for one, sizes in program["outside"] if one == "all-reduce"]
        rest = [(one, sizes) for one, sizes in program["outside"] if one != "all-reduce"]
        assert all(one == "collective-permute" and max(sizes) <= PROMPTS * T for one, sizes in rest), name
        assert max(map(sum, sums)) <= (ROWS[kind] + 2) * MODELS[model][0], name
        if kind == "softmax":
            assert sum(sum(sizes) > 2 * VARIANTS // N for sizes in sums) == 1, name  # that of the embeddings


def test_a_device_holds_what_is_planned(compiled: dict[str, dict[str, Any]]) -> None:
    """Beside the compiler's account: of parameters exactly its share, of the rest at most a fifth more or less."""
    for name, program in compiled.items():
        given = program["given"] - program["params"]
        assert 0 <= given < 1e6 or name.endswith("resumed"), name  # tokens; and base runs
        if program["planned"] is not None:
            assert 0.8 * program["held"] <= program["planned"] <= 1.2 * program["held"], name


@pytest.fixture(scope="module", params=[(8, 4), (6, 3)], ids=["groups that divide", "groups that do not"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Llama]:
    """A model on one device and over 4 × 2."""
    n_heads, n_kv = request.param
    path = tmp_path_factory.mktemp("scaling")
    model = tiny_llama(num_attention_heads=n_heads, num_key_value_heads=n_kv, vocab_size=64)
    model.save_pretrained(path)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return model, Llama.from_pretrained(path, mesh=mesh)


def test_a_sweep_over_both_axes_is_that_of_one_device(both: tuple[Llama, Llama]) -> None:
    tokens = np.stack([prompt(seed=i) for i in range(3)])
    found, want = (sweep(model, tokens, HeadAblation.grid(model.config), METRIC) for model in both[::-1])
    near(found, want)


def test_attribution_over_both_axes_is_that_of_one_device(both: tuple[Llama, Llama]) -> None:
    """Of pairs that the copies do not divide."""
    clean = np.stack([prompt(seed=i) for i in range(6)])
    corrupted = np.where(np.arange(clean.shape[1]) == 4, (clean + 7) % 61, clean)
    for some in (slice(6), 0):
        pair = clean[some], corrupted[some]
        found, want = (attribution_patching(model, *pair, METRIC, ("z", "k", "act")) for model in both[::-1])
        jax.tree.map(near, dict(found.values), dict(want.values))


def test_a_plan_says_how_the_model_lies(both: tuple[Llama, Llama]) -> None:
    model, split = both
    heads = HeadAblation.grid(model.config)
    single, spread = (plan(m, prompt(), heads, METRIC, batch_size=8) for m in both)
    mb = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(split)) / 1e6
    said = f"on 4 × 2 devices, {mb:.3g} MB of the model on each"
    assert ("with all" in repr(spread)) == bool(model.config.num_key_value_heads % 2)
    if model.config.num_key_value_heads % 2:
        said += ", with all 3 key/value heads (2 do not divide them)"
    assert said in repr(spread) and said[3:] in spread._repr_html_() and "devices" not in repr(single)
    assert spread.bytes < single.bytes
    pairs = plan(attribution_patching, split, prompt(), prompt(seed=1), METRIC)
    assert said in repr(pairs)
