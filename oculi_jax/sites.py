"""The letters of every shape and the table of sites: the named values of a forward pass that can be read and edited.

Letters, everywhere the same: `L` layers, `T` tokens (query positions), `S` key positions, `E` residual width, `H` query
heads, `K` key/value heads, `G = H // K`, `D` head dimension, `F` MLP width, `V` vocabulary, `B` batch.

Validation, captures, their cost, the documentation and the look-up of other tools' names all read `SITES`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: what users type.
        axes: letters of the value at one layer; a capture of a layered site leads with `L`.
        meaning: one line for people.
        layered: whether it occurs once in every layer, or once in the whole pass.
        guide: the guide's name for it, empty where it has none.
        aliases: names in other tools for the same value; `{}` stands for the layer.
        dtype: `"float32"`, `"bool"`, or `"model"` for the dtype of the model.

    Examples:
        >>> SITES["k"].shape, SITES["k"].head_axis, SITES["k"].meaning
        ('[L, K, T, D]', 'K', 'keys after rotation: what attention uses')
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    layered: bool = True
    guide: str = ""
    aliases: tuple[str, ...] = ()
    dtype: str = "model"

    @property
    def head_axis(self) -> str | None:
        """The letter of the site's head axis: `H`, `K` or None."""
        return self.axes[0] if self.axes[0] in "HK" else None

    @property
    def shape(self) -> str:
        """The axes of a capture of this site, for messages: `[L, H, T, D]`."""
        return "[" + ", ".join((("L",) if self.layered else ()) + self.axes) + "]"


def _site(name: str, axes: str, meaning: str, *, layered: bool = True, guide: str = "", aliases: str = "") -> Site:
    dtype = "bool" if name == "allowed" else "float32" if name == "scores" or name.endswith("_scale") else "model"
    return Site(name, tuple(axes.split()), meaning, layered, guide=guide, aliases=tuple(aliases.split()), dtype=dtype)


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        _site("embed", "T E", "token embeddings", layered=False, aliases="hook_embed model.embed_tokens"),
        _site(
            "resid_pre", "T E", "residual stream entering the layer",
            guide="residual.pre_attn", aliases="blocks.{}.hook_resid_pre",
        ),
        _site("attn_scale", "T", "reciprocal root mean square of the first norm"),
        _site("attn_in", "T E", "input of attention: normalised and weighted, or in some families the stream itself",
              aliases="model.layers.{}.input_layernorm"),
        _site("q_proj", "H T D", "queries before their norm"),
        _site("k_proj", "K T D", "keys before their norm"),
        _site("q_scale", "H T", "reciprocal root mean square of the queries' norm"),
        _site("k_scale", "K T", "reciprocal root mean square of the keys' norm"),
        _site(
            "q_pre_rope", "H T D", "queries before rotation",
            aliases="blocks.{}.attn.hook_q model.layers.{}.self_attn.q_proj",
        ),
        _site(
            "k_pre_rope", "K T D", "keys before rotation",
            aliases="blocks.{}.attn.hook_k model.layers.{}.self_attn.k_proj",
        ),
        _site("q", "H T D", "queries after rotation: what attention uses", guide="queries",
              aliases="blocks.{}.attn.hook_rot_q"),
        _site("k", "K T D", "keys after rotation: what attention uses", guide="keys",
              aliases="blocks.{}.attn.hook_rot_k"),
        _site("v", "K T D", "values", guide="values",
              aliases="blocks.{}.attn.hook_v model.layers.{}.self_attn.v_proj"),
        _site("scores", "H T S", "q·k/√D, or as a family scales and caps it; before mask and softmax"),
        _site("allowed", "H T S", "which keys a query may look at (bool): causal, in the layer's window, and neither side padding"),
        _site("pattern", "H T S", "softmax over the allowed keys; rows sum to 1", guide="patterns",
              aliases="blocks.{}.attn.hook_pattern"),
        _site("z", "H T D", "pattern · values, per head", aliases="blocks.{}.attn.hook_z"),
        _site("attn_proj", "T E", "z through the output projection, before the norm of what attention adds"),
        _site("attn_post_scale", "T", "reciprocal root mean square of the norm of what attention adds"),
        _site("attn_out", "T E", "what attention adds to the stream: z through the output projection, and its norm if there is one",
              aliases="blocks.{}.hook_attn_out model.layers.{}.self_attn.o_proj model.layers.{}.self_attn"),
        _site("resid_mid", "T E", "resid_pre + attn_out", guide="residual.post_attn = residual.pre_mlp",
              aliases="blocks.{}.hook_resid_mid"),
        _site("mlp_scale", "T", "reciprocal root mean square of the second norm"),
        _site("mlp_in", "T E", "input of the MLP: normalised and weighted, or in some families the stream itself",
              aliases="model.layers.{}.post_attention_layernorm"),
        _site("gate", "T F", "gate projection", guide="mlp.gate",
              aliases="blocks.{}.mlp.hook_pre model.layers.{}.mlp.gate_proj"),
        _site("up", "T F", "up projection", guide="mlp.up",
              aliases="blocks.{}.mlp.hook_pre_linear model.layers.{}.mlp.up_proj"),
        _site("gate_act", "T F", "the activation of gate, silu in a Llama", aliases="model.layers.{}.mlp.act_fn"),
        _site("act", "T F", "gate_act · up: the neurons", guide="mlp.post_activation",
              aliases="blocks.{}.mlp.hook_post"),
        _site("mlp_proj", "T E", "down projection of act, before the norm of what the MLP adds"),
        _site("mlp_post_scale", "T", "reciprocal root mean square of the norm of what the MLP adds"),
        _site("mlp_out", "T E", "what the MLP adds to the stream: down projection of act, and its norm if there is one",
              guide="mlp.output",
              aliases="blocks.{}.hook_mlp_out model.layers.{}.mlp.down_proj model.layers.{}.mlp"),
        _site("resid_post", "T E", "resid_mid + mlp_out", guide="residual.post_mlp",
              aliases="blocks.{}.hook_resid_post model.layers.{}"),
        _site("final_scale", "T", "reciprocal root mean square of the final norm", layered=False),
        _site("final_norm", "T E", "after the final RMSNorm", layered=False,
              aliases="model.norm"),
    )
}  # fmt: skip


def find_site(name: str, sites: Mapping[str, Site] | None = None) -> tuple[Site, int | None]:
    """The site that a name means, ours or another tool's, and the layer where the name tells one.

    Args:
        name: a site's own name (`"z"`), the guide's (`"residual.pre_attn"`), TransformerLens's
            (`"blocks.3.attn.hook_z"`) or the path of a Hugging Face module (`"model.layers.3.mlp.gate_proj"`).
        sites: a model's own, `config.sites`: in a family with other norms a module may give another site than in a Llama,
            whose paths these are for None.

    Returns:
        The row of the table, and the layer in the name or None.

    Raises:
        ValueError: no site has that name; the message suggests near ones.

    Examples:
        >>> site, layer = find_site("blocks.3.attn.hook_z")
        >>> site.name, layer
        ('z', 3)
    """
    sites = SITES if sites is None else sites
    if name in SITES:
        return SITES[name], None
    for site in sites.values():
        if name and name in site.guide.split(" = "):
            return site, None
        for alias in site.aliases:
            if match := re.fullmatch(re.escape(alias).replace(r"\{\}", r"(\d+)"), name):
                return site, int(match[1]) if match.groups() else None
    raise ValueError(unknown_site(name))


def site_of(name: object, sites: Mapping[str, Site]) -> Site:
    """The site of exactly that name among a model's own (`config.sites`).

    Raises:
        ValueError: there is none, or this model has none of that name.
    """
    if isinstance(name, str) and name in sites:
        return sites[name]
    if isinstance(name, str) and name in SITES:
        raise ValueError(f"This model has no site {name!r}; it has {', '.join(sites)}.")
    raise ValueError(unknown_site(name))


def unknown_site(name: object) -> str:
    """A sentence for a name that is no site: what was probably meant, or all that there is."""
    if isinstance(name, str):
        for site in SITES.values():
            for alias in (*site.aliases, *site.guide.split(" = ")):
                if alias and re.fullmatch(re.escape(alias).replace(r"\{\}", r"(\d+|\{\})"), name):
                    return f"Unknown site {name!r}: that value is called {site.name!r} here."
        near = difflib.get_close_matches(name, SITES, n=2, cutoff=0.5)
        if near:
            return (
                f"Unknown site {name!r}: did you mean {' or '.join(map(repr, near))}? The sites are {', '.join(SITES)}."
            )
    return f"Unknown site {name!r}. The sites are {', '.join(SITES)}."
