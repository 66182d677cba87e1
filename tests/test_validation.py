"""Everything that can be seen to be wrong is refused in a sentence before anything runs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import CaptureSpec, find_site, forward, lens
from oculi_jax.intervention import (
    Ablation,
    ActivationPatch,
    AttentionKnockout,
    Blend,
    DirectionAblation,
    Edit,
    HeadAblation,
    KScaler,
    PerLayer,
    PerPrompt,
    SpectraScaler,
    Steer,
)

from .tiny import prompt, tiny_llama

pytestmark = pytest.mark.quick

MODEL = tiny_llama()  # L 3, H 4, K 2, D 6, E 24, F 40, V 61
NAN = float("nan")

TOKENS = {
    "float": ([1.0, 2.0], TypeError, "tokens has dtype float64, and integers"),
    "beyond": ([1, 61], ValueError, r"tokens\[1\] is 61, and this model's vocabulary has ids 0 to 60"),
    "negative": ([-1, 3], ValueError, r"tokens\[0\] is -1"),
    "empty": ([], ValueError, "prompt is empty"),
    "batch": ([[1, 2], [3, 4]], ValueError, r"shape \[2, 2\], and one sequence \[T\].*jax.vmap"),
    "text": ("abc", TypeError, "tokens is text"),
    "device float": (jnp.ones(3), TypeError, "float32, and integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name: str) -> None:
    tokens, kind, message = TOKENS[name]
    with pytest.raises(kind, match=message):
        forward(MODEL, tokens)


ARGUMENTS = {
    "logits": (dict(logits="first"), ValueError, "logits is 'first', and must be one of 'all', 'last', 'none'"),
    "mask shape": (dict(mask=np.ones(3, bool)), ValueError, r"mask has shape \[3\], and tokens \[11\]"),
    "mask dtype": (dict(mask=np.ones(11)), TypeError, "mask has dtype float64, and bool"),
    "mask empty": (dict(mask=np.zeros(11, bool)), ValueError, "False everywhere"),
    "site": (dict(capture="patern"), ValueError, "Unknown site 'patern': did you mean 'pattern'"),
    "foreign": (dict(capture="blocks.3.attn.hook_z"), ValueError, "that value is called 'z' here"),
    "guide": (dict(capture="residual.post_attn"), ValueError, "called 'resid_mid' here"),
    "twice": (dict(capture=("z", CaptureSpec("z", layers=[1]))), ValueError, "'z' is captured twice"),
    "layer": (dict(capture=CaptureSpec("z", layers=[2, 3])), ValueError, r"\[3\], but this model has 3 layers: 0 to 2"),
    "negative layer": (dict(capture=CaptureSpec("z", layers=[-1])), ValueError, r"\[-1\], but this model has 3 layers"),
    "layer twice": (dict(capture=CaptureSpec("z", layers=[1, 1])), ValueError, "names a layer twice"),
    "no layers": (dict(capture=CaptureSpec("z", layers=[])), ValueError, "layers is empty"),
    "float layer": (dict(capture=CaptureSpec("z", layers=[1.0])), TypeError, "sequence of integers"),
    "no layer axis": (dict(capture=CaptureSpec("embed", layers=[1])), ValueError, "'embed' occurs once"),
    "position": (dict(capture=CaptureSpec("z", positions=[11])), ValueError, r"positions is \[11\], but the prompt has 11 tokens"),
    "capture dtype": (dict(capture=CaptureSpec("z", dtype="int8")), ValueError, "int8; it can be a floating-point dtype"),
    "capture dtype name": (dict(capture=CaptureSpec("z", dtype="float33")), ValueError, "'float33', which is not a dtype"),
    "capture type": (dict(capture=3), TypeError, "capture is 3"),
    "intervention type": (dict(interventions=[3]), TypeError, r"interventions\[0\] is a int, not an intervention"),
    "intervention string": (dict(interventions="z"), TypeError, "give an intervention or a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    arguments, kind, message = ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        forward(MODEL, prompt(), **arguments)


INTERVENTIONS = {
    "layer": (HeadAblation(31, 0), ValueError, "HeadAblation.layer is 31, but there are 3 layers: it must be 0 to 2"),
    "negative layer": (HeadAblation(-1, 0), ValueError, "HeadAblation.layer is -1"),
    "head": (HeadAblation(0, 9), ValueError, "HeadAblation.head is 9, but there are 4 query heads"),
    "kv head": (KScaler(0, 2, 1.0), ValueError, "kv_head is 2, but there are 2 key/value heads"),
    "head of v": (ActivationPatch("v", 0, 0.0, head=2), ValueError, "head is 2, but there are 2 key/value heads"),
    "head of a stream": (ActivationPatch("resid_pre", 0, 0.0, head=2), ValueError, "'resid_pre' has no heads"),
    "neuron of a patch": (ActivationPatch("act", 0, 0.0, index=40), ValueError, "index is 40, but there are 40 neurons"),
    "float layer": (HeadAblation(1.0, 0), TypeError, "layer is 1.0, and an integer"),
    "bool head": (HeadAblation(1, True), TypeError, "head is True, and an integer, a list of integers or a bool mask"),
    "device float layer": (HeadAblation(jnp.float32(1), 0), TypeError, "and an integer is needed"),
    "none": (HeadAblation(None, 0), TypeError, "layer is None"),
    "nan": (SpectraScaler(0, 0, NAN), ValueError, "alpha is nan, and a number that is finite"),
    "negative alpha": (SpectraScaler(0, 0, -1.5), ValueError, "alpha is -1.5, and must be above 0"),
    "zero alpha": (SpectraScaler(0, 0, 0), ValueError, "must be above 0"),
    "text alpha": (SpectraScaler(0, 0, "2"), TypeError, "alpha is '2', and a number"),
    "sweep": (HeadAblation(np.arange(3), 0), ValueError, r"axes \[3\].*sweep"),
    "sweep of alpha": (SpectraScaler(0, 0, jnp.ones((2, 3))), ValueError, r"axes \[2, 3\].*sweep"),
    "replacement shape": (HeadAblation(0, 0, np.ones(5)), ValueError, r"shape \[5\], and must end in \[D\] = \[6\], the last axis of 'z'"),
    "replacement of tokens": (HeadAblation(0, 0, np.ones((11, 6))), ValueError, r"axes \[11\] before its own \[6\].*sweep"),
    "replacement per layer": (HeadAblation(0, 0, PerLayer(np.ones((2, 6)))), ValueError, r"must end in \[L, D\] = \[3, 6\]"),
    "replacement nan": (HeadAblation(0, 0, np.full(6, NAN)), ValueError, "replacement holds NaN"),
    "vector shape": (Steer(0, np.ones(23)), ValueError, r"vector has shape \[23\], and must end in \[E\] = \[24\]"),
    "vector of layers": (Steer(1, np.ones((3, 24))), ValueError, r"axes \[3\].*sweep.*One entry for each layer is PerLayer\(x\)"),
    "vector of tokens": (Steer(1, np.ones((11, 24))), ValueError, r"axes \[11\].*oculi_jax.sweep"),
    "one vector of layers": (Steer(1, PerLayer(np.ones(24))), ValueError, r"PerLayer of shape \[24\], and \[L, E\] = \[3, 24\]"),
    "a prompt's own": (Steer(1, PerPrompt(np.ones((2, 24)))), ValueError, "is a PerPrompt, one entry for each of several prompts"),
    "layers of an index": (HeadAblation(PerLayer([0, 1, 2]), 0), TypeError, "one index for each layer has no meaning"),
    "empty set": (HeadAblation([], 0), ValueError, "HeadAblation.layer is empty"),
    "set of sets": (HeadAblation(0, [[0], [1]]), TypeError, "a flat list of integers"),
    "set beyond": (HeadAblation(0, [0, 9]), ValueError, r"HeadAblation.head is 9 at \[1\], but there are 4 query heads"),
    "mixed set": (HeadAblation(0, [True, 3]), TypeError, "mixes indices and yes or no"),
    "empty mask": (HeadAblation(np.zeros(3, bool), 0), ValueError, "a mask without a True"),
    "value of one token less": (ActivationPatch("z", 0, np.ones((4, 6))), ValueError, r"\[4, 6\], and \[H, T, D\] = \[4, 11, 6\]"),
    "value layers": (ActivationPatch("z", 0, np.ones((3, 4, 11, 6))), ValueError, r"axes \[3\].*PerLayer\(x\), with x \[L, H, T, D\]"),
    "value of a head": (ActivationPatch("z", 0, PerLayer(np.ones((3, 11, 6))), head=1), ValueError, r"\[L, H, T, D\] = \[3, 4, 11, 6\]"),
    "unknown site": (Ablation("mlp", 0), ValueError, "Unknown site 'mlp'"),
    "foreign site": (Ablation("blocks.0.hook_mlp_out", 0), ValueError, "called 'mlp_out' here"),
    "neuron": (Ablation("act", 0, 40), ValueError, "index is 40, but there are 40 neurons"),
    "position": (Steer(0, np.ones(24), positions=11), ValueError, "is 11, but the prompt has 11 tokens: positions are 0 to 10"),
    "negative position": (Steer(0, np.ones(24), positions=[-12]), ValueError, r"is \[-12\], but the prompt"),
    "no positions": (Steer(0, np.ones(24), positions=[]), ValueError, "positions is empty"),
    "positions mask": (Steer(0, np.ones(24), positions=np.ones(4, bool)), ValueError, r"mask of shape \[4\]"),
    "positions array": (Steer(0, np.ones(24), positions=np.arange(2)), ValueError, "For a set of positions give a list"),
    "positions float": (Steer(0, np.ones(24), positions=1.5), TypeError, "an integer, a list of integers or a bool mask"),
    "keep shape": (Blend("z", np.ones((4, 3))), ValueError, r"keep has shape \[4, 3\], and \[3, 4\] is needed for 'z'"),
    "keep of a stream": (Blend("mlp_out", np.ones((3, 4))), ValueError, r"\[3, 1 or 24\] is needed for 'mlp_out'"),
    "keep outside": (Blend("embed", np.ones((3, 1))), ValueError, r"\[1, 1 or 24\] is needed for 'embed': one row"),
    "sweep of tables": (Blend("z", np.ones((5, 3, 4))), ValueError, r"axes \[5\].*sweep"),
    "query": (AttentionKnockout(0, 0, query=None, key=0), TypeError, "query is None, and a position"),
    "op": (Edit("z", "replace", 0), ValueError, "op is 'replace', and must be one of set, add, scale, apply"),
    "no fn": (Edit("z", "apply", 0), ValueError, "'apply' needs fn"),
    "needless fn": (Edit("z", "set", 0, fn=lambda x, v: x), ValueError, "only 'apply' reads it"),
    "mask of numbers": (Edit("z", "set", 0, mask=np.ones((4, 1, 1))), TypeError, "mask has dtype float64, and bool"),
    "dense value": (Edit("z", "add", None, value=np.ones((4, 11, 6))), ValueError, r"shape \[4, 11, 6\], and \[L, H, T, D\] = \[3, 4, 11, 6\]"),
    "outside": (Edit("embed", "add", 0, value=1.0), ValueError, "'embed' occurs once, outside the layers: use None"),
    "allowed": (Edit("allowed", "add", 0, value=1.0), ValueError, "it can be 'set', not 'add'"),
    "fn shape": (Edit("z", "apply", 0, fn=lambda x, v: x[0]), ValueError, r"returned shape \[11, 6\]"),
    "dense apply": (
        Edit("resid_mid", "apply", None, value={"a": np.arange(24.0)}, fn=lambda x, v: x + v["a"]), ValueError,
        r"holds an array \[24\]; acting at every layer.*L = 3",
    ),
    "too large": (SpectraScaler(0, 0, 1e39), ValueError, "alpha is 1e[+]39, and a number that is finite"),
    "too large a value": (Steer(0, np.full(24, 1e300)), ValueError, "holds 1e[+]300, which float32 cannot hold"),
    "too large an integer": (
        Edit("z", "apply", 0, value=np.array([2**40]), fn=lambda x, v: x), ValueError, "1099511627776, which int32 cannot hold"
    ),
    "zero direction": (DirectionAblation("resid_mid", 0, np.zeros(24)), ValueError, "direction is zero"),
    "steering a table": (Steer(0, np.ones(11), site="allowed"), ValueError, "'allowed' is a table of yes and no"),
    "embed of layers": (ActivationPatch("embed", None, np.ones((3, 11, 24))), ValueError, r"axes \[3\] before its own \[11, 24\]"),
    "additive mask": (ActivationPatch("allowed", 0, np.full((1, 11, 11), -1e9)), TypeError, "yes and no, and must be bool"),
    "infinite vector": (Steer(0, np.full(24, np.inf)), ValueError, "vector holds an infinity"),
    "mixed positions": (Steer(0, np.ones(24), positions=[True, 3]), TypeError, "mixes positions and yes or no"),
    "a class": (HeadAblation, TypeError, "is the class HeadAblation; give an instance"),
    "edit nan": (Edit("z", "apply", 0, value={"a": np.array([NAN])}, fn=lambda x, v: x), ValueError, "holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions(name: str) -> None:
    intervention, kind, message = INTERVENTIONS[name]
    with pytest.raises(kind, match=message):
        forward(MODEL, prompt(), intervention)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        forward(MODEL, prompt(), (HeadAblation(7, 9), SpectraScaler(0, 0, -1.0)))
    for part in (
        "HeadAblation (number 0).layer is 7",
        "HeadAblation (number 0).head is 9",
        "SpectraScaler (number 1).alpha is -1",
    ):
        assert part in str(caught.value)


def test_lens_arguments() -> None:
    for arguments, message in (
        ((np.ones((3, 7), np.float32),), "E = 24"), ((np.ones(24, np.float32), 0), "top_k is 0"),
        ((np.ones(24, np.float32), 2, [1]), "either"), ((np.ones(24, np.float32), None, [61]), "ids 0 to 60"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            lens(MODEL, *arguments)


def test_lens_of_what_only_the_device_sees() -> None:
    resid = np.ones((2, 24), np.float32)
    assert np.isnan(lens(MODEL, resid, tokens=jnp.array([61, -1]))).all()
    with pytest.raises(TypeError, match="resid has dtype int"):
        lens(MODEL, np.ones((2, 24), int))
    with pytest.raises(TypeError, match=r"top_k is 2\.0, and an integer is needed"):
        lens(MODEL, resid, top_k=2.0)  # type: ignore[arg-type]
    assert lens(MODEL, resid, top_k=np.int64(2))[0].shape == (2, 2)


def test_a_class_of_the_users_own_is_refused_in_a_sentence() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine:
        layer: int = 0

        def edits(self, sizes):
            return ()

    with pytest.raises(TypeError, match=r"Mine has fields that oculi_jax\.intervention\.field did not declare"):
        forward(MODEL, prompt(), Mine())


@pytest.mark.parametrize("model", [None, "weights/tiny-gqa", MODEL.config, type(MODEL)])
def test_what_is_no_model(model) -> None:
    for call in (lambda: forward(model, [1]), lambda: lens(model, np.ones(24, np.float32))):
        with pytest.raises(TypeError, match="give one as from_pretrained"):
            call()


def test_an_output_is_indexed_by_site() -> None:
    out = forward(MODEL, prompt(), capture=("z", "resid_post"))
    assert out["z"] is out.activations["z"]
    with pytest.raises(
        KeyError, match="'pattern' was not captured; captured are z, resid_post. Ask for it: capture='pattern'"
    ):
        out["pattern"]
    with pytest.raises(KeyError, match="'z' was not captured; nothing was"):
        forward(MODEL, prompt())["z"]


def test_names_of_other_tools_are_found() -> None:
    for name, want in {
        "z": ("z", None), "blocks.12.attn.hook_z": ("z", 12), "model.layers.3.mlp.gate_proj": ("gate", 3),
        "model.layers.3": ("resid_post", 3), "residual.pre_mlp": ("resid_mid", None), "hook_embed": ("embed", None),
        "patterns": ("pattern", None), "model.norm": ("final_norm", None),
    }.items():  # fmt: skip
        site, layer = find_site(name)
        assert (site.name, layer) == want
    with pytest.raises(ValueError, match="Unknown site 'hook_zz'"):
        find_site("hook_zz")
