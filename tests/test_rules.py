"""Rules for the backward pass: values are the same bits, derivatives are those of the papers' formulas by torch's autograd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oculi_jax import forward, from_pretrained
from oculi_jax.intervention import Edit
from oculi_jax.models.decoder.activations import ACTIVATIONS
from oculi_jax.models.decoder.derivatives import Derivatives
from oculi_jax.models.llama import Llama
from oculi_jax.rules import Rules, attn_lrp, frozen, gim, grad_drop, relp

from .test_families import make
from .tiny import BASE, prompt, tiny_config, tiny_llama

T, CONFIG = 9, tiny_config()
TOKENS = prompt(T)
ANSWER, AGAINST = 3, 17
EXACT = 1e-10  # of the largest, in float64
# Sites with the axes of a rule's numbers.
HEADED = {name: CONFIG.sizes[site.head_axis] for name, site in CONFIG.sites.items() if site.head_axis}
LAYERED = [name for name, site in CONFIG.sites.items() if site.layered and name not in HEADED]
NORMS = {"attn_scale": 1.0, "mlp_scale": 1.0, "final_scale": 1.0}
SHARED = {"product of z": 0.5, "product of scores": 0.5, "product of act": 0.5}
# Name → the rules, and what they say in the words of `ByAutograd`, as the papers have them.
NAMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "none": (lambda config: Rules(), {}),
    "relp": (relp, {**NORMS, "pattern": 1.0, "secant": 1.0, "product of act": 0.5}),
    "gim": (gim, {**NORMS, **SHARED, "temperature": 2.0}),
    "attn_lrp": (attn_lrp, {**NORMS, **SHARED, "secant": 1.0}),
    "frozen": (frozen, {**NORMS, "pattern": 1.0}),
}


def drawn(seed: int) -> tuple[Rules, dict[str, Any]]:
    """Every rule at once, another number for each layer and head; and in the words of `ByAutograd`."""
    rng = np.random.default_rng(seed)
    stop: dict[str, Any] = {name: rng.uniform(0, 0.3, (3, n)) for name, n in HEADED.items() if name != "allowed"}
    stop |= {name: rng.uniform(0, 0.3, 3) for name in LAYERED}
    stop |= {name: rng.uniform(0, 0.3) for name in ("embed", "final_scale", "final_norm")}
    products = {"z": rng.uniform(size=(3, 4)), "scores": rng.uniform(size=(3, 4)), "act": rng.uniform(size=3)}
    secant, temperature = rng.uniform(size=3), rng.uniform(0.5, 3, size=(3, 4))
    said = {**stop, **{f"product of {name}": x for name, x in products.items()}}
    return Rules(stop, products, secant, temperature), {**said, "secant": secant, "temperature": temperature}


@pytest.fixture(scope="module")
def wide() -> Iterator[Llama]:
    """A model in float64, which JAX has as long as this lives."""
    with jax.enable_x64(True):
        yield tiny_llama(dtype=np.float64)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def difference(
    model: Llama, embed: Any, rules: Rules | None, mask: Any = None, added: Any = None, remat: bool = False
) -> jax.Array:
    """The metric as a function of the embeddings `[T, E]`, and of what is added to other sites in every layer."""
    tokens = TOKENS if mask is None else np.zeros(len(mask), np.int32)
    edits = [Edit("embed", "set", None, True, embed)]
    edits += [Edit(name, "add", None, True, x) for name, x in (added or {}).items()]
    logits = forward(model, tokens, edits, logits="last", mask=mask, rules=rules, remat=remat).logits
    return logits[ANSWER] - logits[AGAINST]


def by_autograd(model: Llama, said: dict[str, Any], sites: tuple[str, ...] = ()) -> tuple[float, Any, dict[str, Any]]:
    """The metric, its gradient by the embeddings, and by what is added to sites, `[L, …]`."""
    from .by_autograd import ByAutograd

    run = ByAutograd(model)
    embed = run.embed[TOKENS].requires_grad_()
    zeros: dict[tuple[str, int], Any] = {}

    def add(name: str, layer: int | None, x: Any) -> Any:
        if name not in sites or layer is None:
            return x
        zeros[name, layer] = x.detach().mul(0).requires_grad_()
        return x + zeros[name, layer]

    logits = run(embed, said, add)
    value = logits[ANSWER] - logits[AGAINST]
    value.backward()
    found = {name: np.stack([zeros[name, layer].grad.numpy() for layer in range(3)]) for name in sites}
    assert embed.grad is not None
    return value.item(), embed.grad.numpy(), found


def assert_exact(ours: Any, theirs: Any) -> None:
    theirs = np.asarray(theirs)
    assert np.shape(ours) == theirs.shape and np.abs(theirs).max() > 1e-4
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=EXACT * np.abs(theirs).max())


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMED)
def test_gradients_are_those_of_the_papers_formulas(name: str, wide: Llama, x64: None) -> None:
    make, said = NAMED[name]
    value, gradient, _ = by_autograd(wide, said)
    embed = wide.embed[...][TOKENS]
    found, slope = jax.value_and_grad(lambda e: difference(wide, e, make(wide.config)))(embed)
    np.testing.assert_allclose(found, value, rtol=EXACT)
    assert_exact(slope, gradient)


@pytest.mark.torch
def test_layers_that_run_again_in_the_backward_pass_obey_them_too(wide: Llama, x64: None) -> None:
    rules, said = drawn(0)
    slope = jax.grad(lambda e: difference(wide, e, rules, remat=True))(wide.embed[...][TOKENS])
    assert_exact(slope, by_autograd(wide, said)[1])


@pytest.mark.torch
def test_every_number_of_every_rule_acts_where_it_says_and_maps(wide: Llama, x64: None) -> None:
    """A family of two, by its embeddings and by sites on the way, with one program; forward derivatives agree."""
    sites = ("resid_pre", "q", "k", "v", "scores", "pattern", "z", "gate", "gate_act", "act", "mlp_out")
    families = [drawn(seed) for seed in (0, 1)]
    rules = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *(one for one, _ in families))
    theirs = [by_autograd(wide, said, sites) for _, said in families]
    embed = wide.embed[...][TOKENS]
    zeros = {name: jnp.zeros(np.shape(x)) for name, x in theirs[0][2].items()}

    def metric(given: Any, one: Rules) -> jax.Array:
        return difference(wide, given[0], one, added=given[1])

    slopes = jax.jit(jax.vmap(jax.grad(metric), (None, 0)))((embed, zeros), rules)
    for i, (_, gradient, others) in enumerate(theirs):
        assert_exact(slopes[0][i], gradient)
        for name, x in others.items():
            assert_exact(slopes[1][name][i], x)
    rng = np.random.default_rng(3)
    along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), (embed, zeros))
    _, pushed = jax.vmap(lambda one: jax.jvp(lambda x: metric(x, one), ((embed, zeros),), (along,)))(rules)
    wanted = sum((along[0] * theirs[i][1]).sum() * np.eye(2)[i] for i in (0, 1))
    wanted += sum((along[1][name] * theirs[i][2][name]).sum() * np.eye(2)[i] for i in (0, 1) for name in sites)
    np.testing.assert_allclose(pushed, wanted, rtol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_relp_conserves_the_metric(tied: bool, x64: None) -> None:
    """Of a model without biases everything that reaches the metric is a sum of what the embeddings give it; padding gives nothing."""
    model = tiny_llama(dtype=np.float64, tie_word_embeddings=tied)
    mask = np.arange(T + 2) >= 2
    embed = model.embed[...][np.concatenate([[5, 6], TOKENS])]
    value, slope = jax.value_and_grad(lambda e: difference(model, e, relp(model.config), mask))(embed)
    assert abs(value) > 0.1 and not np.asarray(slope[:2]).any()
    np.testing.assert_allclose((embed * slope).sum(), value, rtol=1e-9)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["gemma3", "olmo3"])
def test_relp_conserves_the_metric_whatever_is_normalised(kind: str, x64: None, tmp_path: Path) -> None:
    """Queries, keys and what is added to the stream are normalised in these, and the gate is not silu's."""
    make(kind).save_pretrained(tmp_path)
    model = jax.tree.map(lambda x: x.astype(np.float64), from_pretrained(tmp_path))
    embed = forward(model, TOKENS, capture="embed", logits="none")["embed"]
    value, slope = jax.value_and_grad(lambda e: difference(model, e, relp(model.config)))(embed)
    assert abs(value) > 1e-3
    np.testing.assert_allclose((embed * slope).sum(), value, rtol=1e-9)


@pytest.mark.torch
def test_a_secant_is_that_of_any_activation(x64: None) -> None:
    """Its own ratio act(g) / g, a fraction of which is a constant; at 0 the limit of that."""
    import torch
    from transformers.activations import ACT2FN

    gate = np.array([-3.0, -0.7, -1e-6, 1e-9, 0.4, 2.5, 7.0])
    learned = {"prelu": {"weight": jnp.float64(0.25)}}
    names = [name for name in ACTIVATIONS if name not in ("sigmoid", "laplace", "xielu")]

    @jax.jit
    def slopes(x: jax.Array, secant: jax.Array) -> dict[str, jax.Array]:
        rules = Derivatives(secant=secant)
        return {
            name: jax.grad(lambda y, name=name: rules.activation(ACTIVATIONS[name], y, learned.get(name, {})).sum())(x)
            for name in names
        }

    ours = slopes(gate, 0.75)
    for name in names:
        g = torch.tensor(gate, requires_grad=True)
        own = ACT2FN[name]
        ratio = (own.double() if isinstance(own, torch.nn.Module) else own)(g) / g
        (g * (0.25 * ratio + 0.75 * ratio.detach())).sum().backward()
        assert g.grad is not None
        np.testing.assert_allclose(ours[name], g.grad, rtol=1e-7, atol=EXACT, err_msg=name)
    near_zero = np.array([0.0, 1e-310, -1e-307, 1e-300, -1e-300, 0.0, 0.0])
    np.testing.assert_allclose(slopes(near_zero, 1.0)["silu"], 0.5)  # sigmoid's limit


@pytest.mark.torch
def test_gim_is_gim_explains(x64: None, tmp_path: Path) -> None:
    """The paper's own package, mounted on Hugging Face's Llama; it shares no gradient between gate and up."""
    gim_explain = pytest.importorskip("gim")
    import torch
    import transformers
    from gim.context.attention import scale_grad
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = transformers.LlamaConfig(**{**BASE, "rope_theta": 10000.0})
    hf = transformers.LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    hf.save_pretrained(tmp_path)
    model = jax.tree.map(lambda x: x.astype(np.float64), from_pretrained(tmp_path))

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        q, k, v = (scale_grad(x, share) for x, share in ((q, 0.25), (k, 0.25), (v, 0.5)))
        k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
        causal = torch.tril(torch.ones(T, T, dtype=torch.bool))
        pattern = torch.softmax((q @ k.transpose(2, 3) * scaling).masked_fill(~causal, -1e300), -1)
        return (pattern @ v).transpose(1, 2).contiguous(), pattern

    ALL_ATTENTION_FUNCTIONS.register("gim", attention)
    hf = hf.double()
    hf.set_attn_implementation("gim")
    for parent in list(hf.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    ids = torch.tensor(TOKENS).long()
    theirs = gim_explain.explain(
        hf, ids, target_token_id=ANSWER, baseline_token_id=7, q_scale=None, k_scale=None, v_scale=None
    )
    rules = gim(model.config)
    rules = Rules(rules.stop, {name: x for name, x in rules.products.items() if name != "act"}, None, rules.temperature)
    embed = model.embed[...]

    def logit(e: Any) -> Any:
        return forward(model, TOKENS, Edit("embed", "set", None, True, e), logits="last", rules=rules).logits[ANSWER]

    slope = jax.grad(logit)(embed[TOKENS])
    np.testing.assert_allclose((slope * (embed[TOKENS] - embed[None, 7])).sum(-1), theirs.numpy(), atol=1e-6, rtol=1e-6)


EVERYTHING = {
    "stop": {"embed": 0.5, "final_scale": 1.0, "final_norm": 0.5, **dict.fromkeys([*HEADED, *LAYERED], 0.5)},
    "products": dict.fromkeys(("z", "scores", "act"), 0.5), "secant": 1.0, "temperature": 2.0,
}  # fmt: skip
EVERYTHING["stop"].pop("allowed")


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "mistral", "smollm3", "granite", "gemma2", "gemma3", "olmo3", "phi3"]
)
def test_values_of_every_family_are_the_same_bits(kind: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert_same_bits(model, np.random.default_rng(1).integers(3, 61, 13))


def test_values_are_the_same_bits() -> None:
    assert_same_bits(tiny_llama(), TOKENS)


def assert_same_bits(model: Any, tokens: np.ndarray) -> None:
    """With every rule there is."""
    sites = model.config.sites
    plain = forward(model, tokens, capture=tuple(sites))
    rules = Rules(**{**EVERYTHING, "stop": {name: 0.5 for name in sites if name != "allowed"}})
    ruled = forward(model, tokens, capture=tuple(sites), rules=rules)
    for name, x in plain.activations.items():
        np.testing.assert_array_equal(ruled[name], x, err_msg=name)
    np.testing.assert_array_equal(ruled.logits, plain.logits)


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ("relp", TypeError, "rules is a str; give Rules, such as oculi_jax.rules.relp"),
        (Rules(stop={"patern": 1.0}), ValueError, "did you mean 'pattern'"),
        (Rules(stop={"attn_post_scale": 1.0}), ValueError, "This model has no site 'attn_post_scale'"),
        (Rules(stop={"allowed": 1.0}), ValueError, "yes and no, which has no gradient"),
        (Rules(stop={"z": 1.5}), ValueError, r"Rules.stop\['z'\] holds 1.5, and a fraction is 0"),
        (Rules(stop={"z": np.nan}), ValueError, "holds nan"),
        (Rules(stop={"z": True}), TypeError, "of bool, and numbers are needed"),
        (Rules(stop={"z": np.ones(3)}), ValueError, r"has shape \[3\]; it can be a number or \[L, H\] = \[3, 4\]"),
        (Rules(stop={"v": np.ones((3, 4))}), ValueError, r"\[L, K\] = \[3, 2\]"),
        (Rules(stop={"final_scale": np.ones(1)}), ValueError, r"has shape \[1\]; it can be a number\."),
        (Rules(products={"pattern": 0.5}), ValueError, r"names 'pattern'; the products are 'z' \(patterns · values\)"),
        (Rules(temperature=0.0), ValueError, "a temperature is above 0"),
        (grad_drop(CONFIG), ValueError, r"shape \[3, 3\].*A family of rules is mapped: jax.vmap"),
    ],
)
def test_what_cannot_be_is_refused(rules: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        forward(tiny_llama(), TOKENS, rules=rules)


def test_a_secant_needs_an_activation_that_is_0_at_0() -> None:
    model = tiny_llama(hidden_act="sigmoid")
    with pytest.raises(ValueError, match="activation is 'sigmoid', which is not 0 at 0"):
        forward(model, TOKENS, rules=relp(model.config))


@pytest.mark.torch
def test_a_model_of_torch_refuses_them() -> None:
    with pytest.raises(TypeError, match=r"rules change JAX's derivatives.*oculi_jax.from_pretrained"):
        forward(make("qwen2"), TOKENS, rules=relp(CONFIG))
