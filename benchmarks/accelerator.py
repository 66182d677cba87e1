"""Forwards, decoding and sweeps of Llama 3.2 1B and 3.1 8B on a GPU: `python benchmarks/accelerator.py [--only ROW…] [-o FILE]`.

Random weights of the two shapes are made on the device, in bfloat16; Hugging Face's module, where torch has the same GPU, lies
over the same memory. The two are timed in turn, and a ratio is the median of the rounds; what a first call takes more is apart.
A share of the product rate is that of the device's own 8192³ product, timed in the same rounds, reached by the arithmetic of the
weights: two operations a weight and real token, attention's own left out; of a sweep, in the layers from the edited one on alone.
A share of the bandwidth is the bytes that a step must read over the card's nominal bandwidth, over the time of a step.

`--small` is the same on one tiny float32 shape on any device; `--shape 1B` is one of the two; `-o FILE` holds the table of the
rows that are done. Exits with 1 where a bar or a check is missed, with 2 where there is no accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch some memory
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (Path(__file__).parents[1] / "oculi_jax").is_dir():
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from oculi_jax import CaptureConfig, MLPConfig, ResidualConfig, __version__, forward, generate, padded, plan, sweep
from oculi_jax.backends import jax as programs
from oculi_jax.causal import activation_patching
from oculi_jax.intervention import HeadAblation
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder.checkpoint import named_parameters
from oculi_jax.models.decoder.parameters import Parameter, parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig

LLAMA: dict[str, Any] = dict(
    model_type="llama", vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
ROPE: dict[str, Any] = dict(
    rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
SHAPES: dict[str, dict[str, Any]] = {
    "1B": dict(
        LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True,
        rope_scaling={**ROPE, "factor": 32.0},
    ),
    "8B": dict(
        LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False,
        rope_scaling={**ROPE, "factor": 8.0},
    ),
}  # fmt: skip
SMALL = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16,
)  # fmt: skip
GUIDE = tuple(
    sorted({site for config in (CaptureConfig(), ResidualConfig(), MLPConfig()) for site in config.fields().values()})
)
A, B = 3, 4  # tokens whose logits are compared
METRIC = logit_difference(A, B)
# (row, shape) → what is held to what: a column, ≤ or ≥, and the bar.
BARS: dict[tuple[str, str], list[tuple[str, str, float]]] = {
    ("forward-long", "1B"): [("ratio", "≤", 0.6)],
    ("forward-batch", "1B"): [("ratio", "≤", 0.8)],
    ("forward-long", "8B"): [("ratio", "≤", 0.85)],
    ("decode", "1B"): [("bandwidth", "≥", 0.45)],
    ("decode", "8B"): [("bandwidth", "≥", 0.65)],
    ("set", "1B"): [("rate", "≥", 0.75)],
    ("first", "1B"): [("forward", "≤", 1.0), ("sweep", "≤", 3.5), ("patching", "≤", 5.0)],
    ("memory", "8B"): [("gigabytes", "≤", 1.2)],
}
# Bytes a second that a card's maker names, by the beginning of what JAX calls it: others are measured by a copy.
NOMINAL = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
LIMIT, TOTAL = 12.0, 660.0  # seconds: of a row's rounds, once it is warm; of all, after which no row is begun
ROUNDS = 15  # at most
AGREE = 1e-3  # in logits, in float32
Clock = Callable[[], float]


# What is timed, and how


def seconds(call: Callable[[], Any]) -> float:
    """Until what a call returns is there; torch's side waits by itself."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turn(clocks: Sequence[Clock], limit: float) -> tuple[list[float], list[list[float]]]:
    """What the first call of each said, and then all of them in turn, twice at least, until the limit is spent."""
    firsts = [clock() for clock in clocks]
    start = time.perf_counter()
    warm = [clock() for clock in clocks]
    slow = time.perf_counter() - start > limit / 4
    rounds = [warm] if slow else []
    start = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < ROUNDS and time.perf_counter() - start < limit):
        rounds.append([clock() for clock in clocks])
    return firsts, [list(kept) for kept in zip(*rounds, strict=True)]


def product(small: bool) -> tuple[Clock, float]:
    """The device's own product, and its operations."""
    n, dtype = (256, jnp.float32) if small else (8192, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)  # of ones it would be quicker
    multiply = jax.jit(partial(jnp.matmul, precision="highest" if small else None))
    return lambda: seconds(lambda: multiply(x, x)), 2.0 * n**3


def bandwidth(small: bool) -> tuple[float, str]:
    """Bytes a second, and whose word that is."""
    kind = jax.devices()[0].device_kind
    for name, nominal in NOMINAL.items():
        if kind.startswith(name):
            return nominal, "nominal"
    x = jnp.ones(1 << (20 if small else 29), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    _, [times] = in_turn([lambda: seconds(lambda: copy(x))], 2.0)
    return 2 * x.nbytes / statistics.median(times), "measured by a copy, for want of the nominal one"


# Arithmetic


def layer_weights(config: LlamaConfig) -> int:
    """How many numbers a layer's products multiply with."""
    c = config.sizes
    return 2 * c["E"] * c["D"] * (c["H"] + c["K"]) + 3 * c["E"] * c["F"]


def forward_flops(config: LlamaConfig, n_tokens: int) -> float:
    """Of a forward with the logits of all tokens."""
    c = config.sizes
    return 2.0 * n_tokens * (c["L"] * layer_weights(config) + c["E"] * c["V"])


def sweep_flops(config: LlamaConfig, n_real: int) -> float:
    """Of every head's ablation on prompts of so many real tokens together: a head of layer l changes L − l layers."""
    c = config.sizes
    return 2.0 * n_real * layer_weights(config) * c["H"] * sum(range(1, c["L"] + 1))


def step_bytes(model: Llama) -> int:
    """What decoding a token reads: every weight, but of an embedding table of its own a row."""
    whole = sum(x.nbytes for x in jax.tree.leaves(model))
    return whole - (0 if model.config.tie_word_embeddings else model.embed[...].nbytes)


# The two models


def config_of(shape: str, small: bool) -> LlamaConfig:
    return LlamaConfig.from_dict({**SHAPES[shape], **(SMALL if small else {})})


def random_model(config: LlamaConfig, small: bool) -> Llama:
    """Made on the device, a layer at a time: products keep the size of what they are given, norms are around one."""
    dtype, table = jnp.float32 if small else jnp.bfloat16, parameter_table(config)

    def draw(row: Parameter, key: Any) -> Any:
        def one(key: Any, shape: tuple[int, ...] = row.shape[1:] if row.stacked else row.shape) -> Any:
            noise = jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)
            return 1.0 + 0.1 * noise if "norm" in row.name else row.stored[-1] ** -0.5 * noise

        return jax.lax.map(one, jax.random.split(key, row.shape[0])) if row.stacked else one(key)

    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(table))
    make = jax.jit(lambda keys: {row.name: draw(row, key) for row, key in zip(table, keys, strict=True)})
    return jax.block_until_ready(Llama(config, make(keys)))


def first_layers(model: Llama, n_layers: int, dtype: Any) -> Llama:
    """A model of the first layers alone."""
    params = {
        name: (x[:n_layers] if name.startswith("layers.") else x).astype(dtype)
        for name, x in named_parameters(model).items()
    }
    return jax.block_until_ready(Llama(dataclasses.replace(model.config, num_hidden_layers=n_layers), params))


def why_no_peer() -> str:
    """Why torch cannot run beside JAX here; "" where it can."""
    if not find_spec("torch"):
        return "torch is not installed"
    import torch

    if (platform := jax.default_backend()) == "gpu" and not torch.cuda.is_available():
        return "torch has no GPU"
    return "" if platform in ("cpu", "gpu") else f"torch does not run on JAX's {platform}"


class HuggingFace:
    """transformers' module over a `Llama`'s own memory, and torch's hooks; attention by torch's fused kernel."""

    def __init__(self, model: Llama, attention: str = "sdpa"):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        self.torch, self.n_heads, self.dim = torch, model.config.num_attention_heads, model.config.head_dim
        config = transformers.LlamaConfig.from_dict(
            {**model.config.to_dict(), "bos_token_id": None, "eos_token_id": None}, attn_implementation=attention
        )
        with torch.device("meta"):
            self.hf: Any = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        named, state = named_parameters(model), {}
        for row in parameter_table(model.config):
            whole = torch.from_dlpack(named[row.name])
            for layer, name in enumerate(row.tensors()):
                state[name] = (whole[layer] if row.stacked else whole).view(row.stored)
        if model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        self.device = next(iter(state.values())).device
        self.hf.load_state_dict(state, assign=True)
        with self.device:  # what is in no checkpoint
            self.hf.model.rotary_emb = type(self.hf.model.rotary_emb)(config)

    def tensor(self, x: Any) -> Any:
        return self.torch.as_tensor(np.array(x), device=self.device)

    def ids(self, ids: Any) -> Any:
        return self.tensor(np.atleast_2d(ids)).long()

    def waited(self, call: Callable[[], Any]) -> Any:
        """What a call returns, once the GPU has it."""
        with self.torch.no_grad():
            found = call()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return found

    def logits(self, ids: Any) -> Any:
        return self.waited(lambda: self.hf(self.ids(ids), use_cache=False).logits)

    def generated(self, ids: Any, n_new: int) -> np.ndarray:
        """The new ids, `[B, n]`."""
        ids = self.ids(ids)
        more = self.waited(
            lambda: self.hf.generate(
                ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=n_new, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )
        )  # fmt: skip
        return more[:, ids.shape[1] :].cpu().numpy()

    def scores(self, ids: Any, mask: Any = None) -> Any:
        """The metric of each row of prompts, padded on the left where there is a mask."""
        mask = None if mask is None else self.tensor(mask).long()
        out = self.waited(
            lambda: self.hf(self.ids(ids), attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        )
        return (out[:, A] - out[:, B]).float().cpu().numpy()

    @contextmanager
    def zeroed(self, edits: Iterable[tuple[int, Any, Any]]) -> Iterator[None]:
        """Within it, pre-hooks of `o_proj` zero heads: of a layer, in some rows, which."""

        def hook(rows: Any, heads: Any, _: Any, args: Any) -> Any:
            z = args[0].clone()
            z.view(*z.shape[:2], self.n_heads, self.dim)[rows, :, heads] = 0
            return (z, *args[1:])

        with ExitStack() as hooks:
            for layer, *what in edits:
                module = self.hf.model.layers[layer].self_attn.o_proj
                hooks.callback(module.register_forward_pre_hook(partial(hook, *what)).remove)
            yield

    def ablated(self, heads: Iterable[tuple[int, int]], ids: Any, mask: Any = None) -> np.ndarray:
        """A loop over heads: the metric of each, `[N, B]`."""
        found = []
        for layer, head in heads:
            with self.zeroed([(layer, slice(None), head)]):
                found.append(self.scores(ids, mask))
        return np.array(found)

    def ablated_by_layer(self, ids: Any) -> np.ndarray:
        """A loop over layers, whose heads are a batch: head h is zeroed in row h. `[L, H]`."""
        found, each = [], self.torch.arange(self.n_heads, device=self.device)
        for layer in range(self.hf.config.num_hidden_layers):
            with self.zeroed([(layer, each, each)]):
                found.append(self.scores(np.tile(ids, (self.n_heads, 1))))
        return np.array(found)


# Rows


@dataclass
class Row:
    """A line of the table; `values` are the figures by their columns' names, and `checks` what was held to something."""

    what: str
    ours: str = ""
    theirs: str = ""
    compiling: str = ""
    values: dict[str, float] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)
    note: str = ""
    way: str = "of theirs"  # what the ratio is
    key: str = ""
    shape: str = ""

    def judged(self, bars: Iterable[tuple[str, str, float]]) -> Row:
        for name, sign, bar in bars:
            if (value := self.values.get(name)) is not None:
                self.checks[f"{name} {sign} {bar:g}"] = value <= bar if sign == "≤" else value >= bar
        return self

    def cells(self) -> list[str]:
        ratio, rate, memory = map(self.values.get, ("ratio", "rate", "bandwidth"))
        held = "; ".join(f"{what}: {'pass' if ok else 'FAIL'}" for what, ok in self.checks.items())
        return [
            self.shape, self.what, self.ours, self.theirs, "" if ratio is None else f"{ratio:.3g} {self.way}",
            "" if rate is None else f"{rate:.2f}", "" if memory is None else f"{memory:.2f}", self.compiling, held, self.note,
        ]  # fmt: skip


HEADER = [
    "shape", "work", "ours", "theirs", "ratio", "of the product rate", "of the bandwidth", "compiling", "held to", "note"
]  # fmt: skip


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def spell(s: float) -> str:
    return f"{1e3 * s:.3g} ms" if s < 1 else f"{s:.3g} s"


@dataclass
class Case:
    """One shape: the model, the peer over its memory, and what the rows run."""

    shape: str
    small: bool
    no_peer: str
    bytes_a_second: float
    broken: str = ""  # why there is no peer although torch is there

    @cached_property
    def config(self) -> LlamaConfig:
        return config_of(self.shape, self.small)

    @cached_property
    def model(self) -> Llama:
        return random_model(self.config, self.small)

    @cached_property
    def peer(self) -> HuggingFace | None:
        if not self.no_peer:
            try:
                return HuggingFace(self.model)
            except Exception as error:  # our own figures are wanted all the same
                self.broken = said(error)
        return None

    def against(self, clock: Callable[[HuggingFace], float]) -> Clock | None:
        """What says the peer's seconds, where there is one."""
        return None if self.peer is None else partial(clock, self.peer)

    def ids(self, *shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, shape).astype(np.int32)

    def size(self, whole: int, small: int) -> int:
        return small if self.small else whole

    def some_heads(self, count: int) -> list[tuple[int, int]]:
        """Of all heads, always the same ones."""
        n_heads = self.config.num_attention_heads
        every = self.config.num_hidden_layers * n_heads
        chosen = np.random.default_rng(0).choice(every, min(count, every), replace=False)
        return [(int(i) // n_heads, int(i) % n_heads) for i in sorted(chosen)]

    def row(
        self, what: str, ours: Callable[[], Any], theirs: Clock | None, *, times: bool = False, tokens: int = 0,
        flops: float | None = None, step: int = 0, note: str = "",
    ) -> Row:  # fmt: skip
        """Times the two in turn.

        Args:
            what: names the row.
            ours: our call.
            theirs: says the peer's seconds of the same work; None where there is no peer.
            times: whether the ratio is of their time to ours, and not of ours to theirs.
            tokens: written by a call, to print as tokens a second.
            flops: of ours, to hold beside the device's own product.
            step: how many steps that read the weights a call takes, to hold beside the bandwidth.
            note: what else there is to say.
        """
        multiply, product_flops = product(self.small)
        clocks: dict[str, Clock] = {"ours": lambda: seconds(ours)}
        clocks |= {} if theirs is None else {"theirs": theirs}
        clocks |= {} if flops is None else {"product": multiply}
        firsts, kept = in_turn(list(clocks.values()), 0.1 if self.small else LIMIT)
        found = dict(zip(clocks, kept, strict=True))
        middle = {name: statistics.median(times) for name, times in found.items()}

        def text(name: str) -> str:
            if name not in middle:
                return ""
            return f"{tokens / middle[name]:.4g} tokens/s" if tokens else spell(middle[name])

        row = Row(what, text("ours"), text("theirs"), spell(max(firsts[0] - middle["ours"], 0.0)), note=note)
        row.values = {"seconds": middle["ours"]}
        if theirs is not None:
            ratios = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
            row.way = "times as fast" if times else "of their time"
            row.values |= {"their_seconds": middle["theirs"]}
            row.values["ratio"] = statistics.median(1 / x for x in ratios) if times else statistics.median(ratios)
        if flops is not None:
            rates = [flops / a / (product_flops / b) for a, b in zip(found["ours"], found["product"], strict=True)]
            row.values |= {"flops": flops, "rate": statistics.median(rates)}
            row.note += f" Products at {product_flops / middle['product'] / 1e12:.3g} TFLOP/s."
        if step:
            row.values["bandwidth"] = step_bytes(self.model) * step / self.bytes_a_second / middle["ours"]
        return row

    def agree(self, row: Row, ours: Any, theirs: Any) -> Row:
        """Says how far numbers differ, which float32 is held to; another order of bfloat16 sums is no error."""
        far = float(np.abs(np.asarray(ours, np.float32) - theirs).max())
        row.note += f" Scores differ by at most {far:.1e}."
        if self.small:
            row.checks[f"scores differ by ≤ {AGREE:.0e}"] = far <= AGREE
        return row


def forward_row(case: Case, n_prompts: int, n_tokens: int) -> Row:
    """A batch is `vmap` of `forward` in a jit of one's own, which on a GPU wants the option that ours have."""
    ids, model = case.ids(n_prompts, n_tokens), case.model
    options = {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None

    @partial(jax.jit, compiler_options=options)
    def batch(model: Llama, ids: Any) -> Any:
        return jax.vmap(lambda row: forward(model, row).logits)(ids)

    return case.row(
        f"forward, {n_prompts} × {n_tokens}, all logits",
        lambda: forward(model, ids[0]).logits if n_prompts == 1 else batch(model, ids),
        case.against(lambda peer: seconds(lambda: peer.logits(ids))),
        flops=forward_flops(case.config, ids.size),
    )


def capture_row(case: Case) -> Row:
    plain = partial(forward, case.model, case.ids(case.size(512, 16)))
    what = f"the guide's capture, 1 × {case.size(512, 16)}; theirs is our plain forward"
    return case.row(what, partial(plain, capture=GUIDE), lambda: seconds(plain))


def decode_row(case: Case) -> Row:
    ids, n_new = case.ids(case.size(16, 5)), case.size(64, 6)
    theirs = case.against(lambda peer: seconds(lambda: peer.generated(ids, n_new)))
    ours = partial(generate, case.model, ids, n_new, stop_tokens=())
    row = case.row(f"decoding {n_new} tokens, one row", ours, theirs, times=True, tokens=n_new, step=n_new)
    if case.peer is not None:
        same = np.asarray(ours()) == case.peer.generated(ids, n_new)[0]
        first = n_new if same.all() else int(np.argmin(same))
        row.note += f" The first {first} ids are the same."
        if case.small:
            row.checks["ids are the same"] = first == n_new
    return row


def variants_row(case: Case, batched: bool) -> Row:
    """Sixteen heads ablated; the peer one after another, two of them timed, or as the rows of a batch."""
    ids, n_new = case.ids(case.size(16, 5)), case.size(64, 6)
    heads = case.some_heads(case.size(16, 4))
    layers, which = np.array(heads).T

    def loop(peer: HuggingFace) -> float:
        spent = 0.0
        for layer, head in heads[:2]:
            with peer.zeroed([(layer, slice(None), head)]):
                spent += seconds(lambda: peer.generated(ids, n_new))
        return spent * len(heads) / 2

    def batch(peer: HuggingFace) -> float:
        with peer.zeroed([(layer, row, head) for row, (layer, head) in enumerate(heads)]):
            return seconds(lambda: peer.generated(np.tile(ids, (len(heads), 1)), n_new))

    return case.row(
        f"decoding {n_new} tokens, {len(heads)} variants; theirs {'a batch with hooks' if batched else 'one after another'}",
        partial(generate, case.model, ids, n_new, HeadAblation(layers, which), stop_tokens=()),
        case.against(batch if batched else loop), times=True, tokens=len(heads) * n_new, step=n_new,
        note="" if batched or case.peer is None else "Theirs from 2 variants, scaled.",
    )  # fmt: skip


def heads_row(case: Case, batched: bool) -> Row:
    """All heads ablated on one prompt; the peer a head at a time, some of them timed, or a layer's heads as a batch."""
    ids, config = case.ids(case.size(64, 16)), case.config
    count, heads = config.num_hidden_layers * config.num_attention_heads, case.some_heads(case.size(32, 4))
    ours = partial(sweep, case.model, ids, HeadAblation.grid(config), METRIC, progress=False)
    numbers: list[np.ndarray] = []

    def theirs(peer: HuggingFace) -> float:
        call = (lambda: peer.ablated_by_layer(ids)) if batched else (lambda: peer.ablated(heads, ids)[:, 0])
        spent = seconds(lambda: numbers.append(call()))
        return spent * (1 if batched else count / len(heads))

    row = case.row(
        f"all {count} heads ablated, {len(ids)} tokens; theirs {'a layer’s heads as a batch' if batched else 'a loop with hooks'}",
        ours, case.against(theirs), times=True, flops=sweep_flops(config, ids.size),
        note="" if batched or case.peer is None else f"Theirs from {len(heads)} heads, scaled.",
    )  # fmt: skip
    if case.peer is None:
        return row
    found = np.asarray(ours())
    return case.agree(row, found if batched else found[tuple(np.array(heads).T)], numbers[-1])


def prompts(case: Case, shared: bool = False) -> list[np.ndarray]:
    """A set: 9 to 24 tokens each; where they share their beginning, twelve, and 1 to 12 of their own."""
    count = case.size(64 if case.shape == "1B" else 16, 3)
    lengths = np.random.default_rng(1).integers(9, 25, count)
    rows = [case.ids(int(n), seed=i) for i, n in enumerate(lengths)]
    start = case.ids(12, seed=count)
    return [np.concatenate([start, row[: (len(row) + 1) // 2]]) for row in rows] if shared else rows


def set_row(case: Case, shared: bool) -> Row:
    """All heads ablated on a set of prompts of unequal lengths; the peer pads on the left, and some of its heads are timed."""
    rows, config = prompts(case, shared), case.config
    tokens, mask = padded(rows, length=24)
    n_tokens, heads = tokens.shape[1], case.some_heads(case.size(16, 4))
    left, real = np.zeros_like(tokens), mask[:, ::-1]
    for row, ids in zip(left, rows, strict=True):
        row[n_tokens - len(ids) :] = ids
    count = config.num_hidden_layers * config.num_attention_heads
    given: Any = (case.model, tokens, HeadAblation.grid(config), METRIC)
    ours = partial(sweep, *given, mask=mask, progress=False)
    numbers: list[np.ndarray] = []

    def theirs(peer: HuggingFace) -> float:
        return seconds(lambda: numbers.append(peer.ablated(heads, left, real))) * count / len(heads)

    lengths = f"{min(map(len, rows))}–{max(map(len, rows))} tokens"
    row = case.row(
        f"{len(rows)} prompts of {lengths}{' that share their first 12' if shared else ''} × all {count} heads", ours,
        case.against(theirs), times=True, flops=None if shared else sweep_flops(config, int(mask.sum())),
        note="" if case.peer is None else f"Theirs from {len(heads)} heads, scaled.",
    )  # fmt: skip
    row.note += f" Its plan said {spell(plan(*given, mask=mask).seconds)}."
    if case.peer is None:
        return row
    layers, which = np.array(heads).T
    return case.agree(row, np.asarray(ours())[:, layers, which].T, numbers[-1])


def first_row(case: Case) -> Row:
    """In a process of its own, in which nothing has been compiled, tuned or loaded but what makes the weights."""
    if jax.default_backend() == "tpu":
        return Row("first calls", note="Not measured: a TPU is one process's at a time.")
    command = [sys.executable, __file__, "--first-calls", "--shape", case.shape, *(["--small"] if case.small else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=180)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    row = Row(f"first call: {', '.join(found)}", ", ".join(spell(first) for first, _ in found.values()))
    row.compiling = ", ".join(spell(max(first - second, 0.0)) for first, second in found.values())
    row.values = {name: first for name, (first, _) in found.items()}
    row.note = "In a fresh process, at a second call: " + ", ".join(spell(second) for _, second in found.values()) + "."
    return row


def first_calls(case: Case) -> dict[str, list[float]]:
    """The first and the second call of each, in seconds."""
    model, n_tokens = case.model, case.size(64, 4)
    clean, corrupted = case.ids(n_tokens), case.ids(n_tokens, seed=1)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(model, clean).logits,
        "sweep": lambda: sweep(model, clean, HeadAblation.grid(case.config), METRIC, progress=False),
        "patching": lambda: activation_patching(model, clean, corrupted, METRIC, progress=False).patched,
    }
    return {name: [seconds(call), seconds(call)] for name, call in calls.items()}


def memory_row(case: Case) -> Row:
    """What `forward`'s own program holds beside the weights, as its compiler says."""
    ids, held, own = case.ids(case.size(4096, 16)), [], programs.run

    def watched(*given: Any, **settings: Any) -> Any:
        memory = own.lower(*given, **settings).compile().memory_analysis()  # type: ignore[attr-defined]
        held.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        return own(*given, **settings)

    programs.run = watched
    try:
        row = Row(f"peak memory beside the weights, forward, 1 × {len(ids)}, the last token's logits")
        spent = seconds(lambda: forward(case.model, ids, logits="last").logits)
    finally:
        programs.run = own
    row.ours, row.values = f"{held[-1] / 1e9:.3g} GB", {"gigabytes": held[-1] / 1e9}
    row.note = f"Compiled twice and run once in {spell(spent)}."
    return row


def parity_row(case: Case) -> Row:
    """The logits of a few layers against Hugging Face's in float32, and how near to them bfloat16 comes, ours and theirs.

    Errors of bfloat16 are root mean squares over all logits, relative to the logits' own.
    """
    ids = case.ids(case.size(1024, 16))
    half, full = (first_layers(case.model, case.size(4, 1), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    row = Row(f"logits of {half.config.num_hidden_layers} layers, {len(ids)} tokens")

    def logits(model: Llama, **options: Any) -> np.ndarray:
        return np.asarray(forward(model, ids, **options).logits)

    def their_logits(model: Llama, attention: str = "sdpa") -> np.ndarray:
        return HuggingFace(model, attention).logits(ids)[0].float().cpu().numpy()

    ours = logits(full)
    exact = ours if case.no_peer else their_logits(full, "eager")

    def error(found: np.ndarray) -> float:
        return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))

    own = error(logits(half))
    row.ours, row.values = f"{own:.2e} from float32", {"error": own}
    if not case.no_peer:
        far = float((np.abs(ours - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())
        theirs = error(their_logits(half))
        row.theirs, row.values = f"{theirs:.2e} from float32", {"error": own, "ratio": own / theirs, "float32": far}
        row.checks[f"float32: a row's largest difference {far:.1e} ≤ 1e-4 of its largest logit"] = far <= 1e-4
        row.checks["bfloat16: our error ≤ 1.25 of theirs"] = own <= 1.25 * theirs
    if "attention" in inspect.signature(forward).parameters:
        explicit = error(logits(half, attention="explicit"))
        row.note = f"With explicit attention {explicit:.2e}."
        row.checks["bfloat16: fused error ≤ 1.25 of explicit"] = own <= 1.25 * explicit
        row.checks["float32: explicit bit-equal"] = bool((logits(full, attention="explicit") == ours).all())
    return row


def sized(whole: tuple[int, int], small: tuple[int, int]) -> Callable[[Case], Row]:
    return lambda case: forward_row(case, *(small if case.small else whole))


# In the order in which they run; first calls come before anything lies on the device.
ROWS: dict[str, Callable[[Case], Row]] = {
    "first": first_row,
    "forward-short": sized((1, 128), (1, 16)),
    "forward-long": sized((1, 2048), (1, 16)),
    "forward-batch": sized((8, 1024), (2, 16)),
    "decode": decode_row,
    "heads": partial(heads_row, batched=False),
    "heads-batched": partial(heads_row, batched=True),
    "set": partial(set_row, shared=False),
    "parity": parity_row,
    "memory": memory_row,
    "capture": capture_row,
    "decode-16": partial(variants_row, batched=False),
    "decode-16-batched": partial(variants_row, batched=True),
    "set-shared": partial(set_row, shared=True),
}


# The table


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def machine(no_peer: str, memory: tuple[float, str]) -> list[str]:
    device = jax.devices()[0]
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "not known"
    packages = ", ".join(f"{name} {installed(name)}" for name in ("jax", "jaxlib", "torch", "transformers"))
    peer = f"No peer: {no_peer}." if no_peer else "Theirs is Hugging Face's, in turn with ours on the same weights."
    flags, platform = os.environ.get("XLA_FLAGS", ""), " ".join(device.client.platform_version.split())
    return [
        f"{device.device_kind}, driver {driver}, {platform}; {packages}, oculi-jax {__version__}.",
        f"Memory at {memory[0] / 1e12:.3g} TB/s, {memory[1]}. {peer}{f' XLA_FLAGS is {flags}.' if flags else ''}",
    ]


def table(rows: list[Row], about: list[str]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *about]) + "\n"


def write(path: Path, text: str) -> None:
    """Aside, then renamed: a run that is cut off leaves the rows that were done."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def run_row(key: str, case: Case, late: bool) -> Row:
    row = Row(key, note="Not run: the time was up.")
    if not late:
        try:
            row = ROWS[key](case)
        except Exception as error:  # the other rows go on
            row = Row(key, checks={"it runs": False}, note=said(error))
    if case.broken:
        row.checks[f"Hugging Face's module over the same memory ({case.broken})"] = False
    row.key, row.shape, row.note = key, case.shape, row.note.strip()
    return row if case.small else row.judged(BARS.get((key, case.shape), ()))


def measured(shapes: Sequence[str], keys: Sequence[str], small: bool, file: Path | None) -> list[Row]:
    """Runs the rows, shape by shape, and prints each as it is done."""
    start, rows, no_peer = time.perf_counter(), [], why_no_peer()
    memory = bandwidth(small)
    about = machine(no_peer, memory)
    todo = [(shape, [key for key in keys if key == "first"]) for shape in shapes]
    todo += [(shape, [key for key in keys if key != "first"]) for shape in shapes]
    for shape, some in todo:
        case = Case(shape, small, no_peer, memory[0])
        for key in some:
            begun = time.perf_counter()
            row = run_row(key, case, begun - start > TOTAL)
            rows.append(row)
            spent = f"({time.perf_counter() - begun:.0f} s)"
            print(f"{key}:", " | ".join(filter(None, row.cells())), spent, flush=True)
            if file is not None:
                write(file, table(rows, about))
        del case
        gc.collect()  # the model, before the next is made
    print("", table(rows, about), sep="\n", end="")
    return rows


def main(given: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], epilog=f"Rows: {', '.join(ROWS)}.")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="some of the rows")
    parser.add_argument("--shape", choices=SHAPES, help="one of the two shapes")
    parser.add_argument("--small", action="store_true", help="tiny shapes in float32, on any device")
    parser.add_argument("-o", type=Path, metavar="FILE", help="a file that holds the table of the rows that are done")
    parser.add_argument("--first-calls", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if jax.default_backend() == "cpu" and not args.small:
        print(
            "There is no accelerator: JAX runs on the CPU here. Install jax[cuda13], jax[cuda12] or jax[tpu] and leave "
            "JAX_PLATFORMS unset, or give --small, which runs the same code on tiny shapes.",
            file=sys.stderr,
        )
        sys.exit(2)
    shapes = [args.shape] if args.shape else list(SHAPES)[: 1 if args.small else None]
    if args.first_calls:
        print(json.dumps(first_calls(Case(shapes[0], args.small, "not asked for", math.nan))))
        return []
    return measured(shapes, [key for key in ROWS if not args.only or key in args.only], args.small, args.o)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    if "--small" in sys.argv:  # all of whose time is compiling
        jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(not all(ok for row in main() for ok in row.checks.values()))
