"""`llmkit serve` as the `openai` client and other programs use it."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
import tiny
from served import Server, served

from llmkit.model.folder import save_model

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    paths = {"base": tiny.save_folder(root / "base"), "chat": tiny.save_assistant(root / "chat")}
    paths["says"] = tiny.save_assistant(root / "says", "aA<b>1!?.~")
    return paths


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]):
    with served(*folders.values()) as server:
        yield server


def test_a_text_is_that_of_sample(server: Server, folders: dict[str, Path], llmkit) -> None:
    record = json.dumps({"prompt": "abc", "seed": 5})
    options = ("--jsonl", "--logprobs", "--max-tokens", "12", "--temperature", "0.7", "--top-k", "40", "--quiet")
    (line,) = llmkit("sample", folders["base"], *options, stdin=record).stdout.splitlines()
    expected = json.loads(line)
    request = {"model": "base", "prompt": "abc", "seed": 5, "max_tokens": 12, "temperature": 0.7, "logprobs": 0}
    more = {"top_k": 40, "return_token_ids": True}
    (choice,) = server.client.completions.create(**request, extra_body=more).choices
    assert choice.text == expected["completion"] and choice.token_ids == expected["token_ids"]
    assert choice.logprobs.token_logprobs == pytest.approx(expected["logprobs"])
    assert choice.finish_reason == expected["finish_reason"]
    chunks = list(server.client.completions.create(**request, extra_body=more, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected["completion"]
    assert [one for chunk in chunks for one in getattr(chunk.choices[0], "token_ids", [])] == expected["token_ids"]
    assert chunks[-1].choices[0].finish_reason == expected["finish_reason"]


def test_a_conversation_is_answered_whole_and_in_a_stream(server: Server) -> None:
    create = server.client.chat.completions.create
    request = {"model": "says", "messages": MESSAGES, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = create(**request)
    assert whole.choices[0].message.content == "aA<b>1!?.~" and whole.choices[0].finish_reason == "stop"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (20, 11)
    tokens = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in tokens) == "aA<b>1!?.~<|im_end|>"
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob >= entry.logprob for entry in tokens)
    chunks = list(create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "aA<b>1!?.~"
    told = [entry for chunk in chunks[:-1] if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert told == tokens
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_samples_differ_and_come_back_with_their_seed(server: Server) -> None:
    create = server.client.chat.completions.create
    request = {"model": "chat", "messages": MESSAGES, "n": 3, "max_tokens": 8}
    first = create(**request)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert [choice.message.content for choice in create(**request, seed=first.seed).choices] == texts
    assert [choice.message.content for choice in create(**request).choices] != texts
    streamed = ["", "", ""]
    for chunk in create(**request, seed=first.seed, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_and_is_left_out(server: Server, stream: bool) -> None:
    request = {"model": "says", "messages": MESSAGES, "stop": ["1!", "zzz"], "stream": stream, "temperature": 0}
    answer = server.client.chat.completions.create(**request)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    assert text == "aA<b>"


def test_prompts_are_scored(server: Server, folders: dict[str, Path]) -> None:
    import torch

    from llmkit.model.folder import load_model

    ids = server.post("/tokenize", {"model": "base", "prompt": "score me"})[1]["tokens"]
    model = load_model(folders["base"])
    with torch.no_grad():
        expected = torch.log_softmax(model.logits(model(torch.tensor([ids])))[0].float(), -1)
    request = {"model": "base", "max_tokens": 0, "echo": True, "logprobs": 2}
    answer = server.client.completions.create(prompt=["score me", "x"], **request)
    assert [choice.text for choice in answer.choices] == ["score me", "x"]
    told = answer.choices[0].logprobs
    assert told.tokens == ["<|endoftext|>", *"score me"] and told.token_logprobs[0] is None
    following = [float(expected[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    assert told.token_logprobs[1:] == pytest.approx(following, abs=1e-4)
    assert max(told.top_logprobs[1].values()) == pytest.approx(float(expected[0].max()), abs=1e-4)
    continued = {**request, "max_tokens": 2, "temperature": 0, "extra_body": {"return_token_ids": True}}
    (again,) = server.client.completions.create(prompt=ids, **continued).choices
    assert again.logprobs.token_logprobs[:-2] == told.token_logprobs
    assert len(again.logprobs.tokens) == len(ids) + 2
    scored = server.client.completions.create(prompt=ids + again.token_ids, **request).choices[0].logprobs
    best = [max(top.values()) for top in scored.top_logprobs[-2:]]
    assert scored.token_logprobs[-2:] == best  # lm-evaluation-harness checks with == whether they are greedy


def test_an_answer_is_continued(server: Server) -> None:
    goes_on = [*MESSAGES, {"role": "assistant", "content": "aA<b"}]
    asked = {"model": "says", "messages": goes_on, "continue_final_message": True}
    answer = server.client.chat.completions.create(model="says", messages=goes_on, temperature=0, extra_body=asked)
    assert answer.choices[0].message.content == ">1!?.~"
    tokens = server.post("/tokenize", {**asked, "return_token_strs": True})[1]
    assert tokens["token_strs"][-5:] == ["<|im_sep|>", *"aA<b"] and tokens["special"][-5:] == [True, *[False] * 4]
    back = server.post("/detokenize", {"model": "says", "tokens": tokens["tokens"][-5:], "return_token_strs": True})[1]
    assert back["prompt"] == "<|im_sep|>aA<b" and back["token_strs"] == ["<|im_sep|>", *"aA<b"]
    assert back["special"] == [True, *[False] * 4]
    answer = server.client.completions.create(model="says", prompt=tokens["tokens"], temperature=0)
    assert answer.choices[0].text == ">1!?.~"


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_keeps_to_a_json_schema(server: Server, temperature: float) -> None:
    count = {"type": "integer", "minimum": 0, "maximum": 99}
    properties = {"city": {"type": "string", "maxLength": 5}, "count": count, "ok": {"enum": ["yes", "no"]}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    create = server.client.chat.completions.create
    request = {"model": "chat", "messages": MESSAGES, "response_format": json_schema(schema), "n": 4, "seed": 3}
    request |= {"temperature": temperature, "top_p": 0.9, "logprobs": True}
    whole = create(**request)
    for choice in whole.choices:
        answer = json.loads(choice.message.content)
        assert list(answer) == [*properties] and len(answer["city"]) <= 5 and answer["ok"] in ("yes", "no")
        assert 0 <= answer["count"] <= 99 and choice.finish_reason == "stop"
        assert min(entry.logprob for entry in choice.logprobs.content) < -1  # under the untruncated distribution
    texts = [""] * 4
    for chunk in create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_an_answer_is_a_json_object_or_cut_off_within_one(server: Server) -> None:
    create = server.client.chat.completions.create
    request = {"model": "chat", "messages": MESSAGES, "response_format": {"type": "json_object"}, "max_tokens": 40}
    for seed in range(4):
        (choice,) = create(**request, seed=seed).choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


OBJECTS = [{"type": "object", "properties": {f"a{n}": {"type": "string"} for n in range(size)}} for size in range(60)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("schema", [{"anyOf": OBJECTS}, {"type": "string", "pattern": "^(?:a?){400}a{400}$"}])
def test_a_schema_beyond_the_limits_of_its_parser_cuts_nothing_off(server: Server, schema: dict, stream: bool) -> None:
    request = {"model": "chat", "messages": MESSAGES, "response_format": json_schema(schema)}
    with pytest.raises(openai.APIError, match="exceeds the limits of llguidance"):
        list(server.client.chat.completions.create(**request, stream=stream, extra_body={"top_k": 1}))


def test_models_health_and_metrics(server: Server) -> None:
    models = server.client.models.list().data
    assert [(model.id, model.max_model_len, model.chat) for model in models] == [
        ("base", 512, False),
        ("chat", 256, True),
        ("says", 256, True),
    ]
    assert server.client.models.retrieve("chat").id == "chat"
    assert server.post("/health", None) == (200, {"status": "ok"})
    assert 'llmkit_requests_total{model="says"}' in server.post("/metrics", None)[1]


def json_schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


CHAT = {"model": "chat", "messages": MESSAGES, "max_tokens": 2}
TEXT = {"model": "base", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({**CHAT, "logit_bias": {"7": 5}}, "logit_bias", 400),
        ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format", 400),
        ({**CHAT, "response_format": {"type": "grammar"}}, "response_format", 400),
        ({**CHAT, "response_format": json_schema({"type": "objekt"})}, "response_format", 400),
        ({**CHAT, "response_format": json_schema({"$ref": "https://a.example/b"})}, "response_format", 400),
        ({**TEXT, "response_format": {"type": "json_object"}}, "response_format", 400),
        (
            {
                **CHAT,
                "messages": [*MESSAGES, {"role": "assistant", "content": "{"}],
                "response_format": {"type": "json_object"},
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            "response_format",
            400,
        ),
        ({**CHAT, "frequency_penalty": 0.5}, "frequency_penalty", 400),
        ({**CHAT, "stream": True, "stream_options": {"every": 2}}, "stream_options", 400),
        ({**CHAT, "no_such_field": 0}, "no_such_field", 400),
        ({**CHAT, "temperature": -1}, "temperature", 400),
        ({**CHAT, "temperature": "hot"}, "temperature", 400),
        ({**CHAT, "n": 0}, "n", 400),
        ({**CHAT, "n": True}, "n", 400),
        ({**CHAT, "stop": [""]}, "stop", 400),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs", 400),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options", 400),
        ({**CHAT, "model": "gpt-9"}, "model", 404),
        ({**CHAT, "model": None}, "model", 400),
        ({**CHAT, "model": "base"}, "model", 400),
        ({**CHAT, "messages": []}, "messages", 400),
        ({**CHAT, "messages": "Hi"}, "messages", 400),
        ({**CHAT, "messages": [{"role": "wizard", "content": "Hi"}]}, "messages", 400),
        ({**CHAT, "messages": [{"role": "bot", "content": "Hi"}]}, "messages", 400),
        ({**CHAT, "messages": [{"role": "Human", "content": "Hi"}]}, "messages", 400),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", 400),
        ({**CHAT, "messages": [{"role": "user", "content": "Hi", "name": "Ada"}]}, "messages[0].name", 400),
        ({**CHAT, "messages": [{"role": "user", "content": "a" * 300}]}, "messages", 400),
        ({**CHAT, "chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs", 400),
        ({**CHAT, "continue_final_message": True}, "messages", 400),
        ({**TEXT, "prompt": None}, "prompt", 400),
        ({**TEXT, "prompt": []}, "prompt", 400),
        ({**TEXT, "prompt": [5, "a"]}, "prompt", 400),
        ({**TEXT, "prompt": [1000]}, "prompt", 400),
        ({**TEXT, "prompt": [[]]}, "prompt", 400),
        ({**TEXT, "prompt": "a" * 600}, "prompt", 400),
        ({**TEXT, "max_tokens": 0}, "max_tokens", 400),
        ({**TEXT, "suffix": "b"}, "suffix", 400),
        ([TEXT], None, 400),
        (b"{", None, 400),
    ],
    ids=str,
)
def test_unsupported_options_are_refused_by_name(server: Server, body, param: str | None, status: int) -> None:
    path = "/v1/completions" if isinstance(body, dict) and "prompt" in body else "/v1/chat/completions"
    answered, content = server.post(path, body)
    assert answered == status and content["error"]["param"] == param, content
    assert set(content["error"]) == {"message", "type", "param", "code"}
    if "a" * 300 in str(body):
        assert content["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_format", [], "'response_format': expected a JSON object, found a list"),
        ("tools", {}, "'tools': expected a valid list, found an object"),
        ("temperature", "hot", "'temperature': expected a valid number, found a string"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
            "messages: expected text content, found type 'image_url'",
        ),
    ],
)
def test_a_refusal_speaks_of_the_request(server: Server, field: str, value, message: str) -> None:
    status, content = server.post("/v1/chat/completions", {**CHAT, field: value})
    assert status == 400 and content["error"]["message"] == message


def test_a_tokenize_request_needs_a_text(server: Server) -> None:
    status, content = server.post("/tokenize", {"model": "says"})
    assert status == 400 and content["error"]["message"] == "expected 'prompt' or 'messages'"


def test_nan_weights_are_reported_and_other_requests_continue(tmp_path: Path) -> None:
    import torch

    broken = tiny.save_folder(tmp_path / "broken")
    model = tiny.make_model()
    with torch.no_grad():
        model.norm.fill_(float("nan"))
    save_model(model, broken)
    with served(broken, tiny.save_folder(tmp_path / "base")) as server:
        status, content = server.post("/v1/completions", {"model": "broken", "prompt": "a"})
        assert status == 500 and "not finite" in content["error"]["message"]
        assert server.post("/v1/completions", {"model": "base", "prompt": "a"})[0] == 200
