"""Make a tiny model whose greedy text varies: a small random model's usually repeats one token, whatever it reads.

Runs in the server's environment: ``python tests/lively_model.py FOLDER``. Wider random weights and a head of its own
make the next token depend on all that was read, so that a wrong bit anywhere shows in the tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.make_model import TOKENS, save_tokenizer


def make(folder: Path, seed: int = 1) -> None:
    """Four layers, fp32, 8,000 tokens; the tokenizer has a chat template."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=TOKENS,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=2,
        bos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
