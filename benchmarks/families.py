"""Another family than Llama's, beside Hugging Face: `python benchmarks/families.py [--model DIR] [--json OUT]`.

The plain forward of `core.py` and the head sweep of `sweeps.py`, on Gemma 3 270M or a checkpoint of any family.
"""

from __future__ import annotations

from functools import partial

from table import arguments, hugging_face, measure  # isort: skip

import numpy as np
from core import HARBOUR, N_TOKENS, plain_row
from sweeps import Bench, ablation_row, agreement_row, batched_row

from oculi_jax import from_pretrained
from oculi_jax.utils.tokens import load_tokenizer


def main() -> None:
    args = arguments(str(__doc__), "gemma-3-270m", "gemma3")
    model, tokenizer = from_pretrained(args.model, dtype="float32"), load_tokenizer(args.model)
    bench = Bench(model, args.model, tokenizer, bars={"ablation, torch": 10.0})
    tokens = np.resize(np.array(tokenizer.encode(HARBOUR), np.int32), N_TOKENS)
    n_heads = model.config.num_hidden_layers * model.config.num_attention_heads
    heads = f"ablating {n_heads} heads, {len(bench.prompt)} tokens"
    plan = [
        ("plain forward: of Hugging Face's time", "torch",
         lambda: plain_row(model, hugging_face(args.model), tokens, bar=0.7)),
        (f"{heads}: Hugging Face's time over ours", "torch", partial(ablation_row, bench, "torch")),
        (f"{heads}: Hugging Face's, a layer's heads as one batch", "torch", lambda: batched_row(bench)),
        ("all variants of three sweeps: largest difference from Hugging Face's loop", "torch", lambda: agreement_row(bench)),
    ]  # fmt: skip
    measure(plan, f"1×{N_TOKENS}", args)


if __name__ == "__main__":
    main()
