"""Sharded models on virtual devices: every device holds its slice, and the numbers are those of one device."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oculi_jax import forward, generate
from oculi_jax.intervention import AttentionKnockout, HeadAblation, SpectraScaler, Steer
from oculi_jax.models.decoder import checkpoint as checkpoint_module
from oculi_jax.models.decoder.checkpoint import named_parameters
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama
from oculi_jax.rules import Rules

from .margins import assert_leads
from .test_forward_laws import near
from .tiny import SITES, prompt, tiny_llama

ALL = tuple(SITES)
SHAPES = [(2, 1), (1, 2), (2, 4)]
KIND = dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=48, vocab_size=64, attention_bias=True)


def make_mesh(shape: tuple[int, int]) -> Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mesh")
    tiny_llama(**KIND).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def sharded(request: pytest.FixtureRequest, saved: Path) -> tuple[Mesh, Llama]:
    mesh = make_mesh(request.param)
    return mesh, Llama.from_pretrained(saved, mesh=mesh)


def test_every_parameter_is_placed_and_split_where_it_divides(sharded, saved: Path) -> None:
    mesh, model = sharded
    params, size = named_parameters(model), mesh.shape["model"]
    for row in parameter_table(model.config):
        array = params[row.name]
        assert len(array.sharding.device_set) == mesh.size
        split = any(letter in "HKFV" for letter in row.axes)
        part = array.addressable_shards[0].data.size
        assert part == array.size // (size if split else 1), row.name
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(Llama.from_pretrained(saved)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 2)])
def test_each_device_reads_only_its_slice(saved: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """What comes out of the files, counted tensor by tensor: every element once, however many devices there are."""
    read: Counter[str] = Counter()

    class Counting:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, name):
            return getattr(self.handle, name)

        def get_slice(self, name):
            part = self.handle.get_slice(name)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index):
                    rows = part[index]
                    read[name] += rows.size
                    return rows

            return Slice()

    original = checkpoint_module._opened

    @contextmanager
    def opened(file):
        with original(file) as handle:
            yield Counting(handle)

    monkeypatch.setattr(checkpoint_module, "_opened", opened)
    model = Llama.from_pretrained(saved, mesh=make_mesh(shape))
    for row in parameter_table(model.config):
        for tensor in row.tensors():
            assert read[tensor] == np.prod(row.stored), tensor


def test_a_sharded_run_is_the_single_device_run(sharded, saved: Path) -> None:
    _, model = sharded
    single = Llama.from_pretrained(saved)
    edits = (HeadAblation(1, 5), SpectraScaler(0, 2, 1.5), AttentionKnockout(2, 7, query=-1, key=0))
    for interventions in ((), edits):
        ours = forward(model, prompt(), interventions, capture=ALL)
        want = forward(single, prompt(), interventions, capture=ALL)
        near(ours.logits, want.logits)
        assert ours.applied.tolist() == want.applied.tolist()
        for name in ALL:
            near(ours.activations[name], want.activations[name])


def test_rules_are_obeyed_on_a_mesh(sharded, saved: Path) -> None:
    """The gradient of a logit by what is added to the stream, under every kind of rule."""

    def slope(model: Llama, rules: Rules | None) -> jax.Array:
        def value(added: jax.Array) -> jax.Array:
            return forward(model, prompt(), Steer(0, added), logits="last", rules=rules).logits[3]

        return jax.grad(value)(jnp.zeros(model.config.hidden_size))

    single = Llama.from_pretrained(saved)
    rules = Rules(
        {"pattern": 0.5, "attn_scale": 1.0}, {"z": 0.3, "act": np.array([0.1, 0.5, 0.9])}, 0.7, np.full((3, 8), 2.0)
    )
    near(slope(sharded[1], rules), slope(single, rules))
    assert np.abs(slope(single, rules) - slope(single, None)).max() > 1e-2


def test_a_sharded_model_writes_what_one_device_writes(sharded, saved: Path) -> None:
    whole, tokens = Llama.from_pretrained(saved), prompt(9)
    alphas = SpectraScaler(1, 3, np.array([0.3, 1.0, 6.0], np.float32))
    want = generate(whole, tokens, 8, alphas)
    for alpha, row in zip(alphas.alpha, want, strict=True):
        text = [*map(int, tokens), *map(int, row)]
        assert_leads(forward(whole, text, SpectraScaler(1, 3, alpha)).logits[len(tokens) - 1 : -1])
    np.testing.assert_array_equal(generate(sharded[1], tokens, 8, alphas), want)
    assert len({tuple(map(int, row)) for row in want}) > 1


def test_prompts_sharded_on_data_keep_their_captures_sharded(sharded, saved: Path) -> None:
    mesh, model = sharded
    batch = np.stack([prompt(seed=i) for i in range(4)])
    tokens = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data", None)))
    sites = ("q", "k", "pattern", "resid_post", "act")
    run = jax.jit(jax.vmap(lambda model, t: forward(model, t, capture=sites), in_axes=(None, 0)))
    out = run(model, tokens)
    want = jax.vmap(lambda t: forward(Llama.from_pretrained(saved), t, capture=sites))(batch)
    near(out.logits, want.logits)
    data, split = mesh.shape["data"], mesh.shape["model"]
    for name in sites:
        near(out.activations[name], want.activations[name])
        part = out.activations[name].addressable_shards[0].data.size
        assert part <= out.activations[name].size // data, name
        if name in ("q", "k", "pattern", "act"):
            assert part == out.activations[name].size // (data * split), name


def test_heads_that_the_mesh_does_not_divide_are_replicated(tmp_path: Path) -> None:
    model = tiny_llama(num_attention_heads=6, num_key_value_heads=3)
    model.save_pretrained(tmp_path)
    split = Llama.from_pretrained(tmp_path, mesh=make_mesh((1, 2)))
    assert split.layers.attn.k.weight[...].sharding.is_fully_replicated
    assert not split.layers.attn.q.weight[...].sharding.is_fully_replicated
    near(forward(split, prompt(), capture="z").activations["z"], forward(model, prompt(), capture="z").activations["z"])


def test_meshes_that_are_refused(saved: Path) -> None:
    explicit = jax.make_mesh((2, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="must be Auto: with explicit axes"):
        Llama.from_pretrained(saved, mesh=explicit)
    other = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="must have 'data' and 'model'"):
        Llama.from_pretrained(saved, mesh=other)
    with pytest.raises(ValueError, match="either device or mesh"):
        Llama.from_pretrained(saved, mesh=make_mesh((2, 1)), device="cpu")


def test_a_sharded_model_saves_whole(sharded, saved: Path, tmp_path: Path) -> None:
    sharded[1].save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert isinstance(sharded[1].device, jax.sharding.Sharding)
    assert jnp.float32 == sharded[1].dtype
