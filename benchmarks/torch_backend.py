"""The torch backend's speed beside its bars: `python benchmarks/torch_backend.py [--model DIR] [--json OUT]`.

Times are medians of calls that alternate in one process. All of it is torch on the CPU, with as many threads as torch takes.
"""

from __future__ import annotations

from typing import Any

from table import HUB_ID, Plan, Row, arguments, hugging_face, measure, side_by_side  # isort: skip

import numpy as np
import torch

from oculi_jax import forward
from oculi_jax.backends import find_model

N_TOKENS = 128


def forward_row(hf: Any, tokens: np.ndarray) -> Row:
    ids = torch.tensor(tokens)[None]
    theirs = torch.inference_mode()(lambda: hf(ids, use_cache=False).logits)
    return side_by_side(lambda: forward(hf, tokens), theirs, 1.1)


def capture_row(args: Any, hf: Any, tokens: np.ndarray) -> Row:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer, own = AutoTokenizer.from_pretrained(args.model), hugging_face(args.model)
    bridge: Any = TransformerBridge.boot_transformers(HUB_ID, hf_model=own, tokenizer=tokenizer, device="cpu")
    ids, sites = torch.tensor(tokens)[None], tuple(find_model(hf).config.sites)
    theirs = torch.inference_mode()(lambda: bridge.run_with_cache(ids))
    return side_by_side(lambda: forward(hf, tokens, capture=sites), theirs, 0.9, pairs=11)


def main() -> None:
    args = arguments(__doc__ or "")
    hf = hugging_face(args.model)
    tokens = np.random.default_rng(0).integers(0, hf.config.vocab_size, N_TOKENS)
    plan: Plan = [
        (f"a forward of {N_TOKENS} tokens: of Hugging Face's own time, sdpa", "", lambda: forward_row(hf, tokens)),
        (
            "every site captured: of TransformerLens run_with_cache's time",
            "transformer_lens",
            lambda: capture_row(args, hf, tokens),
        ),
    ]
    measure(plan, f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads", args)


if __name__ == "__main__":
    main()
