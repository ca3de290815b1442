"""Load a checkpoint and say what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..kv.cache import Blueprint
from ..outside import OutsideWeights
from ..weights import PagedWeights, room
from .probe import Verdict, decoder_layers, probe
from .stepper import Stepper, UnsupportedModelError


@dataclass(frozen=True)
class Loaded:
    """A model that can be stopped between its layers, and its tokenizer."""

    name: str
    identity: str
    tokenizer: Any
    stepper: Stepper
    blueprint: Blueprint
    verdict: Verdict
    limit: int
    stops: frozenset[int]
    outside: OutsideWeights | None = None  # its weights, where they can be given back

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self.stepper.model.device

    @property
    def dtype(self) -> Any:
        """The data type of its hidden state."""
        return self.stepper.model.dtype

    @property
    def features(self) -> int:
        """The last dimension of its hidden state."""
        return int(self.stepper.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return int(self.stepper.model.config.get_text_config(decoder=True).vocab_size)


def load(
    path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    name: str = "",
    limit: int | None = None,
    weights: int | None = None,
    outside: bool = False,
) -> Loaded:
    """Load the checkpoint in the folder ``path`` and probe it.

    ``dtype``: "auto" is the checkpoint's own. ``limit``: the most tokens of a session; by default the model's.
    ``weights``: bytes of the layers' weights that are on the device at a time; by default as many as fit. ``outside``:
    they all are, and can be given back. Raises UnsupportedModelError if it cannot be driven layer by layer, OSError or
    ValueError if it cannot be read, or does not fit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        model.eval()
    known = identity(Path(path), model)
    layers = decoder_layers(model)
    if weights is None:
        mine = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
        weights = room(mine, sum(parameter.nbytes for parameter in model.parameters()) - mine, device)
    if outside and weights is not None:
        raise ValueError("weights that come in turns are in host memory as well: they cannot be kept outside")
    paged = None if weights is None else PagedWeights(layers, device, weights, model)
    away = OutsideWeights(model, device, known) if outside else None
    with torch.inference_mode():
        model.to(device)
    return prepare(
        model,
        AutoTokenizer.from_pretrained(path),
        name=name or Path(path).name,
        identity=known,
        limit=limit,
        weights=paged,
        outside=away,
    )


def prepare(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    identity: str,
    limit: int | None = None,
    weights: PagedWeights | None = None,
    outside: OutsideWeights | None = None,
) -> Loaded:
    """Probe a model that is in memory already, its layers' weights perhaps only in turns; errors as of :func:`load`."""
    with torch.inference_mode():
        blueprint = Blueprint(model.config)
        stepper = Stepper(model, decoder_layers(model))
        stepper.weights = weights
        try:
            verdict = probe(stepper, blueprint)
        except BaseException as error:
            stepper.close()
            if isinstance(error, Exception) and not isinstance(error, UnsupportedModelError):
                said = (str(error).splitlines() or [""])[0]
                what = f"its forward fails when it is probed: {type(error).__name__}: {said}"
                raise UnsupportedModelError(what) from error
            raise
    text = model.config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None) or 2**31
    return Loaded(
        name=name,
        identity=identity,
        tokenizer=tokenizer,
        stepper=stepper,
        blueprint=blueprint,
        verdict=verdict,
        limit=min(limit or longest, longest),
        stops=_stops(model, tokenizer),
        outside=outside,
    )


def identity(folder: Path, model: Any) -> str:
    """What tells this model from others: a digest of its configuration, data type, and weight files' names and sizes.

    A paused session goes on only where this is the same.
    """
    facts: dict[str, Any] = {"config": AutoConfig.from_pretrained(folder).to_dict(), "dtype": str(model.dtype)}
    facts["config"].pop("_name_or_path", None)
    facts["files"] = sorted(
        (file.name, file.stat().st_size)
        for file in folder.iterdir()
        if file.suffix in (".safetensors", ".bin", ".json")
    )
    # Weights themselves: checkpoints of one shape differ in nothing else, and a fine-tuned one may in few places.
    sample = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        flat = tensor.detach().flatten()
        part = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float32).contiguous()
        sample.update(part.numpy().tobytes())
    facts["weights"] = sample.hexdigest()
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _stops(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(int(token) for token in found)
