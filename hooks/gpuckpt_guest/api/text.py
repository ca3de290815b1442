"""Text to tokens, and what clients give as stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine.errors import EngineError


def encode(tokenizer: Any, text: str, *, first: bool = True) -> list[int]:
    """The tokens of a text; what the tokenizer puts before one belongs before the ``first`` only."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EngineError("the text has half a character: a surrogate by itself is no Unicode") from None
    return [int(token) for token in tokenizer(text, add_special_tokens=first)["input_ids"]]


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation, up to where the model is to answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise EngineError("this model has no chat template; use /v1/completions", code="no_chat_template")
    return encode(tokenizer, _templated(tokenizer, messages), first=False)


# Stands for an answer, to find in the template's text where what follows it begins.
_ANSWER = "\x00answer\x00"


def continued(
    tokenizer: Any, before: list[dict[str, Any]], new: list[dict[str, Any]], last: int, ends: frozenset[int]
) -> list[int]:
    """The tokens that lead from an answer to the next: its end, the new messages, up to where the model is to answer.

    ``before`` ends with the answer, whose ``last`` token the session has; if that is one of ``ends``, the template's
    own is not read once more.
    """
    if any(_ANSWER in str(message.get("content")) for message in (*before, *new)):
        raise EngineError("a message has a text that marks answers here")
    text = _templated(tokenizer, [*before[:-1], {"role": "assistant", "content": _ANSWER}, *new])
    if text.count(_ANSWER) != 1:
        raise EngineError("the chat template does not keep earlier answers; send the conversation to a new session")
    read = encode(tokenizer, text[text.index(_ANSWER) + len(_ANSWER) :], first=False)
    return read[1:] if last in ends and read[:1] == [last] else read


def _templated(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    told = [message | {"content": _content(message.get("content"))} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template is a program of the model's author: anything may come out
        raise EngineError(f"the chat template does not take these messages: {error}") from None


def _content(content: Any) -> Any:
    """A message's content; of one in parts, the texts one after the other, as templates for text want it."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise EngineError("a message's content is a text, or parts of the type text: this model reads nothing else")
        parts.append(part["text"])
    return "".join(parts)


def token_text(tokenizer: Any, token: int) -> str:
    """One token's text by itself."""
    return str(tokenizer.decode([token]))


def stops(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as OpenAI's clients give them: none, one, or several."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
