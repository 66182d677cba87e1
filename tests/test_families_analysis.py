"""What analyses say of each family, beside NumPy on Hugging Face's weights and on what its own modules gave."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from oculi_jax import forward, from_pretrained, lens, load, save
from oculi_jax.analysis import (
    AttentionAnalysis,
    AttributionMethods,
    CircuitDetection,
    CompositionAnalysis,
    LogitLensAnalysis,
)
from oculi_jax.analysis.circuits import THRESHOLDS, decide, even_scores
from oculi_jax.analysis.residual import decompose_resid, stack_head_results
from oculi_jax.causal.noise import Noise
from oculi_jax.diagnostics import head_scores, repeated_tokens
from oculi_jax.intervention import Edit, HeadAblation
from oculi_jax.metrics import logit_difference
from oculi_jax.models.llama import LlamaAttentionAdapter
from oculi_jax.pages import measure, page
from oculi_jax.sweeps.sweeping import sweep
from oculi_jax.training import lens_kl, train_tuned_lens

from .prompts import FRANCE
from .report.pages import content
from .test_families import KINDS, N, make
from .tolerances import GRADIENT, LOGITS, ROUNDING, ROUTES

pytestmark = pytest.mark.torch

TOKENS = np.random.default_rng(1).integers(3, 61, N)
AT = N - 2
# One that multiplies what is added, one with caps, one of each way to normalise queries and what is added.
SOME = ("granite", "gemma2", "gemma3, scaled", "olmo2, biases, tied")
BACKENDS = ("jax", "torch")


class Seen(NamedTuple):
    """A model of Hugging Face's, the sites that its modules gave, and an adapter of each backend."""

    hf: Any
    sites: dict[str, np.ndarray]
    adapters: dict[str, LlamaAttentionAdapter]


@cache
def of(kind: str) -> Seen:
    from oculi_jax.backends.torch import TorchDecoder

    from .reference import reference_sites

    own = TorchDecoder.of(make(kind))
    adapters = {"torch": LlamaAttentionAdapter(own), "jax": LlamaAttentionAdapter(own.as_jax())}
    return Seen(own.hf, {k: np.float64(v) for k, v in reference_sites(own.hf, TOKENS).items()}, adapters)


@cache
def captured(kind: str, backend: str) -> Any:
    return of(kind).adapters[backend].capture_full(TOKENS)


def wide(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().numpy(), np.float64)


class Theirs:
    """What Hugging Face's weights and values say, in float64 and by its names for them."""

    def __init__(self, kind: str):
        hf, sites, _ = of(kind)
        config = hf.config
        self.sites, self.layers = sites, hf.model.layers
        self.offset = float(kind.startswith("gemma"))
        self.heads, self.dim = config.num_attention_heads, self.layers[0].self_attn.head_dim
        self.group = self.heads // config.num_key_value_heads
        self.factor = getattr(config, "residual_multiplier", 1.0)
        self.final = wide(hf.model.norm.weight) + self.offset
        self.embed = wide(hf.model.embed_tokens.weight)
        self.unembed = wide(hf.lm_head.weight)
        self.logit_scale = 1 / getattr(config, "logits_scaling", 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.kv_heads = config.num_key_value_heads
        self.normalised = hasattr(self.layers[0].self_attn, "q_norm")  # queries and keys are

    def norm(self, layer: int, name: str) -> np.ndarray | float:
        """The gain of one of a layer's norms; 1 for one that it has not."""
        found = getattr(self.layers[layer], name, None)
        return 1.0 if found is None else wide(found.weight) + self.offset

    def post(self, layer: int, name: str) -> Any:
        """What a sublayer's projection is multiplied by on its way into the stream, `[T, E]`."""
        theirs = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}[name]
        if not hasattr(self.layers[layer], "post_feedforward_layernorm"):
            return np.full((N, self.final.size), self.factor)
        return self.norm(layer, theirs) * self.sites[f"{name}_post_scale"][layer][:, None] * self.factor

    def heads_of(self, layer: int, t: int) -> np.ndarray:
        """`[H, E]`: what each head adds."""
        o = wide(self.layers[layer].self_attn.o_proj.weight).reshape(-1, self.heads, self.dim)
        return np.einsum("hd,ehd->he", self.sites["z"][layer][:, t], o) * self.post(layer, "attn")[t]

    def neurons_of(self, layer: int, t: int) -> np.ndarray:
        """`[F, E]`."""
        down = wide(self.layers[layer].mlp.down_proj.weight)
        return (down * self.sites["act"][layer][t]).T * self.post(layer, "mlp")[t]

    def bias_of(self, layer: int, t: int, name: str) -> np.ndarray:
        block = self.layers[layer]
        bias = (block.self_attn.o_proj if name == "attn" else block.mlp.down_proj).bias
        return np.zeros(self.final.size) if bias is None else wide(bias) * self.post(layer, name)[t]

    def products(self, normalised: np.ndarray) -> np.ndarray:
        """Logits before a cap."""
        return normalised @ self.unembed.T * self.logit_scale

    def capped(self, logits: np.ndarray) -> np.ndarray:
        return logits if self.cap is None else self.cap * np.tanh(logits / self.cap)

    def gain(self, t: int, token: int) -> np.ndarray:
        return self.final * self.sites["final_scale"][t] * self.unembed[token] * self.logit_scale

    def projection(self, layer: int, name: str) -> np.ndarray:
        """`[heads, D, E]`: of queries, keys or values; Phi-3 keeps all three in one tensor."""
        attn = self.layers[layer].self_attn
        if hasattr(attn, "qkv_proj"):
            heads = np.cumsum((self.heads, self.kv_heads))
            parts = np.split(wide(attn.qkv_proj.weight).reshape(-1, self.dim, self.final.size), heads)
            return parts["qkv".index(name)]
        return wide(getattr(attn, f"{name}_proj").weight).reshape(-1, self.dim, self.final.size)

    def ov(self, layer: int, head: int) -> np.ndarray:
        """`[E, E]`, the norms' gains folded in."""
        o = wide(self.layers[layer].self_attn.o_proj.weight).reshape(-1, self.heads, self.dim)[:, head]
        if hasattr(self.layers[layer], "post_feedforward_layernorm"):
            o = o * np.asarray(self.norm(layer, "post_attention_layernorm"))[:, None]
        v = self.projection(layer, "v")[head // self.group]
        return self.factor * o @ (v * self.norm(layer, "input_layernorm"))

    def qk(self, layer: int, head: int) -> np.ndarray:
        norm = self.norm(layer, "input_layernorm")
        q, k = self.projection(layer, "q")[head], self.projection(layer, "k")[head // self.group]
        return (q * norm).T @ (k * norm)


def near(ours: Any, want: Any, tolerance: float = ROUTES) -> None:
    """Within the tolerance of the largest."""
    want = np.asarray(want)
    assert np.shape(ours) == want.shape
    assert np.abs(np.asarray(ours, np.float64) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.numerical
@pytest.mark.parametrize(("kind", "backend"), [*((kind, "jax") for kind in KINDS), *((kind, "torch") for kind in SOME)])
def test_parts_are_what_hugging_faces_weights_say_and_sum_to_the_logit(kind: str, backend: str) -> None:
    theirs, full, model = Theirs(kind), captured(kind, backend), of(kind).adapters[backend].model
    logits = theirs.products(theirs.sites["final_norm"][AT])
    # Before a cap the products are the logits; after it, what Hugging Face says.
    assert np.abs(theirs.capped(logits) - theirs.sites["logits"][AT]).max() < LOGITS
    token = int(np.abs(logits).argmax())
    gain, layers = theirs.gain(AT, token), range(len(theirs.layers))
    methods, unembed = AttributionMethods, model.lm_head.weight
    direct = methods.direct_logit_attribution(full.residual, unembed, token, AT)
    parts = methods.component_attribution(full.residual, full.mlp, unembed, token, AT)
    heads = methods.head_attribution(full.attention, model, token, AT, residual=full.residual)
    neurons = methods.neuron_attribution(full.mlp, model, token, AT, residual=full.residual)
    for result in (direct, parts, heads, neurons):
        assert abs(float(result.details["logit"]) - logits[token]) <= ROUTES * abs(logits[token])
        assert abs(float(result.completeness_error)) <= ROUNDING * abs(logits[token]), result

    near(heads.values, [theirs.heads_of(layer, AT) @ gain for layer in layers])
    near(neurons.values, [theirs.neurons_of(layer, AT) @ gain for layer in layers])
    added = np.stack([theirs.sites["attn_out"][:, AT] @ gain, theirs.sites["mlp_out"][:, AT] @ gain], axis=1)
    near(parts.values, added)
    near(direct.values, added.sum(1))
    for result, name, column in ((heads, "attn", 0), (neurons, "mlp", 1)):
        bias = np.stack([theirs.bias_of(layer, AT, name) @ gain for layer in layers])
        assert np.abs(result.details["bias"] - bias).max() <= ROUTES * np.abs(added).max()
        whole = np.asarray(result.values).sum(1) + np.asarray(result.details["bias"])
        near(whole, np.asarray(parts.values)[:, column], ROUNDING)
    alone = methods.head_attribution(full.attention, model, token, AT)  # with no residual capture
    near(alone.values, heads.values, ROUNDING)


@pytest.mark.numerical
@pytest.mark.parametrize("kind", SOME)
def test_what_heads_add_and_how_long_their_messages_are(kind: str) -> None:
    theirs, full, model = Theirs(kind), captured(kind, "jax"), of(kind).adapters["jax"].model
    layers = range(len(theirs.layers))
    want = np.array([[theirs.heads_of(layer, t) for t in range(N)] for layer in layers]).swapaxes(1, 2)
    near(stack_head_results(full.attention, model), want)
    near(stack_head_results(full.attention, model, AT), want[:, :, AT])
    bias = np.array([[theirs.bias_of(layer, t, "attn") for t in range(N)] for layer in layers])
    near(want.sum(1) + bias, theirs.sites["attn_out"])
    near(decompose_resid(full.residual).attn, theirs.sites["attn_out"])

    lengths = np.zeros((len(layers), theirs.heads, N, N))
    for layer, head in np.ndindex(lengths.shape[:2]):
        o = wide(theirs.layers[layer].self_attn.o_proj.weight).reshape(-1, theirs.heads, theirs.dim)[:, head]
        moved = theirs.sites["v"][layer, head // theirs.group] @ o.T  # [S, E]
        sizes = np.linalg.norm(moved[None] * theirs.post(layer, "attn")[:, None], axis=-1)
        lengths[layer, head] = theirs.sites["pattern"][layer, head] * sizes
    near(AttributionMethods.value_weighted_attention(full.attention, model).values, lengths)


@pytest.mark.numerical
@pytest.mark.parametrize("kind", ("gemma2", "olmo3", "granite"))
def test_a_part_of_the_layers_a_batch_and_edits(kind: str) -> None:
    adapter, whole = of(kind).adapters["jax"], captured(kind, "jax")
    model, token, methods = adapter.model, 17, AttributionMethods
    want = methods.head_attribution(whole.attention, model, token, residual=whole.residual)

    rows = [TOKENS.tolist(), TOKENS[:7].tolist()]
    batch = adapter.capture_full(rows)
    found = jax.vmap(lambda a, r: methods.head_attribution(a, model, token, residual=r))(
        batch.attention, batch.residual
    )
    near(found.values[0], want.values)
    one = adapter.capture_full(TOKENS[:7])
    near(found.values[1], methods.head_attribution(one.attention, model, token).values)

    edits = (HeadAblation(1, 2), Edit("attn_out", "add", 2, True, 1.5))
    seen = forward(model, TOKENS, edits, capture=("z", "attn_post_scale") if model.config.post_norm else "z")
    scale = seen["attn_post_scale"] if model.config.post_norm else None
    under = dataclasses.replace(whole.attention, z=seen["z"], post_scale=scale)
    assert np.abs(methods.head_attribution(under, model, token).values[1, 2]) == 0
    some = jax.tree.map(lambda x: x, under)
    some = dataclasses.replace(
        some, z=under.z[jax.numpy.array([2, 0])], captured_layers=(2, 0),
        post_scale=None if scale is None else scale[jax.numpy.array([2, 0])],
    )  # fmt: skip
    near(
        methods.head_attribution(some, model, token).values,
        np.asarray(methods.head_attribution(under, model, token).values)[[2, 0]],
        ROUNDING,
    )


def test_a_norm_whose_scale_was_not_captured_is_said() -> None:
    capture = dataclasses.replace(captured("gemma2", "jax").attention, post_scale=None)
    with pytest.raises(ValueError, match="post_scale of this AttentionCapture was not captured"):
        AttributionMethods.head_attribution(capture, of("gemma2").adapters["jax"].model, 3)


@pytest.mark.parametrize("kind", ("granite", "gemma2"))
def test_what_a_family_does_to_logits_is_in_files(kind: str, tmp_path: Path) -> None:
    full, model = captured(kind, "jax"), of(kind).adapters["jax"].model
    save(full, tmp_path / "full.safetensors")
    again = load(tmp_path / "full.safetensors")
    for part, name in ((again.residual, "logit_scale"), (again.logits, "logit_scale"), (again.logits, "logit_cap")):
        assert getattr(part, name) == getattr(model.config, name)
    ours, want = (
        AttributionMethods.head_attribution(found.attention, model, 3, residual=found.residual)
        for found in (again, full)
    )
    assert np.array_equal(ours.values, want.values) and ours.completeness_error == want.completeness_error


@pytest.mark.numerical
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SOME)
def test_the_lens_says_what_hugging_faces_norm_and_head_say(kind: str, backend: str) -> None:
    theirs, adapter = Theirs(kind), of(kind).adapters[backend]
    resid = theirs.sites["resid_post"]
    eps = of(kind).hf.config.rms_norm_eps
    normalised = theirs.final * resid / np.sqrt(np.mean(resid**2, axis=-1, keepdims=True) + eps)
    want = theirs.capped(theirs.products(normalised))
    assert np.abs(want[-1] - theirs.sites["logits"]).max() < LOGITS  # at the last layer it is the model
    given, ids = resid.astype(np.float32), np.array([3, 17, 60])
    assert np.abs(lens(adapter.model, given) - want).max() < LOGITS
    assert np.abs(lens(adapter.model, given, tokens=ids) - want[..., ids]).max() < LOGITS
    assert np.abs(lens(adapter.model, given, top_k=5)[0] - np.sort(want)[..., ::-1][..., :5]).max() < LOGITS

    chance = np.exp(want - np.log(np.exp(want).sum(-1, keepdims=True)))
    kept = adapter.capture_logits(TOKENS)
    for capture in (kept, dataclasses.replace(kept, logits=None), captured(kind, backend).logits):
        found = LogitLensAnalysis().token_probability_trajectory(capture, 17, AT)
        assert np.abs(found - chance[:, AT, 17]).max() < ROUTES
        entropy = -(chance * np.log(chance)).sum(-1)[:, AT]
        assert np.abs(LogitLensAnalysis().entropy_by_layer(capture, AT) - entropy).max() < LOGITS


@pytest.mark.numerical
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("gemma2", "granite"))
def test_metrics_of_chosen_tokens_are_of_the_models_own_logits(kind: str, backend: str) -> None:
    import torch

    hf, model = of(kind).hf, of(kind).adapters[backend].model
    heads, want = np.array([[0, 1], [2, 3]]), []
    for layer, head in heads:

        def silence(_: Any, given: Any, head: int = head) -> Any:
            z = given[0].unflatten(-1, (hf.config.num_attention_heads, -1)).clone()
            z[:, :, head] = 0
            return (z.flatten(-2),)

        handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
        with torch.no_grad():
            logits = hf(torch.tensor(TOKENS)[None]).logits[0, -1].numpy()
        handle.remove()
        want.append(logits[3] - logits[17])
    found = sweep(model, TOKENS, HeadAblation(heads[:, 0], heads[:, 1]), logit_difference(3, 17))
    assert np.abs(np.asarray(found) - want).max() < LOGITS


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_ov_circuits_and_their_composition(kind: str) -> None:
    theirs, model = Theirs(kind), of(kind).adapters["jax"].model
    ov = {(layer, head): theirs.ov(layer, head) for layer in range(3) for head in range(theirs.heads)}
    values, eigenvalues = CompositionAnalysis.ov_svd(model), CompositionAnalysis.ov_eigenvalues(model)
    copying = CompositionAnalysis.ov_copying_scores(model)
    for at, matrix in ov.items():
        near(values[at], np.linalg.svd(matrix, compute_uv=False)[: theirs.dim], GRADIENT)
        near(np.abs(eigenvalues[at]), np.sort(np.abs(np.linalg.eigvals(matrix)))[::-1][: theirs.dim], GRADIENT)
        whole = np.linalg.eigvals((theirs.unembed * theirs.final) @ matrix @ theirs.embed.T)
        assert abs(copying[at] - whole.sum().real / np.abs(whole).sum()) < GRADIENT
    found = CompositionAnalysis.weight_composition(model).values
    assert set(found) == ({"v"} if theirs.normalised else {"q", "k", "v"})
    for source, target in (((0, 1), (1, 3)), ((1, 2), (2, 0))):
        read = {"v": ov[target]}
        if not theirs.normalised:
            read |= {"q": theirs.qk(*target).T, "k": theirs.qk(*target)}
        for name, matrix in read.items():
            size = np.linalg.norm(matrix) * np.linalg.norm(ov[source])
            score = np.linalg.norm(matrix @ ov[source]) / size
            assert abs(found[name][(*source, *target)] - score) < ROUTES


@pytest.mark.numerical
@pytest.mark.parametrize("kind", KINDS)
def test_qk_circuits_are_right_or_refused(kind: str) -> None:
    theirs, adapter = Theirs(kind), of(kind).adapters["jax"]
    model = adapter.model
    if not theirs.normalised:
        for layer, head in ((0, 1), (3, 2)):
            matrix = theirs.qk(layer, head)
            near(
                CompositionAnalysis.qk_svd(model)[layer, head],
                np.linalg.svd(matrix, compute_uv=False)[: theirs.dim],
                ROUTES,
            )
        return
    name = model.config.family.title
    for refused in (
        lambda: CompositionAnalysis.qk_svd(model),
        lambda: CompositionAnalysis.qk_svd(model, 0, 1),
        lambda: CompositionAnalysis.qk_eigenvalues(model),
        lambda: CompositionAnalysis.detect_induction_circuit(captured(kind, "jax").attention, model=model),
    ):
        with pytest.raises(ValueError, match=f"{name} normalises queries and keys"):
            refused()
    assert (
        CompositionAnalysis.detect_induction_circuit(captured(kind, "jax").attention).metadata["composition"]
        == "patterns"
    )


@pytest.mark.numerical
def test_a_tuned_lens_is_fitted_to_capped_logits() -> None:
    theirs, adapter = Theirs("gemma2"), of("gemma2").adapters["jax"]
    model = adapter.model
    resid, eps = theirs.sites["resid_post"], of("gemma2").hf.config.rms_norm_eps
    normalised = theirs.final * resid / np.sqrt(np.mean(resid**2, axis=-1, keepdims=True) + eps)
    logits = theirs.capped(theirs.products(normalised))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kl = (np.exp(log_p[-1]) * (log_p[-1] - log_p)).sum(-1).mean(-1)
    found = lens_kl(model, None, TOKENS[None])[0]
    assert np.abs(found - kl).max() < ROUTES
    rows, key = np.stack([TOKENS, TOKENS[::-1]]), jax.random.key(0)
    fitted = train_tuned_lens(model, rows, steps=30, learning_rate=1e-2, key=key, controls=False, progress=False)
    assert fitted.losses[-1] < fitted.losses[0]
    capture = adapter.capture_logits(TOKENS, lens=fitted.lens)
    assert capture.lens == "tuned" and np.abs(capture.logits[-1] - theirs.sites["logits"]).max() < LOGITS


@pytest.mark.numerical
@pytest.mark.parametrize("kind", ("mistral", "gemma2", "olmo2"))
def test_even_attention_is_even_over_the_window(kind: str, tmp_path: Path) -> None:
    capture = captured(kind, "jax").attention
    allowed = of(kind).sites["allowed"]  # of Hugging Face's masks
    even = (allowed / allowed.sum(-1, keepdims=True)).astype(np.float32)
    assert np.count_nonzero(allowed[0, 0, -1]) == (N if kind == "olmo2" else 4)
    tokens = np.tile([5, 9, 7, 5], 4)[:N]  # which repeats inside of a window and beyond it
    capture = dataclasses.replace(capture, patterns=even, tokens=jax.numpy.asarray(tokens))
    assert np.abs(AttentionAnalysis.attention_entropy_ratio(capture)[:, :, 1:] - 1).max() < ROUNDING
    scores = CircuitDetection.scores(capture)
    assert np.abs(scores["uniform"] - 1).max() < ROUNDING
    chance = even_scores(capture.tokens, capture.mask, capture.windows)
    for name, value in chance.items():
        assert np.abs(np.asarray(scores[name]) - np.reshape(value, (-1, 1))).max() < ROUNDING
    save(capture, tmp_path / "capture.safetensors")
    assert load(tmp_path / "capture.safetensors").windows == capture.windows


@pytest.mark.numerical
@pytest.mark.parametrize("kind", (*SOME, "phi3", "exaone4"))
def test_circuits_from_tokens_are_of_hugging_faces_patterns(kind: str) -> None:
    capture, pattern = captured(kind, "jax").attention, of(kind).sites["pattern"]
    tokens = np.tile([5, 9, 7], 5)[:N]  # which repeats inside of a window of 4
    capture = dataclasses.replace(capture, tokens=jax.numpy.asarray(tokens))  # whose patterns are those of others
    again = [(t, [s for s in range(t) if tokens[s] == tokens[t]]) for t in range(3, N)]
    want = {
        "induction": np.mean([pattern[:, :, t, [s + 1 for s in seen]].sum(-1) for t, seen in again], 0),
        "duplicate_token": np.mean([pattern[:, :, t, seen].sum(-1) for t, seen in again], 0),
        "previous_token": np.mean([pattern[:, :, t, t - 1] for t in range(1, N)], 0),
    }
    found = CircuitDetection.scores(capture)
    for name, scores in want.items():
        assert np.abs(found[name] - scores).max() < ROUTES and np.ptp(scores) > 0.01, name


@pytest.mark.numerical
def test_head_scores_of_both_backends() -> None:
    ours, want = (head_scores(of("gemma2").adapters[name].model, n_sequences=2, length=12) for name in BACKENDS)
    for mine, theirs in zip(*(jax.tree.leaves(dataclasses.replace(x, codes=0)) for x in (ours, want)), strict=True):
        assert np.abs(np.float64(mine) - np.float64(theirs)).max() <= ROUTES
    # What a head is, is decided by thresholds: the same but where a score is within rounding of one.
    scores = {name: np.asarray(getattr(want, name)) for name in THRESHOLDS}
    config = of("gemma2").adapters["jax"].model.config
    chance = even_scores(jax.numpy.asarray(repeated_tokens(config, 0, 2, 12)[0]), None, config.windows)
    either = [decide({name: x + shift for name, x in scores.items()}, chance)[0] for shift in (-ROUTES, ROUTES)]
    clear = np.asarray(either[0] == either[1])
    assert clear.mean() > 0.8 and np.array_equal(np.asarray(ours.codes)[clear], np.asarray(want.codes)[clear])


@pytest.mark.numerical
def test_noise_is_in_the_units_of_the_site() -> None:
    model, key = of("gemma2").adapters["jax"].model, jax.random.key(3)
    added = Noise(4, samples=2, key=key).intervention(model, None, 1, N).value.x
    sigma = Theirs("gemma2").embed.std() * 24**0.5  # Gemma multiplies embeddings by √E
    for sample, t in ((0, 0), (1, 5)):
        draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), t), (24,))
        near(added[sample, t], sigma * np.float64(draw))


@pytest.fixture(scope="module", params=("gemma3, scaled", "olmo2"))
def spoken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trained: Any) -> tuple[Any, Path]:
    """A model with a tokenizer, and where both are saved."""
    name, options = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, request.param, (name, dict(options, vocab_size=trained.model.config.vocab_size)))
        hf = make(request.param)
    directory = tmp_path_factory.mktemp("spoken")
    hf.save_pretrained(directory)
    trained.tokenizer.save_pretrained(directory)
    return hf, directory


@pytest.mark.numerical
def test_a_report(spoken: Any, trained: Any) -> None:
    import torch

    hf, directory = spoken
    ids = trained.tokenizer.encode(FRANCE)
    with torch.no_grad():
        found = hf.model(torch.tensor([ids])).last_hidden_state[0, -1]
        products, logits = wide(hf.lm_head(found)), wide(hf(torch.tensor([ids])).logits[0, -1])
    best = int(logits.argmax())
    for model in (hf, from_pretrained(directory)):
        told = measure(LlamaAttentionAdapter(model, trained.tokenizer), FRANCE)
        assert told.target == best and abs(told.target_logit - logits[best]) < LOGITS
        assert abs(told.attributed_logit - products[best]) < LOGITS
        assert told.capped == (abs(products[best] - logits[best]) > 0.1)
        total = told.embedding + told.attention.sum() + told.mlp.sum() + told.other
        assert abs(total - products[best]) <= ROUTES * abs(products[best])
        assert abs(told.by_head.sum() + told.bias - told.attention.sum()) <= ROUTES * abs(products[best])
        chance = np.exp(logits) / np.exp(logits).sum()
        assert abs(told.lens_target[-1, -1] - chance[best]) < ROUTES
        text = content(page(told))["attribution"]
        assert text["capped"] == told.capped and abs(text["logit"] - products[best]) < 1e-3


@pytest.mark.numerical
def test_the_command_line_says_what_parts_sum_to(spoken: Any, oculi_here: Any) -> None:
    hf, directory = spoken
    code, out, err = oculi_here("attribute", FRANCE, "--target", "Paris", "--model", str(directory))
    assert code == 0, err
    capped = getattr(hf.config, "final_logit_softcapping", None) is not None
    assert ("logit of 'Paris' before the final soft cap after" in out) == capped and "logit of 'Paris'" in out
