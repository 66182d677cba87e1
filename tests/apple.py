"""What an Apple GPU lacks, or has got silently wrong, as a mode under which torch on any device refuses it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ISSUE = "https://github.com/pytorch/pytorch/issues/"

# Dtype → why no tensor may have it.
DTYPES = {
    torch.float64: f"no float64: {_ISSUE}122602",
    torch.complex128: f"no float64, nor complex numbers of it: {_ISSUE}122602",
}
# Reduction → where it was wrong, or missing, for integers of 64 bits.
REDUCTIONS = {
    "cumsum": f"{_ISSUE}90635 and 141786",
    "argmax": f"{_ISSUE}98191",
    "max": f"{_ISSUE}90273",
    "amax": f"{_ISSUE}90273",
    "min": f"{_ISSUE}90273",
    "amin": f"{_ISSUE}90273",
    "argmin": f"{_ISSUE}98191",
    "sum": "the kind of issues 90273 and 90635",
    "prod": "the kind of issues 90273 and 90635",
    "cumprod": "the kind of issues 90273 and 90635",
}
# Operation → where it was wrong for whatever it is given.
WRONG = {
    "index_copy": f"{_ISSUE}160993 and 166237",
    "index_copy_": f"{_ISSUE}160993 and 166237",
    "index_put_": f"{_ISSUE}126919",
    "_scaled_dot_product_flash_attention_for_cpu": f"{_ISSUE}163597 and 181133",
    "_scaled_dot_product_fused_attention_overrideable": f"{_ISSUE}163597 and 181133",
    "_scaled_dot_product_attention_math": f"{_ISSUE}163597 and 181133",
    "scaled_dot_product_attention": f"{_ISSUE}163597 and 181133",
}
# Operation → which of its arguments were read wrongly where they were strided, and where that is told.
STRIDED = {
    "where": (slice(0, 1), f"{_ISSUE}150967"),
    "masked_fill_": (slice(0, 2), f"{_ISSUE}107694 and 131285"),
    "addcdiv_": (slice(0, 3), f"{_ISSUE}118115"),
    "softplus": (slice(0, 1), f"{_ISSUE}131736"),
    "elu": (slice(0, 1), f"{_ISSUE}124834"),
    "fill_": (slice(0, 1), f"{_ISSUE}183631"),
}


class Apple(TorchDispatchMode):
    """Inside it, an operation that cannot be relied on raises AssertionError with the upstream issue."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        assert name not in WRONG, f"{name}: {WRONG[name]}"
        if name in REDUCTIONS and given:
            assert given[0].dtype != torch.int64, f"{name} of int64: {REDUCTIONS[name]}"
        if name in STRIDED:
            which, issue = STRIDED[name]
            assert all(x.is_contiguous() for x in args[which] if isinstance(x, torch.Tensor)), (
                f"{name}, strided: {issue}"
            )
        if name == "topk":
            assert given[0].dim() <= 4, f"topk of more than four axes: {_ISSUE}154890"
        out = func(*args, **(kwargs or {}))
        for x in (*given, *(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))):
            assert x.dtype not in DTYPES, f"{name}: {DTYPES[x.dtype]}"
        return out
