"""Models for the acceptance on a GPU, made on the spot: Qwen3's architecture, random weights, bfloat16.

    python -m benchmarks.gpu_models 8b FOLDER        in an environment with PyTorch

The weights are drawn where they are drawn fastest, on the GPU, and written as they come: what takes a CPU minutes is
over as soon as the file is written. The same seed gives the same file on the same kind of device. The vocabulary is
the published one, as is the size of the file; the tokenizer is the small one of scripts/make_model.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct

from benchmarks import harness
from benchmarks.gpu_context import Context, told
from benchmarks.suite import Unavailable
from gpuckpt import proc
from gpuckpt.errors import GpuckptError, OutOfSpaceError

SEED = 20261120
_ITEM = 2  # bytes of a number
_READABLE = 8000  # tokens of the tokenizer; rows beyond are zero, as padding is: what is generated can be read
_SPREAD = 0.02  # standard deviation of weights, the published initialisation


class Shape(Struct, frozen=True):
    """Sizes of a model, by the names of its configuration."""

    hidden: int
    layers: int
    heads: int
    kv: int
    intermediate: int
    tied: bool
    head: int = 128
    vocabulary: int = 151936


SHAPES = {
    "tiny": Shape(64, 2, 2, 1, 128, True, head=32, vocabulary=8192),
    "0.6b": Shape(1024, 28, 16, 8, 3072, True),
    # As Qwen2's 1.5B: its family has none of that size.
    "1.5b": Shape(1536, 28, 12, 2, 8960, True),
    "8b": Shape(4096, 36, 32, 8, 12288, False),
}
Fill = Callable[[str, tuple[int, ...]], Iterator[bytes | memoryview]]
"""The bytes of a tensor, by its name and shape, in pieces."""


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, in the order in which they are written."""
    inner, narrow = shape.heads * shape.head, shape.kv * shape.head
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.self_attn.q_proj.weight", (inner, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (narrow, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (narrow, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (shape.hidden, inner)
        yield f"{layer}.self_attn.q_norm.weight", (shape.head,)
        yield f"{layer}.self_attn.k_norm.weight", (shape.head,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
        yield f"{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def size(shape: Shape) -> int:
    """Bytes of all weights."""
    return sum(math.prod(dims) for _, dims in tensors(shape)) * _ITEM


def configuration(shape: Shape) -> dict[str, object]:
    """As config.json has it."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv,
        "head_dim": shape.head, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary,
        "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "initializer_range": _SPREAD, "tie_word_embeddings": shape.tied, "attention_bias": False,
        "attention_dropout": 0.0, "use_cache": True, "use_sliding_window": False, "torch_dtype": "bfloat16",
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


def write(file: Path, shape: Shape, fill: Fill) -> None:
    """One safetensors file (a header of JSON, then the bytes), filled as it is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in tensors(shape):
        end = at + math.prod(dims) * _ITEM
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors(shape):
            for piece in fill(name, dims):
                rest = memoryview(piece)
                while rest:  # one write(2) takes at most 2 GiB
                    rest = rest[out.write(rest) :]


def with_torch(seed: int) -> Fill:
    """Random weights, of the GPU if there is one; what normalises is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    most = 128 << 20
    landing = torch.empty(most, dtype=torch.bfloat16, pin_memory=device.type == "cuda")

    def fill(name: str, dims: tuple[int, ...]) -> Iterator[memoryview]:
        step = max(1, most // math.prod(dims[1:]))
        for begin in range(0, dims[0], step):
            rows = (min(step, dims[0] - begin), *dims[1:])
            if len(dims) == 1:
                made = torch.ones(rows, dtype=torch.bfloat16, device=device)
            else:
                made = torch.randn(rows, dtype=torch.bfloat16, device=device, generator=generator) * _SPREAD
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    made[max(0, _READABLE - begin) :] = 0
            held = landing[: made.numel()]
            held.copy_(made.flatten())
            yield memoryview(held.view(torch.uint8).numpy())

    return fill


def zeros(name: str, dims: tuple[int, ...]) -> Iterator[bytes]:
    """For a dry run, which has no PyTorch."""
    yield bytes(math.prod(dims) * _ITEM)


# ---------------------------------------------------------------------- who needs one


def need(context: Context, name: str) -> Path:
    """The folder of a model; made once in a run. Raises OutOfSpaceError, Unavailable, or GpuckptError."""
    folder = context.models / name
    if (folder / "made.json").exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    if context.dry:
        return make(folder, "tiny", zeros, tokenizer=False)
    wanted, free = size(SHAPES[name]), shutil.disk_usage(context.folder).free
    if free < 1.1 * wanted:
        raise OutOfSpaceError(f"{name} takes {wanted >> 20} MiB, and {free >> 20} MiB are free in {context.folder}")
    argv = [context.interpreter(), "-m", "benchmarks.gpu_models", name, str(folder)]
    told(context, f"makes the model {name}, {wanted / 1e9:.1f} GB")
    done = subprocess.run(
        argv, cwd=harness.ROOT, env=context.environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
        timeout=max(10.0, context.left),
    )  # fmt: skip
    if done.returncode:
        log = proc.tail(done.stderr.decode(errors="replace"), 5)
        if any("No module named" in line for line in log):
            raise Unavailable(f"a model cannot be made: {log[-1]}")
        raise GpuckptError(f"the model {name} could not be made", log=log)
    return folder


def make(folder: Path, name: str, fill: Fill, *, tokenizer: bool) -> Path:
    """Whole or not at all."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        shape = SHAPES[name]
        write(staging / "model.safetensors", shape, fill)
        (staging / "config.json").write_text(json.dumps(configuration(shape), indent=1))
        if tokenizer:
            _tokenizer(folder.parent / "tokenizer", staging)
        (staging / "made.json").write_text(json.dumps({"shape": name, "seed": SEED, "bytes": size(shape)}))
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _tokenizer(kept: Path, folder: Path) -> None:
    """Trained once, for it takes seconds; all models of a run have the same."""
    from scripts.make_model import save_tokenizer

    if not kept.exists():
        staging = kept.with_name(f".tokenizer.{os.getpid()}")
        staging.mkdir()
        save_tokenizer(staging)
        staging.rename(kept)
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make(options.folder, options.shape, with_torch(SEED), tokenizer=True)


if __name__ == "__main__":
    main()
