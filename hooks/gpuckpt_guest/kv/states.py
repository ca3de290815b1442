"""What layers keep that is not keys and values of tokens: recurrent states, and all of the layers of unknown kinds.

These tensors have the same size however many tokens were read, and are written in place; they are moved and copied
whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

STATES = ("conv_states", "recurrent_states")
FLAGS = (
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "conv_kernel_size",
    "device",
    "dtype",
)


def places(layer: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The tensors that a layer of transformers' own keeps: (holder, key, tensor)."""
    own = vars(layer)
    for name, value in list(own.items()):
        if isinstance(value, torch.Tensor):
            yield own, name, value
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                if isinstance(item, torch.Tensor):
                    yield value, key, item


def tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    """The same by name: ``recurrent_states.0`` …"""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield f"{name}.{key}", item


def duplicate(source: Any, target: Any) -> None:
    """Give ``target`` copies of the recurrent states of ``source``."""
    for name in (*STATES, *FLAGS):
        setattr(target, name, copy.deepcopy(getattr(source, name)))


def facts(layer: Any) -> dict[str, Any]:
    """What one must know beside the tensors to make the states again, as JSON."""
    if not isinstance(layer, LinearAttentionLayer):
        return {"previous": [], "kernel": [], "states": []}
    return {
        "previous": [bool(layer.has_previous_state[index]) for index in layer.has_previous_state],
        "kernel": [layer.conv_kernel_size[index] for index in layer.conv_kernel_size],
        "states": [
            [name, index] for name in STATES for index, state in getattr(layer, name).items() if state is not None
        ],
    }


def load(
    layer: Any,
    index: int,
    fact: Mapping[str, Any],
    stored: Mapping[str, Any],
    device: Any,
    form: Mapping[str, tuple[Any, Any]],
) -> None:
    """Fill layer ``index`` of an empty cache with states of the shapes and types in ``form``.

    Raises ValueError or KeyError if they are others, or not all there.
    """
    if len(fact["previous"]) != layer.number_of_states or len(fact["kernel"]) != layer.number_of_states:
        raise ValueError(f"layer {index} of the cache has another number of states")
    for state, (previous, kernel) in enumerate(zip(fact["previous"], fact["kernel"], strict=True)):
        layer.has_previous_state[state], layer.conv_kernel_size[state] = previous, kernel
    for name, state in fact["states"]:
        tensor = stored[f"{index}.{name}.{state}"].to(device)
        if (tuple(tensor.shape), tensor.dtype) != form.get(f"{name}.{state}"):
            raise ValueError(f"layer {index} of the cache has {name} of {tensor.dtype} {list(tensor.shape)}")
        getattr(layer, name)[state] = tensor.clone()
        getattr(layer, f"is_{name}_initialized")[state] = True
        layer.device, layer.dtype = tensor.device, tensor.dtype
    if any(fact["previous"]) and {f"{name}.{state}" for name, state in fact["states"]} != set(form):
        raise ValueError(f"layer {index} of the cache lacks a state")
