"""Names of what writes to the residual stream and of what reads it, and where each is in a pass. They are MIB's.

`a{l}.h{h}` is a head, `m{l}` an MLP, `input` the embedding; they write. A head reads as `a{l}.h{h}<q>`, `<k>` and `<v>`, its
keys and values being its own alone; `a{l}.g{k}<k>` and `<v>` are those of key/value head k, for all query heads that share it.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..models.decoder.config import DecoderConfig


class Place(NamedTuple):
    """Where a name is in a pass.

    Attributes:
        site: what it writes, or what it reads of the stream once that is normalised and projected.
        layer: which; 0 for `input`, the number of layers for `logits`.
        heads: which entries of the site's head axis, where every query head has an entry; empty where there is none.
        depth: counts what reads and writes after one another: attention and MLP of each layer, −1 for `input`.
    """

    site: str
    layer: int
    heads: tuple[int, ...]
    depth: int


def writers_of(config: DecoderConfig) -> dict[str, Place]:
    """Name → place of all that write, in order of depth."""
    found = {"input": Place("resid_pre", 0, (), -1)}
    for layer in range(config.num_hidden_layers):
        for head in range(config.num_attention_heads):
            found[f"a{layer}.h{head}"] = Place("z", layer, (head,), 2 * layer)
        found[f"m{layer}"] = Place("mlp_out", layer, (), 2 * layer + 1)
    return found


def readers_of(config: DecoderConfig) -> dict[str, Place]:
    """Name → place of all that read, in order of depth: keys and values both as each query head's own and as a group's."""
    n_layers, n_heads, n_kv = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    share = n_heads // n_kv
    found = {}
    for layer in range(n_layers):
        for site in "qkv":
            for head in range(n_heads):
                found[f"a{layer}.h{head}<{site}>"] = Place(site, layer, (head,), 2 * layer)
        for site in "kv":
            for head in range(n_kv):
                heads = tuple(range(head * share, (head + 1) * share))
                found[f"a{layer}.g{head}<{site}>"] = Place(site, layer, heads, 2 * layer)
        found[f"m{layer}"] = Place("mlp_in", layer, (), 2 * layer + 1)
    found["logits"] = Place("final_norm", n_layers, (), 2 * n_layers)
    return found


def places_of(names: object, known: dict[str, Place], what: str, config: DecoderConfig) -> dict[str, Place]:
    """Name → place of the names that a user gives, one or several; ValueError or TypeError for what is none.

    Args:
        names: as given.
        known: name → place of all that there are.
        what: `"senders"` or `"receivers"`.
        config: the model's.
    """
    given = (names,) if isinstance(names, str) else names
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{what} is {names!r}, and names are needed: {_listed(what, config)}.")
    if not given:
        raise ValueError(f"{what} is empty; name at least one: {_listed(what, config)}.")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            meant = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise ValueError(f"There is no {name!r} among {what}{meant} They are {_listed(what, config)}.")
    if len(set(given)) < len(given):
        twice = next(name for name in given if list(given).count(name) > 1)
        raise ValueError(f"{what} names {twice!r} twice.")
    return {name: known[name] for name in given}


def _listed(what: str, config: DecoderConfig) -> str:
    """All names, in words."""
    layer, head, kv = config.num_hidden_layers - 1, config.num_attention_heads - 1, config.num_key_value_heads - 1
    if what == "senders":
        return f"input, a0.h0 to a{layer}.h{head}, m0 to m{layer}"
    heads = f"a0.h0<q> to a{layer}.h{head}<v> (q, k or v of a query head), a0.g0<k> to a{layer}.g{kv}<v>"
    return f"{heads} (k or v of all heads that share it), m0 to m{layer}, logits"
