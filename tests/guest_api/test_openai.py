"""OpenAI's endpoints: what their clients count on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.guest_api.conftest import MODEL, Guest, until

PROMPT = "class Reader:\n    def read(self, size=-1):\n"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a file?"}]


def complete(guest: Guest, **what: Any) -> Any:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True} | what
    return guest.ok("POST", "/v1/completions", body)


def chunks(guest: Guest, path: str, body: Any) -> list[Any]:
    """The data of a stream, which must end with [DONE]."""
    told = [data for _, data in guest.events(path, body | {"stream": True})]
    assert told.pop() == "[DONE]"
    assert all(data != "[DONE]" for data in told)
    assert len({data["id"] for data in told}) == 1
    return told


def test_models(guest: Guest) -> None:
    listed = guest.ok("GET", "/v1/models")
    assert listed["object"] == "list"
    assert [(card["id"], card["object"]) for card in listed["data"]] == [(MODEL, "model")]


def test_completion(guest: Guest) -> None:
    told = complete(guest)
    assert told["id"].startswith("cmpl-")
    assert told["object"] == "text_completion"
    assert told["model"] == MODEL
    (choice,) = told["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["text"]
    usage = told["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["prompt_tokens"] > 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert complete(guest)["choices"] == told["choices"]


def test_a_streamed_completion_is_the_whole_one(guest: Guest) -> None:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    whole = complete(guest, **body)
    told = chunks(guest, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    usage = told.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(data["usage"] is None for data in told)
    assert {data["object"] for data in told} == {"text_completion"}
    choices = [choice for data in told for choice in data["choices"]]
    (one,) = whole["choices"]
    assert "".join(choice["text"] for choice in choices) == one["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    logs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for log in logs for value in log[key]] == one["logprobs"][key]


def test_logprobs_of_a_completion(guest: Guest) -> None:
    told = complete(guest, logprobs=4, return_tokens_as_token_ids=True)
    logs = told["choices"][0]["logprobs"]
    assert {len(logs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {12}
    for token, chosen, top in zip(logs["tokens"], logs["token_logprobs"], logs["top_logprobs"], strict=True):
        assert len(top) == 4
        assert token.startswith("token_id:")
        assert top[token] == chosen == max(top.values()) < 0  # greedy: the most likely one
    assert logs["text_offset"][0] == 0
    assert logs["text_offset"] == sorted(logs["text_offset"])


def test_text_offsets_cut_the_text_into_tokens(guest: Guest) -> None:
    (choice,) = complete(guest, logprobs=0)["choices"]
    logs, text = choice["logprobs"], choice["text"]
    ends = [*logs["text_offset"][1:], len(text)]
    assert [text[low:high] for low, high in zip(logs["text_offset"], ends, strict=True)] == logs["tokens"]
    assert logs["top_logprobs"] == [{}] * 12


def test_several_choices_and_several_prompts(guest: Guest) -> None:
    told = complete(guest, prompt=["one two", "three"], n=2, max_tokens=3)
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in told["choices"]]
    assert texts[0] == texts[1] == complete(guest, prompt="one two", max_tokens=3)["choices"][0]["text"]
    assert texts[2] == texts[3] == complete(guest, prompt="three", max_tokens=3)["choices"][0]["text"]
    assert told["usage"]["completion_tokens"] == 12
    streamed = chunks(
        guest, "/v1/completions", {"prompt": ["one two", "three"], "n": 2, "max_tokens": 3, "temperature": 0}
    )
    joined = ["", "", "", ""]
    for data in streamed:
        joined[data["choices"][0]["index"]] += data["choices"][0]["text"]
    assert joined == texts


def test_a_prompt_of_token_ids(guest: Guest) -> None:
    ids = [40, 41, 42]
    told = complete(guest, prompt=ids)
    assert told["usage"]["prompt_tokens"] == 3
    assert complete(guest, prompt=[ids])["choices"][0]["text"] == told["choices"][0]["text"]
    guest.refused(400, "POST", "/v1/completions", {"prompt": [8192]})
    guest.refused(422, "POST", "/v1/completions", {"prompt": [-1]})


def test_seeds(guest: Guest) -> None:
    def text(**what: Any) -> list[str]:
        return [choice["text"] for choice in complete(guest, temperature=1, **what)["choices"]]

    assert text(seed=5) == text(seed=5)
    assert text(seed=5) != text(seed=6)
    assert text() != text()
    several = text(seed=5, n=3)
    assert len(set(several)) == 3
    assert several == text(seed=5, n=3)
    # No temperature at all is OpenAI's 1, not greedy.
    body = {"prompt": PROMPT, "max_tokens": 8, "seed": 5}
    assert guest.ok("POST", "/v1/completions", body)["choices"][0]["text"] == text(seed=5, max_tokens=8)[0]


def test_top_k_of_one_is_greedy(guest: Guest) -> None:
    greedy = complete(guest)["choices"][0]["text"]
    assert complete(guest, temperature=1.5, top_k=1)["choices"][0]["text"] == greedy
    assert complete(guest, temperature=1.5, top_p=1e-9)["choices"][0]["text"] == greedy


def test_max_tokens(guest: Guest) -> None:
    for count in (1, 2, 7):
        told = complete(guest, max_tokens=count)
        assert told["usage"]["completion_tokens"] == count
        assert told["choices"][0]["finish_reason"] == "length"
    assert (
        guest.ok("POST", "/v1/completions", {"prompt": PROMPT, "ignore_eos": True})["usage"]["completion_tokens"] == 16
    )


def test_stop_strings_within_and_across_tokens(guest: Guest) -> None:
    (choice,) = complete(guest, max_tokens=24, logprobs=0)["choices"]
    text, pieces = choice["text"], choice["logprobs"]["tokens"]
    borders = [left[-1] + right[:2] for left, right in pairwise(pieces) if left and right]
    wanted = [stop for stop in dict.fromkeys([*borders, *pieces]) if stop and "\ufffd" not in stop][:16]
    assert len(wanted) > 4
    for stop in wanted:
        expected = text[: text.index(stop)]
        body = {
            "prompt": PROMPT,
            "max_tokens": 24,
            "temperature": 0,
            "stop": [stop, "never written"],
            "ignore_eos": True,
        }
        (one,) = complete(guest, **body)["choices"]
        assert (one["text"], one["finish_reason"], one["stop_reason"]) == (expected, "stop", stop)
        streamed = [data["choices"][0] for data in chunks(guest, "/v1/completions", body)]
        assert "".join(piece["text"] for piece in streamed) == expected
        assert streamed[-1]["finish_reason"] == "stop"


def test_a_stop_string_that_does_not_come_holds_nothing_back(guest: Guest) -> None:
    (choice,) = complete(guest, max_tokens=24)["choices"]
    # Its begin is the text's end: what is held back is put out at the end.
    stop = choice["text"][-2:] + "\x00"
    assert complete(guest, max_tokens=24, stop=stop)["choices"] == [choice]


def test_a_stop_token(guest: Guest) -> None:
    tokens = guest.tokens(PROMPT, 24)
    first = next(index for index, token in enumerate(tokens) if index and token not in tokens[:index])
    told = guest.ok(
        "POST",
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop_token_ids": [tokens[first]]},
    )
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] == first + 1


def test_chat(guest: Guest) -> None:
    body = {"model": MODEL, "messages": CHAT, "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": True, "top_logprobs": 2}
    told = guest.ok("POST", "/v1/chat/completions", body)
    assert told["id"].startswith("chatcmpl-")
    assert told["object"] == "chat.completion"
    (choice,) = told["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["content"]) == 10
    for entry in choice["logprobs"]["content"]:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]

    streamed = chunks(guest, "/v1/chat/completions", body)
    assert {data["object"] for data in streamed} == {"chat.completion.chunk"}
    deltas = [data["choices"][0] for data in streamed]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == choice["message"]["content"]
    assert deltas[-1]["finish_reason"] == "length"
    assert [entry for delta in deltas if delta["logprobs"] for entry in delta["logprobs"]["content"]] == choice[
        "logprobs"
    ]["content"]


def test_chat_is_the_template_and_a_completion(guest: Guest) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    said = guest.ok(
        "POST",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 6, "temperature": 0},
    )
    assert said["choices"][0]["message"]["content"] == complete(guest, prompt=text, max_tokens=6)["choices"][0]["text"]
    # Content in parts is the same text.
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    again = guest.ok("POST", "/v1/chat/completions", {"messages": parts, "max_completion_tokens": 6, "temperature": 0})
    assert again["usage"] == said["usage"]
    assert again["choices"] == said["choices"]


@pytest.mark.parametrize(
    ("status", "path", "body"),
    [
        (404, "/v1/completions", {"model": "another", "prompt": "x"}),
        (404, "/v1/chat/completions", {"model": "another", "messages": CHAT}),
        (422, "/v1/completions", {}),
        (422, "/v1/completions", {"prompt": "x", "max_tokens": 0}),
        (422, "/v1/completions", {"prompt": "x", "temperature": -1}),
        (422, "/v1/completions", {"prompt": "x", "top_p": 0}),
        (422, "/v1/completions", {"prompt": "x", "n": 0}),
        (400, "/v1/completions", {"prompt": ""}),
        (400, "/v1/completions", {"prompt": []}),
        (400, "/v1/completions", {"prompt": "x", "echo": True}),
        (400, "/v1/completions", {"prompt": "word " * 9000}),
        (422, "/v1/chat/completions", {"messages": []}),
        (422, "/v1/chat/completions", {"messages": [{"content": "nobody"}]}),
        (404, "/v1/embeddings", {"input": "x"}),
    ],
)
def test_errors_have_the_form_of_openai(guest: Guest, status: int, path: str, body: Any) -> None:
    guest.refused(status, "POST", path, body)
    assert guest.ok("GET", "/health")["ok"] is True


def test_an_error_names_its_parameter_or_none(guest: Guest) -> None:
    error = guest.send("POST", "/v1/completions", {"model": "another", "prompt": "x"}).json()["error"]
    assert set(error) == {"message", "type", "param", "code"}


def test_text_that_is_no_unicode_is_refused(guest: Guest) -> None:
    # A lone surrogate: JSON can say it, UTF-8 cannot.
    for path, body in (
        ("/v1/completions", b'{"prompt": "\\ud800"}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
    ):
        answer = guest.send("POST", path, body, kind="application/json")
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]


def test_a_client_that_hangs_up_ends_its_generation(guest: Guest) -> None:
    for stream in (True, False):
        body = b'{"prompt": "x", "max_tokens": 8000, "ignore_eos": true, "stream": %s}' % str(stream).lower().encode()
        head = "POST /v1/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        head += f"Content-Length: {len(body)}"
        before = sampled(guest)
        if stream:
            guest.vanish(head, body, read=2000)
        else:
            guest.vanish(head, body, when=lambda before=before: sampled(guest) > before)  # type: ignore[misc]
        until(lambda: guest.metrics()["gpuckpt_guest_requests_running"] == 0)
        assert 0 < sampled(guest) - before < 8000


def sampled(guest: Guest) -> float:
    """Tokens that were written so far."""
    return guest.metrics()["gpuckpt_guest_tokens_sampled_total"]


def test_the_official_client(guest: Guest) -> None:
    import openai

    with openai.OpenAI(base_url=f"{guest.base}/v1", api_key="none", max_retries=0) as client:
        assert [card.id for card in client.models.list()] == [MODEL]
        said = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0)
        assert said.choices[0].text == complete(guest, max_tokens=6)["choices"][0]["text"]
        talk: Any = CHAT
        answer = client.chat.completions.create(model=MODEL, messages=talk, max_tokens=6, temperature=0)
        with client.chat.completions.create(
            model=MODEL, messages=talk, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
        ) as stream:
            parts = list(stream)
        assert parts[-1].usage == answer.usage
        assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == answer.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="another"):
            client.completions.create(model="another", prompt="x")
