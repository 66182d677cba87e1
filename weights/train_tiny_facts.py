"""Trains the embedded model from nothing: `python weights/train_tiny_facts.py` writes weights/tiny-facts (half an hour, two cores).

Interrupted, it goes on from its checkpoint, and the weights are those of a run without interruption: the batch of each
step is a function of the seed and the step. Weights that miss a score are not written.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_facts_text as text
from optax.contrib import MuonDimensionNumbers, muon
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tiny_facts_score import scores
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from oculi_jax import forward
from oculi_jax.intervention import Blend
from oculi_jax.models.decoder.parameters import parameter_table
from oculi_jax.models.llama import Llama, LlamaConfig
from oculi_jax.utils.files import read_tensors, write_aside, write_tensors
from oculi_jax.utils.tokens import load_tokenizer

HERE = Path(__file__).parent
N_LAYERS, N_HEADS, N_KV_HEADS = 4, 6, 2
N_STEPS, WARM_UP, BATCH_TOKENS = 4500, 100, 3328
# Short rows first: where there are few tokens to look at, a head that looks at the one before pays off at once, and on it
# induction grows. With long rows from the start none grew in a thousand steps.
SHORT, LONG, SHORT_STEPS = 32, 104, 800
MUON_RATE, ADAM_RATE, DECAY = 2e-3, 2e-3, 0.1
CHECKPOINT_EVERY = 100
SPECIAL = ["<s>", "<unk>", "<pad>"]
REPEATED = 0.5  # the share of rows that are repeated random tokens, of periods from 4 to half a row
DROPPED = 0.15  # in every other of the long rows, the chance of a head to be zero: no single one is then indispensable
UNKNOWABLE = 0.1  # the weight of the loss at the first of the periods: nothing says what comes


def make_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig.from_dict(
        dict(
            model_type="llama", vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS, num_key_value_heads=N_KV_HEADS, head_dim=32, hidden_act="silu",
            max_position_embeddings=128,
            rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=0, pad_token_id=2,
        )
    )  # fmt: skip


def make_tokenizer() -> Tokenizer:
    """One token a word, with the space before it, so that decoding gives the text back; digits in pairs."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *text.words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex("▁?[0-9]{2}"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def initial(config: LlamaConfig, seed: int) -> Llama:
    """Random weights, what writes to the residual stream smaller by √(2 L)."""
    rng = np.random.default_rng(seed)

    def draw(row: Any) -> np.ndarray:
        if "norm" in row.name:
            return np.ones(row.shape)
        writes = row.name.startswith(("layers.attn.o", "layers.mlp.down"))
        return rng.normal(0.0, 0.02 / (2 * config.num_hidden_layers) ** (0.5 * writes), row.shape)

    return Llama(config, {row.name: jnp.asarray(draw(row), jnp.float32) for row in parameter_table(config)})


def batch(tokenizer: Tokenizer, seed: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of a step: sentences one after another, in some rows repeated random tokens before them.

    Returns:
        ids and the weights of the loss, both `[B, T]` with T = SHORT or LONG, and which heads stay, `[B, L, H]`.
    """
    rng = np.random.default_rng((seed, step))
    n_tokens, n_words = SHORT if step < SHORT_STEPS else LONG, tokenizer.get_vocab_size()
    sentences = iter(tokenizer.encode_batch([text.write_sentence(rng) for _ in range(BATCH_TOKENS // 4)]))
    shape = BATCH_TOKENS // n_tokens, n_tokens
    rows, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    for row, weight in zip(rows, weights, strict=True):
        ids = [0]
        if rng.random() < REPEATED:
            if rng.random() < 0.3:
                ids += next(sentences).ids[1:]
            while (start := len(ids)) < n_tokens - 8:
                period = int(np.exp(rng.uniform(np.log(4), np.log(n_tokens / 2))))
                ids += rng.choice(np.arange(len(SPECIAL), n_words), period, replace=False).tolist() * max(
                    2, 16 // period
                )
                weight[start : start + period + 1] = UNKNOWABLE
        while len(ids) < n_tokens:
            ids += next(sentences).ids[1:]
        row[:] = ids[:n_tokens]
    keep = np.ones((shape[0], N_LAYERS, N_HEADS), np.float32)
    if step >= SHORT_STEPS:
        keep[::2] = rng.random(keep[::2].shape) >= DROPPED
    return rows, weights, keep


def make_optimizer(n_steps: int) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the layers, which are decayed; Adam for embeddings and norms."""

    def rate(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(WARM_UP, n_steps // 2), n_steps, peak / 50)

    axes = {"o": ((2, 3), (1,))}  # inputs and outputs, of [L, E, H, D]; of [L, H, D, E], of [L, F, E]
    axes |= dict.fromkeys("qkv", ((3,), (1, 2))) | dict.fromkeys(("gate", "up", "down"), ((2,), (1,)))

    def dimensions(model: Llama) -> Any:
        def of(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
            name = next((part for part in jax.tree_util.keystr(path).split(".") if part in axes), None)
            return MuonDimensionNumbers(*axes[name]) if name else None

        return jax.tree_util.tree_map_with_path(of, model)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            rate(MUON_RATE), weight_decay=DECAY, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions,
            adam_learning_rate=rate(ADAM_RATE), adam_b2=0.98,
        ),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    optimizer: Any, model: Llama, state: Any, tokens: jax.Array, weights: jax.Array, keep: jax.Array
) -> tuple[Llama, Any, jax.Array]:
    def loss(model: Llama) -> jax.Array:
        # Computing each layer anew for its gradient is a quarter quicker here than reading what was kept.
        logits = jax.vmap(lambda row, keep: forward(model, row, Blend("z", keep), remat=True).logits[:-1])(tokens, keep)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()

    value, slope = jax.value_and_grad(loss)(model)
    updates, state = optimizer.update(slope, state, model)
    return optax.apply_updates(model, updates), state, value


def recipe(n_steps: int, seed: int) -> str:
    """What a checkpoint has to agree with: this file, the text, the options."""
    files = [(HERE / name).read_bytes() for name in ("train_tiny_facts.py", "tiny_facts_text.py")]
    return hashlib.sha256(b"".join(files) + f"{n_steps} {seed}".encode()).hexdigest()


def save_checkpoint(path: Path, tree: Any, step: int, made_by: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    with write_aside(path) as aside:
        write_tensors(aside, arrays, {"step": str(step), "recipe": made_by}, name=path)


def open_checkpoint(path: Path, tree: Any, made_by: str) -> tuple[Any, int]:
    """The tree and the step of a checkpoint; the tree as it was given, and 0, where there is none."""
    if not path.exists():
        return tree, 0
    try:
        arrays, about = read_tensors(path)
    except ValueError as error:
        raise SystemExit(f"{error}. Delete it to begin anew.") from None
    if about.get("recipe") != made_by:
        raise SystemExit(f"{path} is of another recipe, number of steps or seed; delete it to begin anew.")
    leaves = [jnp.asarray(arrays[name]) for name in sorted(arrays)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), int(about["step"])


@contextmanager
def stop_between_steps() -> Iterator[list[int]]:
    """Ctrl-C and a termination signal are remembered, so that a step is finished and kept before the end."""
    seen: list[int] = []
    before = {
        kind: signal.signal(kind, lambda number, _: seen.append(number)) for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def train(tokenizer: Tokenizer, n_steps: int, seed: int, checkpoint: Path, every: int = CHECKPOINT_EVERY) -> Llama:
    """The trained model; a checkpoint is kept every `every` steps and when a signal asks to stop."""
    optimizer, made_by = make_optimizer(n_steps), recipe(n_steps, seed)
    model = initial(make_config(tokenizer.get_vocab_size()), seed)
    tree, start = open_checkpoint(checkpoint, (model, optimizer.init(model)), made_by)
    model, state = tree
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar, stop_between_steps() as stop:
        task = bar.add_task("", total=n_steps, completed=start, loss=float("nan"))
        began = time.monotonic()
        for step in range(start, n_steps):
            model, state, loss = train_step(optimizer, model, state, *batch(tokenizer, seed, step))
            done = step + 1
            bar.update(task, completed=done, loss=float(loss))
            if not console.is_terminal and done % 100 == 0:
                print(
                    f"step {done} of {n_steps}: loss {float(loss):.3f}, {time.monotonic() - began:.0f} s",
                    file=sys.stderr,
                )
            if done % every == 0 or stop:
                save_checkpoint(checkpoint, (model, state), done, made_by)
            if stop:
                raise SystemExit(f"Stopped after step {done}; the same command goes on from there.")
    return model


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    for name, content in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
    ):
        with write_aside(directory / name) as aside:
            aside.write_text(content, encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("output", nargs="?", type=Path, default=HERE / "tiny-facts", help="where the weights go")
    options.add_argument("--steps", type=int, default=N_STEPS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--checkpoint", type=Path, default=HERE / ".tiny-facts.checkpoint.safetensors")
    given = options.parse_args()
    if given.steps < 1:
        options.error(f"--steps is {given.steps}, and must be at least 1.")
    tokenizer = make_tokenizer()
    model = train(tokenizer, given.steps, given.seed, given.checkpoint)
    with tempfile.TemporaryDirectory() as aside:
        write_tokenizer(Path(aside), tokenizer)
        found = scores(model, load_tokenizer(aside))
    print(*found, sep="\n")
    if missed := [score.name for score in found if not score.met]:
        raise SystemExit(f"Nothing is written: {len(missed)} of {len(found)} scores are missed: {'; '.join(missed)}.")
    model.save_pretrained(given.output)
    write_tokenizer(given.output, tokenizer)
    given.checkpoint.unlink()
    print(f"Wrote {given.output}.")


if __name__ == "__main__":
    main()
