"""The contract on torch: a Llama whose weights torch holds, on any of its devices (`cpu`, `cuda`, `mps`).

Nothing of a Hugging Face module is called or changed: its weights are read, at each call, where they lie. What is checked, made
canonical, lowered to edits, judged and chosen from logits is the JAX programs' own code. Here are the network, the few operations
of edits, and programs by the names and signatures that they have there, which `forward.program` finds.
"""

from .model import TorchLlama
from .programs import captured, decode, run, run_lens
from .sweeps import observe, run_base, run_group

__all__ = ["TorchLlama", "captured", "decode", "observe", "run", "run_base", "run_group", "run_lens"]
