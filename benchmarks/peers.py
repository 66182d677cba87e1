"""The same work in Hugging Face with hooks, TransformerLens, nnsight and pyvene, each as its own users write it.

Every peer loads its own copy of the model, since each changes the modules that it wraps. All are given the cheapest form
of the loop that they have: no gradients where none are needed, and logits of the last token alone where they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from table import HUB_ID, hugging_face

# Logits of the last token alone, and no keys and values kept for decoding, passed on to the model by those whose users would:
# not by pyvene, which cannot, nor by TransformerLens's run_with_hooks as its documentation writes it (with them 15 % faster).
LAST: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
# TransformerLens's nodes, of one position: a writer and a reader.
Edge = tuple[Any, Any]


class Peer(Protocol):
    """What a peer can do. A score is `logit[a] − logit[b]` after the last token of `ids`, a list of ids."""

    def ablate(self, ids: Sequence[int], layer: int, head: int) -> float:
        """The score with a head's `z` zeroed."""
        ...

    def keep(self, ids: Sequence[int]) -> Any:
        """The residual stream entering every layer, for `patch`."""
        ...

    def patch(self, ids: Sequence[int], kept: Any, layer: int, position: int) -> float:
        """The score with the residual entering a layer replaced at a position."""
        ...


class HuggingFace:
    """transformers with torch's own hooks, and attention by torch's fused kernel."""

    def __init__(self, directory: Path, tokenizer: Any, answer: tuple[int, int], device: str):
        self.hf, self.device = hugging_face(directory).to(device), device
        self.tokenizer, self.answer = tokenizer, answer
        self.dim, self.n_heads = self.hf.config.head_dim, self.hf.config.num_attention_heads
        self.wrap()

    def wrap(self) -> None:
        """Where the others put themselves around `self.hf`."""

    def ids(self, ids: Any) -> torch.Tensor:
        """`[B, T]`, of one prompt or of many."""
        return torch.tensor(np.atleast_2d(ids), dtype=torch.long, device=self.device)

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        last = logits[0, -1]
        return last[self.answer[0]] - last[self.answer[1]]

    def z_input(self, layer: int) -> torch.nn.Module:
        """The module whose input is `z` of all heads, side by side."""
        return self.hf.model.layers[layer].self_attn.o_proj

    @torch.no_grad()
    def run(self, ids: Any, module: torch.nn.Module, edit: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """The logits after the last token, with what goes into a module edited in place."""
        with pre_hook(module, edit):
            return self.hf(self.ids(ids), **LAST).logits

    def ablate(self, ids: Sequence[int], layer: int, head: int) -> float:
        def zero(z: torch.Tensor) -> None:
            z[..., head * self.dim : (head + 1) * self.dim] = 0

        return self.score(self.run(ids, self.z_input(layer), zero)).item()

    def ablate_layer(self, ids: Sequence[int], layer: int) -> list[float]:
        """The scores of all heads of a layer as one batch: what somebody in a hurry writes."""

        def zero(z: torch.Tensor) -> None:
            split = z.view(*z.shape[:2], self.n_heads, self.dim)
            split[torch.arange(self.n_heads), :, torch.arange(self.n_heads)] = 0

        logits = self.run(np.tile(ids, (self.n_heads, 1)), self.z_input(layer), zero)[:, -1]
        return (logits[:, self.answer[0]] - logits[:, self.answer[1]]).tolist()

    @torch.no_grad()
    def keep(self, ids: Sequence[int]) -> list[torch.Tensor]:
        return self.inputs(ids, self.hf.model.layers)[0]

    @torch.no_grad()
    def keep_z(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """`z` of every layer, `[1, T, H · D]`."""
        return self.inputs(ids, self.z_inputs())[0]

    def z_inputs(self) -> list[torch.nn.Module]:
        return [self.z_input(layer) for layer in range(self.hf.config.num_hidden_layers)]

    def inputs(self, ids: Sequence[int], modules: Iterable[torch.nn.Module]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What goes into each module, in the order they run, and the score that comes of it."""
        seen: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for module in modules:
                handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
                hooks.callback(handle.remove)
            return seen, self.score(self.hf(self.ids(ids), **LAST).logits)

    def patch(self, ids: Sequence[int], kept: Any, layer: int, position: int) -> float:
        def put(x: torch.Tensor) -> None:
            x[:, position] = kept[layer][:, position]

        return self.score(self.run(ids, self.hf.model.layers[layer], put)).item()

    def patch_z(self, ids: Sequence[int], kept: Any, layer: int, head: int) -> float:
        def put(z: torch.Tensor) -> None:
            own = slice(head * self.dim, (head + 1) * self.dim)
            z[..., own] = kept[layer][..., own]

        return self.score(self.run(ids, self.z_input(layer), put)).item()

    def attribute(self, clean: Sequence[int], corrupted: Sequence[int]) -> np.ndarray:
        """(clean − corrupted) · ∂ score / ∂ z on the corrupted run, `[L, H, T]`; no parameter's gradient is computed."""
        source = self.keep_z(clean)
        with torch.enable_grad():
            here, score = self.inputs(corrupted, self.z_inputs())
            grads = torch.autograd.grad(score, here)
        return np.stack([self.summed(s - x.detach(), g) for s, x, g in zip(source, here, grads, strict=True)])

    def summed(self, change: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
        product = (change * gradient)[0].reshape(change.shape[1], self.n_heads, self.dim)
        return product.sum(-1).T.cpu().numpy()


@contextmanager
def pre_hook(module: torch.nn.Module, edit: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within it, a copy of the module's first input is edited before the module sees it."""

    def hook(_: Any, args: Any) -> Any:
        x = args[0].clone()
        edit(x)
        return (x, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TransformerLens(HuggingFace):
    """`TransformerBridge` with `run_with_hooks`."""

    def wrap(self) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.bridge: Any = TransformerBridge.boot_transformers(
            HUB_ID, hf_model=self.hf, tokenizer=self.tokenizer, device=self.device
        )

    @torch.no_grad()
    def ablate(self, ids: Sequence[int], layer: int, head: int) -> float:
        def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z[:, :, head] = 0
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
        return self.score(self.bridge.run_with_hooks(self.ids(ids), fwd_hooks=hooks)).item()

    @torch.no_grad()
    def keep(self, ids: Sequence[int]) -> Any:
        return self.bridge.run_with_cache(self.ids(ids), names_filter=lambda name: name.endswith("hook_resid_pre"))[1]

    @torch.no_grad()
    def patch(self, ids: Sequence[int], kept: Any, layer: int, position: int) -> float:
        name = f"blocks.{layer}.hook_resid_pre"

        def put(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x[:, position] = kept[name][:, position]
            return x

        return self.score(self.bridge.run_with_hooks(self.ids(ids), fwd_hooks=[(name, put)])).item()

    def attribute(self, clean: Sequence[int], corrupted: Sequence[int], parameters: bool = True) -> np.ndarray:
        """As above, with forward and backward hooks.

        Args:
            clean, corrupted: ids.
            parameters: whether the reverse pass also makes the parameters' gradients, which nobody reads: it does unless
                one knows to switch them off, and then to start the graph at the embedding.
        """
        values: dict[str, torch.Tensor] = {}
        source: dict[str, torch.Tensor] = {}
        grads: dict[str, torch.Tensor] = {}

        def keeper(where: dict[str, torch.Tensor]) -> Callable[[torch.Tensor, Any], None]:
            def fn(x: torch.Tensor, hook: Any) -> None:
                where[hook.name] = x.detach()

            return fn

        def is_z(name: str) -> bool:
            return name.endswith("attn.hook_z")

        with torch.no_grad(), self.bridge.hooks(fwd_hooks=[(is_z, keeper(source))]):
            self.bridge(self.ids(clean), **LAST)
        self.bridge.requires_grad_(parameters)
        start = [] if parameters else [("hook_embed", lambda x, hook: x.detach().requires_grad_())]
        forward = [*start, (is_z, keeper(values))]
        with torch.enable_grad(), self.bridge.hooks(fwd_hooks=forward, bwd_hooks=[(is_z, keeper(grads))]):
            self.score(self.bridge(self.ids(corrupted), **LAST)).backward()
        self.bridge.zero_grad()
        return np.stack([self.summed(source[name] - values[name], grads[name]) for name in values])

    def edges(self, clean: np.ndarray, corrupted: np.ndarray) -> dict[Edge, float]:
        """(clean − corrupted write) · ∂ score / ∂ (what the reader reads) on the corrupted run, at each position.

        Ids `[B, T]`, of which it takes the mean. It refuses grouped heads.
        """
        from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

        config = EdgeAttributionConfig(granularity="edge")
        with torch.enable_grad():
            found = attribution_patch(self.bridge.eval(), self.ids(clean), self.ids(corrupted), self.score, config)
        return found.edge_scores

    def faithfulness(self, clean: np.ndarray, corrupted: np.ndarray, kept: Sequence[Edge]) -> float:
        """How much of the difference of the score is left where all other edges are the corrupted run's."""
        from transformer_lens.tools.analysis.attribution_patching import faithfulness

        given = self.bridge.eval(), self.ids(clean), self.ids(corrupted), self.score
        return faithfulness(*given, kept).recovered


def mib_name(edge: Edge) -> str:
    """Of TransformerLens's edge, whose position is left out."""

    def name(node: Any) -> str:
        if node.kind in ("embed", "logits"):
            return "input" if node.kind == "embed" else "logits"
        if node.kind in ("mlp_in", "mlp_out"):
            return f"m{node.layer}"
        head = f"a{node.layer}.h{node.head}"
        return head if node.kind == "attn_head_out" else f"{head}<{node.kind[0]}>"  # "q_input", "k_input", "v_input"

    return "->".join(map(name, edge))


class NNsight(HuggingFace):
    """nnsight's traces."""

    def wrap(self) -> None:
        from nnsight import TransformersModel

        self.traced: Any = TransformersModel(self.hf, tokenizer=self.tokenizer, task="text-generation")

    def ablate(self, ids: Sequence[int], layer: int, head: int) -> float:
        model, own = self.traced, slice(head * self.dim, (head + 1) * self.dim)
        with torch.no_grad(), model.trace(self.ids(ids), **LAST):
            model.model.layers[layer].self_attn.o_proj.input[:, :, own] = 0
            logits = model.lm_head.output.save()
        return self.score(logits).item()

    def keep(self, ids: Sequence[int]) -> Any:
        model = self.traced
        with torch.no_grad(), model.trace(self.ids(ids), **LAST):
            kept = list().save()  # type: ignore[attr-defined]
            for layer in model.model.layers:
                kept.append(layer.input.clone())
        return kept

    def patch(self, ids: Sequence[int], kept: Any, layer: int, position: int) -> float:
        model = self.traced
        with torch.no_grad(), model.trace(self.ids(ids), **LAST):
            model.model.layers[layer].input[:, position] = kept[layer][:, position]
            logits = model.lm_head.output.save()
        return self.score(logits).item()


class Pyvene(HuggingFace):
    """pyvene's `IntervenableModel`; it computes every token's logits, and has no option not to."""

    @torch.no_grad()
    def intervened(self, ids: Sequence[int], config: dict[str, Any], locations: Any, values: Any = None) -> float:
        import pyvene

        model: Any = pyvene.IntervenableModel(pyvene.IntervenableConfig([config]), model=self.hf)
        given = None if values is None else {next(iter(model.interventions)): values}
        base = {"input_ids": self.ids(ids)}
        _, out = model(base, unit_locations=locations, source_representations=given, use_cache=False)
        return self.score(out.logits).item()

    def ablate(self, ids: Sequence[int], layer: int, head: int) -> float:
        import pyvene

        kind = {"component": "head_attention_value_output", "unit": "h", "intervention_type": pyvene.ZeroIntervention}
        return self.intervened(ids, {"layer": layer, **kind}, {"base": [[[head]]]})

    def patch(self, ids: Sequence[int], kept: Any, layer: int, position: int) -> float:
        import pyvene

        kind = {"component": "block_input", "unit": "pos", "intervention_type": pyvene.VanillaIntervention}
        where = {"sources->base": ([[[position]]], [[[position]]])}
        return self.intervened(ids, {"layer": layer, **kind}, where, kept[layer][:, position : position + 1])


# What must be installed → the class that uses it.
PEERS: dict[str, type[HuggingFace]] = {
    "torch": HuggingFace, "transformer_lens": TransformerLens, "nnsight": NNsight, "pyvene": Pyvene
}  # fmt: skip
