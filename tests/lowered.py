"""Programs lowered and compiled for a mesh of 64 virtual devices, at the shapes of large models; no array is made.

`python -m tests.lowered` prints what each sends in its loops over layers and outside of them, and what a device holds, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oculi_jax import forward
from oculi_jax.backends.jax import run_base, run_variants
from oculi_jax.causal import attribution
from oculi_jax.intervention import HeadAblation
from oculi_jax.intervention.frame import Frame
from oculi_jax.intervention.rows import Rows
from oculi_jax.metrics import logit_difference
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig
from oculi_jax.sweeps.planning import Cost

N, T = 8, 64  # a mesh of 8 × 8; tokens
PROMPTS, VARIANTS, SITES = 16, 64, ("z", "mlp_out", "act")
METRIC = logit_difference(3, 41)
# Llama 3.1's, of three layers, since a loop is one; and one of as many key/value heads as do not divide.
MODELS = {"8B": (4096, 32, 8, 14336), "70B": (8192, 64, 8, 28672), "3 groups": (4096, 24, 3, 14336)}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
CALLED = re.compile(r"(?:body|to_apply|calls|condition|true_computation|false_computation)=%?([\w.\-]+)")


def config_of(name: str) -> LlamaConfig:
    n_embed, n_heads, n_kv, n_neurons = MODELS[name]
    return LlamaConfig.from_dict(
        dict(
            model_type="llama", vocab_size=128256, hidden_size=n_embed, intermediate_size=n_neurons, num_hidden_layers=3,
            num_attention_heads=n_heads, num_key_value_heads=n_kv, head_dim=128, rms_norm_eps=1e-5, rope_theta=5e5,
            max_position_embeddings=131072, tie_word_embeddings=False,
        )
    )  # fmt: skip


def collectives(text: str) -> tuple[list[list[Any]], list[Any]]:
    """Of a compiled program: the collectives of each loop, and those outside; each a kind and how many elements its parts have."""
    lines: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
            name = found.group(1)
        lines.setdefault(name, []).append(line)

    def reached(name: str) -> Iterator[str]:
        yield name
        for line in lines[name]:
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            branches = [part.strip().lstrip("%") for part in listed.group(1).split(",")] if listed else []
            for called in [*CALLED.findall(line), *branches]:
                yield from reached(called)

    def sent(names: set[str]) -> list[Any]:
        calls = [re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line) for name in sorted(names) for line in lines[name]]
        shapes = [(call.group(2), re.findall(r"\w+\[([\d,]*)\]", call.group(1))) for call in calls if call]
        return [[kind, [int(np.prod([int(n) for n in s.split(",") if n])) for s in parts]] for kind, parts in shapes]

    bodies = [set(reached(body)) for body in re.findall(r" while\(.*body=%?([\w.\-]+)", text)]
    return [sent(names) for names in bodies], sent(set(lines) - set().union(*bodies))


def programs(config: LlamaConfig, mesh: Mesh) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]]:
    """Name → function, what it is given, and what is planned that a device holds."""

    def like(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    params = {row.name: like(row.shape, np.float32, *row.split(N)) for row in parameter_table(config)}
    batch, few, pairs = like((PROMPTS, T), np.int32, "data"), like((2, T), np.int32), like((PROMPTS, T), np.int32)
    grid = HeadAblation(np.arange(VARIANTS) % 3, np.arange(VARIANTS) % config.num_attention_heads)
    rows, _ = Rows.of(grid, [Frame(config, np.dtype(np.float32), T, None)] * 2)
    leaves = zip(map(np.asarray, rows.leaves), rows.by_variant, strict=True)
    rows = replace(rows, leaves=[like(x.shape, x.dtype, *["data"] * varies) for x, varies in leaves])
    none = Rows.single(())
    cost = Cost(config, T, 2, 1, 2, 4, "cpu", N, N)
    whole = replace(cost, n_read=None, n_ids=config.vocab_size)
    softmax = jax.tree_util.Partial(lambda out: jnp.sum(jax.nn.log_softmax(out.logits[-1])[:2]))

    def run(params: Any, tokens: Any) -> Any:
        return jax.vmap(lambda ids: forward(Llama(config, params), ids, logits="last", capture=("z", "act")))(tokens)

    def swept(params: Any, tokens: Any, rows: Any, metric: Any, **options: Any) -> Any:
        model, leads = Llama(config, params), (False,) * len(jax.tree.leaves(metric))
        options |= dict(size=VARIANTS, metric=metric, metric_by_prompt=leads, mesh=mesh)
        return run_variants(model, tokens, None, rows, **options).value

    def based(params: Any, tokens: Any) -> Any:
        return run_base(Llama(config, params), tokens, None, none, keys=True)

    cut = "model" if config.num_key_value_heads % N == 0 else None
    kept = jax.eval_shape(based, params, few)
    keys = like(kept.keys.shape, np.float32, None, None, cut)
    kept = replace(kept, resid=like(kept.resid.shape, np.float32), keys=keys, values=keys)
    planned: list[int] = []

    def attributed(params: Any, clean: Any, corrupted: Any) -> Any:
        model, ids = Llama(config, params), np.zeros((PROMPTS, T), np.int32)
        pairs = attribution._Pairs.of(model, ids, ids, METRIC, SITES, None)
        ((_, _, at_once, remat),) = pairs.batches(model)
        planned.append(attribution._bytes_of(model, pairs.readings, pairs.how, T, at_once, remat))
        options = dict(how=pairs.how, single=False, at_once=at_once, remat=remat)
        return attribution.attribute(model, clean, corrupted, None, None, METRIC, pairs.readings, **options)

    def resumed(params: Any, tokens: Any, rows: Any, base: Any, which: Any, start: Any) -> Any:
        return swept(params, tokens, rows, METRIC, base=base, which=which, start=start, first=T // 2)

    n = 2 * VARIANTS
    return {
        "forward": (run, (params, batch), None),
        "sweep": (lambda *given: swept(*given, METRIC), (params, few, rows), cost.bytes_of_call(n, T) + cost.bytes_of_last),
        "softmax": (lambda *given: swept(*given, softmax), (params, few, rows), whole.bytes_of_call(n, T)),
        "resumed": (
            resumed, (params, few, rows, kept, like((2,), np.int32), like((), np.int32)), cost.bytes_of_call(n, T // 2)
        ),
        "base": (based, (params, few), replace(cost, n_devices=1).bytes_of_call(2, T) + cost.bytes_of_base(2, True)),
        "attribution": (attributed, (params, pairs, pairs), planned),
    }  # fmt: skip


def main() -> None:
    mesh = jax.make_mesh((N, N), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found: dict[str, Any] = {}
    for name in MODELS:
        config = config_of(name)
        for kind, (function, given, planned) in programs(config, mesh).items():
            if name != "8B" and kind not in ("forward", "sweep", "attribution"):
                continue
            compiled = jax.jit(function, keep_unused=True).lower(*given).compile()
            loops, outside = collectives(compiled.as_text())
            memory = compiled.memory_analysis()
            held = memory.temp_size_in_bytes + memory.output_size_in_bytes
            found[f"{name} {kind}"] = dict(
                params=4 * config.n_params_on(N),
                loops=loops, outside=outside, given=memory.argument_size_in_bytes, held=held,
                planned=planned[-1] if isinstance(planned, list) else planned,
            )  # fmt: skip
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
