"""Text to tokens, and what clients give as stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.engine import EngineError


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, with what the tokenizer puts before one."""
    return [int(token) for token in tokenizer(text)["input_ids"]]


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation, up to where the model is to answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise EngineError("this model has no chat template; use /v1/completions", code="no_chat_template")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's author: anything may come out
        raise EngineError(f"the chat template does not take these messages: {error}") from None
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def token_text(tokenizer: Any, token: int) -> str:
    """One token's text by itself."""
    return str(tokenizer.decode([token]))


def stops(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as OpenAI's clients give them: none, one, or several."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
