"""Path patching against hooks on Hugging Face's models, and the laws of paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from oculi_jax import forward, from_pretrained
from oculi_jax.causal import activation_patching
from oculi_jax.circuits import Graph, PathEffects, direct_effect, indirect_effect, path_patching, total_effect
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import Llama

from .compilations import compilations
from .test_patching import CLEAN, CORRUPTED, METRIC, T, close, pair
from .tiny import tiny_config, tiny_llama
from .tolerances import ROUTES

WRITERS = Graph.of(tiny_config()).writers
SEVERAL = ("a1.h2<q>", "a2.h1<k>", "a2.g0<v>", "m1")


@pytest.fixture(scope="module")
def model() -> Llama:
    return tiny_llama()


class Hooked:
    """A model of transformers, and runs of it in which hooks read and replace what it computes. It shares no code with ours.

    Values are known by `(what, layer)`: `z` [T, H, D], `q`, `k`, `v` [H, T, D] (each query head's own), `mlp_in`, `mlp_out` and
    `embed` [T, E]; scales of norms by the module.
    """

    def __init__(self, hf: Any):
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = f"paths_{id(self)}"  # transformers finds attention by name, and each model has its own
        ALL_ATTENTION_FUNCTIONS.register(name, self.attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
        self.hf = hf.double()
        self.hf.set_attn_implementation(name)
        self.seen: dict[Any, Any] = {}
        self.plain: dict[tuple[bytes, Any], tuple[float, dict[Any, Any]]] = {}
        self.replace: Callable[[Any, Any], Any] = lambda key, x: x
        for i, layer in enumerate(hf.model.layers):
            out = getattr(layer, "post_feedforward_layernorm", layer.mlp)
            layer.self_attn.o_proj.register_forward_pre_hook(lambda m, x, i=i: (self.z(i, x[0]),))
            layer.mlp.register_forward_pre_hook(lambda m, x, i=i: (self.tap(("mlp_in", i), x[0]),))
            for norm in (m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")):
                norm.register_forward_hook(self.norm)
            out.register_forward_hook(lambda m, x, y, i=i: self.tap(("mlp_out", i), y))
        hf.model.norm.register_forward_hook(self.norm)
        hf.model.embed_tokens.register_forward_hook(lambda m, x, y: self.tap(("embed", 0), y))

    def tap(self, key: Any, x: Any) -> Any:
        x = self.replace(key, x)
        self.seen[key] = x
        return x

    def z(self, i: int, x: Any) -> Any:
        heads = x.unflatten(-1, (self.hf.config.num_attention_heads, -1))
        return self.tap(("z", i), heads).flatten(-2)

    def norm(self, module: Any, x: Any, y: Any) -> Any:
        eps = getattr(module, "variance_epsilon", None) or module.eps
        own = (x[0].pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return y * (self.tap(module, own) / own)

    def attend(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **options: Any) -> Any:
        import torch

        share = q.shape[1] // k.shape[1]
        i = module.layer_idx
        q = self.tap(("q", i), q)
        k, v = (self.tap((name, i), x.repeat_interleave(share, 1)) for name, x in (("k", k), ("v", v)))
        scores = q @ k.transpose(2, 3) * scaling
        if (cap := options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        return (torch.softmax(scores + mask, -1) @ v).transpose(1, 2), None

    def run(self, tokens: Any, mask: Any, replace: Callable[[Any, Any], Any]) -> tuple[float, dict[Any, Any]]:
        """The metric at the last real token, and what was seen."""
        import torch

        self.seen, self.replace = {}, replace
        real = torch.ones(1, len(tokens)) if mask is None else torch.tensor(mask)[None]
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            ids = torch.tensor(np.asarray(tokens, np.int64))[None]
            logits = self.hf(ids, attention_mask=real.long(), position_ids=positions, use_cache=False).logits[0]
        last = logits[int(np.flatnonzero(real[0].numpy())[-1])]
        return float(last[3] - last[41]), self.seen

    def unpatched(self, tokens: Any, mask: Any) -> tuple[float, dict[Any, Any]]:
        """`run` with nothing replaced, once for each prompt."""
        key = np.asarray(tokens, np.int64).tobytes(), mask if mask is None else np.asarray(mask).tobytes()
        if key not in self.plain:
            self.plain[key] = self.run(tokens, mask, lambda _, x: x)
        return self.plain[key]

    def patched(
        self, base: Any, source: Any, senders: Iterable[str], receivers: Iterable[str], mlps: str, norms: str, mask: Any = None,
        source_mask: Any = None,
    ) -> float:  # fmt: skip
        """Wang et al.'s two runs on the base tokens."""
        _, at = self.unpatched(base, mask)
        _, other = self.unpatched(source, mask if source_mask is None else source_mask)
        there = slice(None) if source_mask is None else np.flatnonzero(source_mask)
        share = self.hf.config.num_attention_heads // self.hf.config.num_key_value_heads

        def first(key: Any, x: Any) -> Any:
            if not isinstance(key, tuple):
                return at[key] if norms == "frozen" else x
            what, i = key
            if what == "z" or (what == "mlp_out" and mlps == "frozen"):
                x = at[key].clone()
            for name in senders:
                if found := re.fullmatch(r"a(\d+)\.h(\d+)", name):
                    if what == "z" and i == int(found[1]):
                        x[:, there, int(found[2])] = other[key][:, there, int(found[2])]
                elif (what, i) == (("embed", 0) if name == "input" else ("mlp_out", int(name[1:]))):
                    x = x.clone()
                    x[:, there] = other[key][:, there]
            return x

        value, told = self.run(base, mask, first)

        def second(key: Any, x: Any) -> Any:
            if not isinstance(key, tuple):
                return x
            what, i = key
            for name in receivers:
                if found := re.fullmatch(r"a(\d+)\.([hg])(\d+)<(.)>", name):
                    if (what, i) == (found[4], int(found[1])):
                        h = int(found[3])
                        heads = slice(h, h + 1) if found[2] == "h" else slice(h * share, (h + 1) * share)
                        x = x.clone()
                        x[:, heads] = told[key][:, heads]
                elif (what, i) == ("mlp_in", int(name[1:])):
                    x = told[key]
            return x

        return value if list(receivers) == ["logits"] else self.run(base, mask, second)[0]


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Llama, Hooked]]:
    """The tiny Llama with so many key/value heads, ours and transformers'."""
    made: dict[int, tuple[Llama, Hooked]] = {}

    def make(n_kv: int) -> tuple[Llama, Hooked]:
        from transformers import AutoModelForCausalLM

        if n_kv not in made:
            path = tmp_path_factory.mktemp(f"kv{n_kv}")
            own = tiny_llama(num_key_value_heads=n_kv)
            own.save_pretrained(path)
            made[n_kv] = own, Hooked(AutoModelForCausalLM.from_pretrained(path))
        return made[n_kv]

    return make


def rows(direction: str) -> tuple[np.ndarray, np.ndarray]:
    """The base and the source."""
    return (CLEAN, CORRUPTED) if direction == "noising" else (CORRUPTED, CLEAN)


@pytest.mark.torch
@pytest.mark.numerical
@pytest.mark.parametrize(
    ("n_kv", "mlps", "norms"),
    [(1, "frozen", "frozen"), (2, "live", "live"), (2, "live", "frozen"), (2, "frozen", "live"), (2, "frozen", "frozen"),
     (4, "live", "live")],
)  # fmt: skip
def test_every_sender_alone_is_two_runs_with_hooks(hooked: Any, n_kv: int, mlps: Any, norms: Any) -> None:
    model, reference = hooked(n_kv)
    readers = [name for name in SEVERAL if n_kv < 4 or ".g" not in name]
    for direction in ("noising", "denoising"):
        base, source = rows(direction)
        for receivers in (["logits"], readers):
            found = path_patching(
                model, CLEAN, CORRUPTED, METRIC, receivers=receivers, mlps=mlps, norms=norms, direction=direction
            )
            wanted = [reference.patched(base, source, [name], receivers, mlps, norms) for name in WRITERS]
            ends = [reference.unpatched(tokens, None)[0] for tokens in (CLEAN, CORRUPTED)]
            close(found.patched, wanted)
            close([found.clean, found.corrupted], ends)
            close(found.values, np.array(wanted) - ends[direction == "denoising"])
            assert found.senders == WRITERS and np.abs(found.heads).max() > 100 * ROUTES
            np.testing.assert_array_equal(found.heads, np.asarray(found.values)[1:].reshape(3, 5)[:, :4])


@pytest.mark.torch
@pytest.mark.numerical
@pytest.mark.parametrize("receivers", [["logits"], ["a2.h3<v>"], ["a1.g1<k>", "a2.h0<q>", "m2"]])
def test_named_senders_go_together(hooked: Any, receivers: list[str]) -> None:
    model, reference = hooked(2)
    for senders in (["a0.h1", "a0.h3", "m0", "a1.h2"], ["a0.h1", "m1", "a1.h0"]):
        found = path_patching(model, CLEAN, CORRUPTED, METRIC, senders, receivers)
        close(found.patched, reference.patched(CLEAN, CORRUPTED, senders, receivers, "live", "live"))
        assert found.values.shape == () and abs(found.values) > 100 * ROUTES and found.senders == tuple(senders)


@pytest.mark.torch
@pytest.mark.numerical
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_a_token_of_one_prompt_alone_is_not_patched(hooked: Any, side: str) -> None:
    model, reference = hooked(2)
    places = slice(2, None) if side == "left" else slice(0, T)
    mask = np.zeros((2, T + 2), bool)
    mask[0, places] = mask[1] = True
    clean, corrupted = np.full((2, T + 2), 9, np.int32), np.full((2, T + 2), 11, np.int32)
    clean[0, places], corrupted[0, places] = CLEAN, CORRUPTED
    clean[1, 2:], corrupted[1, 2:] = pair(5)
    for receivers in (["logits"], list(SEVERAL)):
        found = path_patching(model, clean, corrupted, METRIC, receivers=receivers, mask=mask)
        alone = path_patching(model, CLEAN, CORRUPTED, METRIC, receivers=receivers)
        assert found.values.shape == (2, len(WRITERS)) and found.heads.shape == (2, 3, 4)
        close(found.values[0], alone.values)
        close(found.heads[0], alone.heads)
        wanted = [reference.patched(clean[1], corrupted[1], [name], receivers, "live", "live") for name in WRITERS]
        close(found.patched[1], wanted)
    own = mask.copy()
    own[1, 2 if side == "left" else -1] = False  # at either side of what the corrupted prompt has, it has one less
    own[1, :2] = False
    found = path_patching(model, clean, corrupted, METRIC, "a1.h2", mask=mask, corrupted_mask=own)
    wanted = [
        reference.patched(clean[i], corrupted[i], ["a1.h2"], ["logits"], "live", "live", mask[i], own[i])
        for i in range(2)
    ]
    close(found.patched, wanted)
    assert abs(found.values[0]) > 100 * ROUTES


@pytest.mark.torch
@pytest.mark.numerical
def test_a_family_that_normalises_what_it_adds(tmp_path: Path) -> None:
    """Gemma 2, with soft caps and windows too: a frozen norm is that one too."""
    from .test_families import make

    hf = make("gemma2")
    hf.save_pretrained(tmp_path)
    model, reference = from_pretrained(tmp_path), Hooked(hf)
    clean, corrupted = np.random.default_rng(1).integers(3, 61, (2, 9))
    metric = logit_difference(3, 41)
    for receivers, norms in ((["logits"], "frozen"), (["a2.h1<k>", "m3"], "frozen"), (["a2.h1<k>", "m3"], "live")):
        found = path_patching(model, clean, corrupted, metric, ["a1.h2", "m0"], receivers, norms=norms)  # type: ignore[arg-type]
        wanted = reference.patched(clean, corrupted, ["a1.h2", "m0"], receivers, "live", norms)
        close(found.patched, wanted)
        assert abs(found.values) > 10 * ROUTES


@pytest.mark.numerical
def test_all_writers_together_make_the_other_run(model: Llama) -> None:
    for direction, end in (("noising", "corrupted"), ("denoising", "clean")):
        found = path_patching(model, CLEAN, CORRUPTED, METRIC, WRITERS, mlps="frozen", direction=direction)  # type: ignore[arg-type]
        close(found.patched, getattr(found, end))
    queries = [f"a{layer}.h{head}<q>" for layer in range(3) for head in range(4)]
    found = path_patching(model, CLEAN, CLEAN, METRIC, receivers=queries)
    close(found.values, np.zeros(len(WRITERS)))


@pytest.mark.numerical
def test_direct_effects_add_up_and_the_rest_is_indirect(model: Llama) -> None:
    for direction in ("noising", "denoising"):
        each = direct_effect(model, CLEAN, CORRUPTED, METRIC, direction=direction)  # type: ignore[arg-type]
        together = direct_effect(model, CLEAN, CORRUPTED, METRIC, WRITERS, direction=direction)  # type: ignore[arg-type]
        close(each.values.sum(), together.values)
        rest = indirect_effect(model, CLEAN, CORRUPTED, METRIC, direction=direction)  # type: ignore[arg-type]
        total = total_effect(model, CLEAN, CORRUPTED, METRIC, direction=direction)  # type: ignore[arg-type]
        close(each.values + rest.values, total.values)
        heads, mlps = (
            activation_patching(model, CLEAN, CORRUPTED, METRIC, site, by, direction=direction)  # type: ignore[arg-type]
            for site, by in (("z", ("layer", "head")), ("mlp_out", "layer"))
        )
        close(total.patched[1:].reshape(3, 5)[:, :4], heads.patched)
        close(total.patched[1:].reshape(3, 5)[:, 4], mlps.patched)
        close(
            total.patched[0], total.corrupted if direction == "noising" else total.clean
        )  # the embedding is everything
        assert np.abs(rest.heads).max() > 100 * ROUTES


def test_direct_effects_are_the_heads_own_part_of_the_logits(model: Llama) -> None:
    """With the clean run's scale of the final norm, in NumPy."""
    clean, corrupted = (forward(model, tokens, capture=("z", "final_scale")) for tokens in (CLEAN, CORRUPTED))
    given = np.asarray(corrupted["z"] - clean["z"], np.float64)[:, :, -1]
    out = np.einsum("lhd,lehd->lhe", given, np.asarray(model.layers.attn.o.weight[...], np.float64))
    towards = np.asarray(model.lm_head.weight, np.float64)[[3, 41]] * np.asarray(model.final_weight, np.float64)
    wanted = float(clean["final_scale"][-1]) * out @ (towards[0] - towards[1])
    close(direct_effect(model, CLEAN, CORRUPTED, METRIC).heads, wanted)


@pytest.mark.quick
def test_other_prompts_heads_and_targets_compile_nothing_and_it_can_be_jitted(model: Llama) -> None:
    def run(seed: int, a: int, head: int) -> PathEffects:
        return path_patching(model, *pair(seed), logit_difference(a, 41), receivers=f"a2.h{head}<q>")

    with compilations() as compiled:
        run(0, 3, 1)
        first = len(compiled)
        other = run(5, 7, 2)
        assert first > 0 and len(compiled) == first
    jitted = jax.jit(
        lambda tokens: path_patching(model, tokens, pair(5)[1], logit_difference(7, 41), receivers="a2.h2<q>")
    )
    close(jitted(pair(5)[0]).values, other.values)


refused: Any = path_patching
WRONG: dict[str, tuple[Callable[[Llama], Any], str]] = {
    "sender": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "a1.h7"), "no 'a1.h7' among senders: did you mean 'a1.h"),
    "reader as sender": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "logits"), "They are input, a0.h0 to a2.h3, m0 to m2"),
    "receiver": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, receivers="a1.h2"), "did you mean 'a1.h2<.>' or 'a1.h2<.>' or"),
    "group": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, receivers="a1.g2<k>"), "a0.g0<k> to a2.g1<v>"),
    "a group's queries": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, receivers="a1.g1<q>"), "or 'a1.g1<v>'"),
    "numbers": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, (1, 2)), r"senders is \(1, 2\), and names are needed"),
    "none": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, receivers=()), "receivers is empty"),
    "twice": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, ["m0", "m0"]), "names 'm0' twice"),
    "no path": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "a1.h0", "a1.h2<q>"), "'a1.h0' writes after"),
    "logits among others": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, None, ("m1", "logits")), "by itself"),
    "mlps": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, mlps="cold"), "mlps is 'cold', and must be 'live' or 'frozen'"),
    "norms": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, norms=True), "norms is True"),
    "direction": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, direction="both"), "'noising'"),
    "lengths": (lambda m: refused(m, CLEAN, CORRUPTED[:-1], METRIC), r"\[6\], and corrupted \[5\]"),
    "masked lengths": (lambda m: refused(m, CLEAN, CORRUPTED[:-1], METRIC, mask=CLEAN >= 0), r"\[6\], and corrupted \[5\]"),
    "target": (lambda m: refused(m, CLEAN, CORRUPTED, logit_difference(3, 61)), "ids 0 to 60"),
    "many numbers": (lambda m: refused(m, CLEAN, CORRUPTED, lambda out: out.logits[-1]), r"this returns \[61\]"),
    "heads of named ones": (lambda m: refused(m, CLEAN, CORRUPTED, METRIC, "m0").heads, "leave out senders"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(model: Llama, name: str) -> None:
    call, sentence = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(model)


@pytest.mark.torch
@pytest.mark.quick
def test_a_torch_model_is_refused_in_a_sentence(hf_trained: Any) -> None:
    with pytest.raises(TypeError, match=r"oculi_jax\.from_pretrained"):
        path_patching(hf_trained, CLEAN, CORRUPTED, METRIC)


@pytest.mark.quick
def test_names_are_those_of_both_graphs(model: Llama) -> None:
    """1 + L (H + 1) writers; L (3 H + 1) + 1 readers, L (H + 2 K + 1) + 1 of groups: each may be named."""
    plain, grouped = (Graph.of(model.config, grouped).readers for grouped in (False, True))
    assert (len(WRITERS), len(plain), len(grouped)) == (16, 40, 28)
    assert WRITERS[:7] == ("input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0")
    inner = sorted({*plain, *grouped} - {"logits"})
    assert path_patching(model, CLEAN, CORRUPTED, METRIC, "input", inner).receivers == tuple(inner)
