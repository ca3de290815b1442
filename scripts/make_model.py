"""Make a model folder on the spot: a Qwen2 or GPT-2 of a chosen shape, seeded random weights, a small BPE tokenizer.

For machines that reach no model hub: vLLM loads the folder like any checkpoint, and greedy decoding is
deterministic. Runs in the server environment (torch, transformers). The folder appears whole or not at all.

    /opt/gpuckpt/server/bin/python scripts/make_model.py --shape 0.5b FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

# Shapes of the published Qwen2 family (hidden size, layers, heads, key-value heads, intermediate size); `tiny` is for
# tests. The vocabulary is the published one for 0.5b, so that the file has the published size (0.99 GB in bfloat16).
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 256, "layers": 4, "heads": 4, "kv": 2, "intermediate": 1024, "vocabulary": 8192},
    "0.5b": {"hidden": 896, "layers": 24, "heads": 14, "kv": 2, "intermediate": 4864, "vocabulary": 151936},
    "1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv": 2, "intermediate": 8960, "vocabulary": 151936},
    # For measuring KV paging: 49 kB of keys and values a token (float32) beside layers that are quickly computed.
    "kv-heavy": {"hidden": 512, "layers": 12, "heads": 8, "kv": 8, "intermediate": 1024, "vocabulary": 8192},
    # GPT-2's smallest, in float32 as it was published (0.5 GB): what the benchmarks of the session engine run.
    "gpt2-124m": {"hidden": 768, "layers": 12, "heads": 12, "positions": 1024, "vocabulary": 50257},
}
SEED = 20261120
TOKENS = 8000  # of the tokenizer


def corpus() -> list[Path]:
    """Text that every machine with Python has: the standard library's own sources."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE of 8,000 tokens on the corpus and save it with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(path) for path in corpus()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)


def save_weights(folder: Path, shape: dict[str, int], seed: int) -> None:
    """Write weights drawn from ``seed``, and the configuration."""
    import torch

    torch.manual_seed(seed)
    model = gpt2(shape) if "positions" in shape else qwen2(shape)
    with torch.no_grad():
        # The rows that the tokenizer has no word for are zero, as padding rows are: what is generated can be read.
        model.get_input_embeddings().weight[TOKENS:] = 0
    model.save_pretrained(folder)


def gpt2(shape: dict[str, int]) -> Any:
    """A GPT-2 in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocabulary"],
            n_embd=shape["hidden"],
            n_layer=shape["layers"],
            n_head=shape["heads"],
            n_positions=shape["positions"],
            # Of this tokenizer, not the published 50256.
            eos_token_id=2,
            bos_token_id=0,
        )
    )


def qwen2(shape: dict[str, int]) -> Any:
    """A Qwen2 in bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["intermediate"],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        # The published models' end token; random weights practically never choose it, so requests run their length.
        eos_token_id=2,
        bos_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    return Qwen2ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    wanted = {"shape": SHAPES[arguments.shape], "seed": arguments.seed, "tokens": TOKENS}
    mark = folder / "made.json"
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_weights(staging, SHAPES[arguments.shape], arguments.seed)
    save_tokenizer(staging)
    (staging / "made.json").write_text(json.dumps(wanted))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


if __name__ == "__main__":
    main()
