"""`Layout`: which tokens run, where they stand, and which keys each may look at. All that runs layers begins with one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ...models.decoder.config import DecoderConfig
from ...models.decoder.rope import attention_factor, inverse_frequencies


@dataclass(frozen=True)
class Layout:
    """The tokens of a run of many rows. Axes of rows are as long as there are rows, or one long where all are alike.

    Attributes:
        first, n_tokens: the tokens that run are those of these slots; `n_tokens` of them from the first.
        n_keys: how many slots they may look at.
        real: bool `[n, S]` on the host, True at the slots that hold a token; None where all do.
        queries, keys: `real` of the tokens that run `[n, T]`, and of all `[n, S]`, on the device; None where `real` is.
        rotations: cosines and sines `[n, 1, T, D/2]` for each kind of layer.
        windows: how many tokens back a token sees, for each kind; None for all.
        kinds: the number of each layer's kind.
    """

    first: int
    n_tokens: int
    n_keys: int
    real: np.ndarray | None
    queries: Tensor | None
    keys: Tensor | None
    rotations: tuple[tuple[Tensor, Tensor], ...]
    windows: tuple[int | None, ...]
    kinds: tuple[int, ...]
    _allowed: dict[int, Tensor] = field(default_factory=dict)
    _bias: dict[int, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.rotations[0][0].device

    def rotation(self, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[n, 1, T, D/2]` of a layer."""
        return self.rotations[self.kinds[layer]]

    def is_causal(self, layer: int) -> bool:
        """Whether the tokens of this layer see all before them, from the first slot on, and nothing else is to be said."""
        window = self.windows[self.kinds[layer]]
        return self.queries is None and (window is None or window >= self.n_keys)

    def allowed(self, layer: int) -> Tensor:
        """bool `[n, 1, T, S]`: which keys each token may look at."""
        kind = self.kinds[layer]
        if kind not in self._allowed:
            slots = torch.arange(self.n_keys, device=self.device)
            own = slots[self.first : self.first + self.n_tokens, None]
            found = slots[None, :] <= own
            found, window = found[None, None], self.windows[kind]
            if window is not None:  # which counts real tokens, so that padding between them takes no room
                ranks = np.arange(self.n_keys)[None] if self.real is None else np.cumsum(self.real, axis=1) - 1
                near = ranks[:, None, None, :] > ranks[:, None, self.first : self.first + self.n_tokens, None] - window
                found = found & torch.from_numpy(near).to(self.device)
            if self.queries is not None and self.keys is not None:
                found = found & self.queries[:, None, :, None] & self.keys[:, None, None, :]
            self._allowed[kind] = found
        return self._allowed[kind]

    def bias(self, layer: int) -> Tensor:
        """float32 `[n, 1, T, S]`: what makes softmax zero where a key is not allowed, in rows that have an allowed one."""
        kind = self.kinds[layer]
        if kind not in self._bias:
            self._bias[kind] = (~self.allowed(layer)).to(torch.float32) * (torch.finfo(torch.float32).min / 2)
        return self._bias[kind]

    def to(self, device: torch.device) -> Layout:
        if device == self.device:
            return self
        queries, keys = (None if x is None else x.to(device) for x in (self.queries, self.keys))
        rotations = tuple((cos.to(device), sin.to(device)) for cos, sin in self.rotations)
        return replace(self, queries=queries, keys=keys, rotations=rotations, _allowed={}, _bias={})


def lay_out(
    config: DecoderConfig, real: np.ndarray | None, n_keys: int, device: torch.device, first: int = 0
) -> Layout:
    """The layout of the tokens from slot `first` on."""
    n_tokens = n_keys - first
    if real is not None:
        real = real[:, :n_keys]
        real = None if real.all() else real[:1] if (real == real[:1]).all() else real
    slots = np.arange(n_keys)[None] if real is None else np.maximum(np.cumsum(real, axis=1) - 1, 0)
    lengths = np.array([n_keys]) if real is None else real.sum(axis=1)
    lengths = lengths[:1] if config.steady_length is None or (lengths == lengths[:1]).all() else lengths
    positions = slots[:, first : first + n_tokens].astype(np.float32)
    keys = None if real is None else torch.from_numpy(np.ascontiguousarray(real)).to(device)
    queries = None if keys is None else keys[:, first : first + n_tokens].contiguous()
    kinds = tuple(dict.fromkeys(config.layer_kinds))
    rotations = []
    for kind in kinds:
        if kind.rope is None:
            nothing = torch.zeros(
                (len(positions), 1, n_tokens, config.rope.turned(config.head_dim) // 2), device=device
            )
            rotations.append((nothing + 1, nothing))
            continue
        each = [np.asarray(inverse_frequencies(config, int(n), kind.rope), np.float32) for n in lengths]
        angles = torch.from_numpy(positions[:, None, :, None] * np.stack(each)[:, None, None, :])
        scale = attention_factor(kind.rope)
        rotations.append(((angles.cos() * scale).to(device), (angles.sin() * scale).to(device)))
    return Layout(
        first,
        n_tokens,
        n_keys,
        real,
        queries=queries,
        keys=keys,
        rotations=tuple(rotations),
        windows=tuple(kind.window for kind in kinds),
        kinds=tuple(kinds.index(kind) for kind in config.layer_kinds),
    )
