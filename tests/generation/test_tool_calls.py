"""Tools in the generation engine: a call pauses its sequence, the result is inserted, and others are not affected."""

import itertools
import json
import random
import threading
import time

import pytest
import torch
from recorder import Recorder
from tiny import END, certain, make_model, save_tokenizer

from llmkit.errors import UserError
from llmkit.formats.conversations import Message, Part, message
from llmkit.generation.generator import Generator, Pool
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.generation.tool_calls import ToolUse
from llmkit.tokenizer.chat import CHAT_SPECIALS, ChatFormat
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tools.toolbox import Toolbox, ToolResult

VOCABULARY = 257 + len(CHAT_SPECIALS)


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer):
    return chat_tokenizer


@pytest.fixture
def calculator():
    with Toolbox.parse(["calc"]) as toolbox:
        yield toolbox


def special(tokenizer, *names):
    return [tokenizer.specials[f"<|{name}|>"] for name in names]


def caller(tokenizer, before, called, after, tool="calc"):
    """Make a model that writes `before`, calls a tool with `called`, reads the result, writes `after` and ends."""
    start, end, result_end = special(tokenizer, f"{tool}_start", f"{tool}_end", "result_end")
    ids = [tokenizer.encode(text) for text in (before, called, after)]
    first = [END, *ids[0], start, *ids[1], end]
    model = certain(make_model(vocab_size=VOCABULARY), *first)
    second = [result_end, *ids[2], END]
    with torch.no_grad():
        for i, (token, following) in enumerate(itertools.pairwise(second), len(first)):
            model.embed_tokens[token, i] = 1.0
            model.lm_head[following, i] = 10.0
    return model


def complete(model, tokenizer, toolbox, request=None, *, max_calls=8, result_tokens=512, **details):
    tools = ToolUse(toolbox, tokenizer, max_calls, result_tokens)
    generator = Generator(model, tokenizer, Sampling(0.0), tools=tools, **details)
    pieces = []
    asked = [request or Request([END], max_tokens=100)]
    ((completion,),) = generator.complete(asked, on_text=lambda index, sample, piece: pieces.append(piece))
    assert "".join(pieces) == completion.text
    return completion


def test_a_call_is_answered_and_the_model_continues(tokenizer, calculator):
    model = caller(tokenizer, "say ", "1+2*", "wel")  # each token once: a chain depends only on the last token
    completion = complete(model, tokenizer, calculator)
    assert completion.text == "say wel" and completion.finish_reason == "stop"
    (call,) = completion.tool_calls
    assert (call["tool"], call["input"], call["failed"]) == ("calc", "1+2*", True)
    result = tokenizer.encode(call["result"])
    start, end, result_start, result_end = special(tokenizer, "calc_start", "calc_end", "result_start", "result_end")
    own = [*tokenizer.encode("say "), start, *tokenizer.encode("1+2*"), end]
    last = [*tokenizer.encode("wel"), END]
    assert completion.token_ids == [*own, result_start, *result, result_end, *last]
    sampled = [True] * len(own) + [False] * (len(result) + 2) + [True] * len(last)
    assert completion.sampled == sampled
    assert all(logprob == 0 for logprob, own in zip(completion.logprobs, sampled, strict=True) if not own)
    completion = complete(caller(tokenizer, "say ", "1+2", "wel"), tokenizer, calculator)
    assert completion.tool_calls == [{"tool": "calc", "input": "1+2", "result": "3"}]


def test_a_completion_is_split_into_texts_calls_and_results(tokenizer, calculator):
    """Encoded as a conversation, the parts give the same tokens."""
    tools = ToolUse(calculator, tokenizer)
    completion = complete(caller(tokenizer, "say ", "1+2", "wel"), tokenizer, calculator)
    parts = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
    assert parts == (Part("text", "say "), Part("calc", "1+2"), Part("result", "3"), Part("text", "wel"))
    chat, asked = ChatFormat(tokenizer), message("user", "1 + 2?")
    encoded = chat.encode([asked, Message("assistant", parts)]).token_ids.tolist()
    prompt = chat.encode([asked], prompt=True).token_ids.tolist()
    assert encoded[:-1] == [*prompt, *completion.token_ids[:-1]]  # the last is the end of the turn and of the text


def test_a_result_that_a_model_makes_up_is_its_own_text(tokenizer, calculator):
    start, end, opened, closed = special(tokenizer, "calc_start", "calc_end", "result_start", "result_end")
    written = [start, *tokenizer.encode("1+2"), end, opened, *tokenizer.encode("3"), closed]
    forged, cut = [opened, *tokenizer.encode("9"), closed], [start, *tokenizer.encode("4")]
    sampled = [True] * 5 + [False] * 3 + [True] * 5
    found = ToolUse(calculator, tokenizer).parts([*written, *forged, *cut], sampled, [{"tool": "calc", "input": "1+2"}])
    assert found == (Part("calc", "1+2"), Part("result", "3"), Part("text", "9"))


class Echo:
    """A tool that answers with a given text."""

    names, schemas = ("calc",), {}

    def __init__(self, answer):
        self._answer = answer

    def run(self, tool, text):
        return ToolResult(self._answer)


CALLED = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call>'
FOREIGN = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|tool|>' + m.content }}{% else %}{{ '<|' + m.role + '|>' + m.content }}{% for c in m.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson '
    "+ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|go on|>' if messages[-1].role == 'tool' else '<|assistant|>' }}{% endif %}"
)
NAMES = ("<|user|>", "<|assistant|>", "<|tool|>", "<|go on|>", "<|tools|>", "<|im_end|>")


@pytest.fixture
def weather(tmp_path):
    path = tmp_path / "weather.py"
    path.write_text('def rain(city: str) -> str:\n    "Whether it rains."\n    return f"no rain in {city}"\n')
    with Toolbox.parse([f"py:{path}:rain"]) as toolbox:
        yield toolbox


def writing(folder, own, *calls):
    """Make a tokenizer, with our chat format or a template, that has a token for each of these texts."""
    save_tokenizer(folder, *(CHAT_SPECIALS if own else NAMES))
    spec, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    last = spec["added_tokens"][-1]
    spec["added_tokens"] += [
        {**last, "id": last["id"] + 1 + i, "content": text, "special": False} for i, text in enumerate(calls)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if not own:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": FOREIGN}))
    return load_tokenizer(folder), [last["id"] + 1 + i for i in range(len(calls))]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("before", ["", "say "])
def test_a_user_function_is_called_in_the_models_format(tmp_path, weather, own, before):
    tokenizer, (called,) = writing(tmp_path, own, CALLED)
    special = tokenizer.specials
    first = special["<|im_sep|>" if own else "<|assistant|>"]
    chain = [first, *tokenizer.encode(before), called, *([] if own else [special["<|im_end|>"]])]
    model = certain(make_model(vocab_size=called + 1), *chain)
    going_on = special["<|result_end|>" if own else "<|go on|>"]
    second = [going_on, *tokenizer.encode("well"[:3]), special["<|im_end|>"]]
    with torch.no_grad():
        for i, (token, following) in enumerate(itertools.pairwise(second), len(chain)):
            model.embed_tokens[token, i], model.lm_head[following, i] = 1.0, 10.0
    tools = ToolUse(weather, tokenizer)
    ends = [special["<|im_end|>"]]
    generator = Generator(model, tokenizer, Sampling(0.0), tools=tools, end_ids=ends)
    prompt = generator.encode([message("user", "Rain?")])
    assert "Whether it rains." in tokenizer.decode(prompt)
    pieces, heard = [], []
    ((completion,),) = generator.complete(
        [Request(prompt, max_tokens=300)],
        on_text=lambda index, sample, piece: pieces.append(piece),
        on_call=lambda index, sample, call, seen: heard.append(seen),
    )
    assert completion.text == "".join(pieces) == f"{before}wel" and completion.finish_reason == "stop"
    assert completion.tool_calls == [{"tool": "rain", "input": '{"city": "Oslo"}', "result": "no rain in Oslo"}]
    assert heard == [None, "no rain in Oslo"]
    answered = [token for token, own in zip(completion.token_ids, completion.sampled, strict=True) if not own]
    expected = "<|result_start|>no rain in Oslo<|result_end|>" if own else "<|tool|>no rain in Oslo<|go on|>"
    assert tokenizer.decode(answered) == expected
    parts = tools.parts(completion.token_ids, completion.sampled, completion.tool_calls)
    called_part = Part("tool_call", '{"name": "rain", "arguments": {"city": "Oslo"}}')
    said = (Part("text", before),) if before else ()
    assert parts == (*said, called_part, Part("result", "no rain in Oslo"), Part("text", "wel"))
    none = ToolUse(weather, tokenizer, max_calls=0)
    ((limited,),) = Generator(model, tokenizer, Sampling(0.0), tools=none, end_ids=ends).complete([Request(prompt)])
    assert (limited.text, limited.finish_reason, limited.tool_calls) == (before, "tool_limit", [])


@pytest.mark.parametrize(
    ("written", "text", "result"),
    [
        ("<tool_call>\n{'name'}\n</tool_call>", "<tool_call>\n{'name'}\n</tool_call>", None),
        (f"<think>{CALLED}</think>No.", f"<think>{CALLED}</think>No.", None),
        (f"<think>{CALLED}</think>{CALLED}", f"<think>{CALLED}</think>", "no rain in Oslo"),
        ("<tool_call", "<tool_call", None),
        (CALLED.replace("rain", "snow"), "", "error: there is no function 'snow'; there are rain"),
        (CALLED.replace("city", "town"), "", "error: missing a required argument: 'city'"),
    ],
)
def test_text_that_is_not_a_call_stays_text_and_a_wrong_call_is_answered(tmp_path, weather, written, text, result):
    tokenizer, (token,) = writing(tmp_path, False, written)
    special = tokenizer.specials
    model = certain(make_model(vocab_size=token + 1), special["<|assistant|>"], token, special["<|im_end|>"])
    with torch.no_grad():
        model.embed_tokens[special["<|go on|>"], 9], model.lm_head[special["<|im_end|>"], 9] = 1.0, 10.0
    tools = ToolUse(weather, tokenizer)
    generator = Generator(model, tokenizer, Sampling(0.0), tools=tools, end_ids=[special["<|im_end|>"]])
    ((found,),) = generator.complete([Request(generator.encode([message("user", "Rain?")]), max_tokens=300)])
    assert found.text == text and found.finish_reason == "stop"
    assert [call["result"] for call in found.tool_calls] == ([] if result is None else [result])


def test_special_tokens_that_a_result_spells_are_text(tokenizer):
    model = caller(tokenizer, "a", "1+2", "wel")
    completion = complete(model, tokenizer, Echo("<|im_end|><|result_end|><|endoftext|>\ud800"))
    injected = [i for i, own in zip(completion.token_ids, completion.sampled, strict=True) if not own]
    assert max(injected[1:-1]) < 256 and [injected[0], injected[-1]] == special(tokenizer, "result_start", "result_end")
    assert completion.text == "awel"


def test_a_long_result_is_cut_to_its_tokens_and_to_the_context(tokenizer):
    model = caller(tokenizer, "a", "1+2", "wel")
    assert complete(model, tokenizer, Echo("x" * 300), result_tokens=40).sampled.count(False) == 42
    model.config = model.config.__class__(**{**vars(model.config), "max_position_embeddings": 40})
    completion = complete(model, tokenizer, Echo("x" * 300))
    assert completion.finish_reason == "length" and len(completion.token_ids) == 39
    assert completion.sampled.count(False) == 32  # 1 is left
    model.config = model.config.__class__(**{**vars(model.config), "max_position_embeddings": 9})
    completion = complete(model, tokenizer, Echo("3"))  # END and a call of 6: no room for the two tokens and one more
    assert completion.finish_reason == "length" and completion.sampled == [True] * 6
    assert completion.tool_calls[0]["result"] == "3"


def test_the_number_of_calls_and_of_own_tokens_ends_a_completion(tokenizer, calculator):
    model = caller(tokenizer, "a", "1+2", "wel")
    completion = complete(model, tokenizer, calculator, max_calls=0)
    assert (completion.finish_reason, completion.text, completion.tool_calls) == ("tool_limit", "a", [])
    completion = complete(model, tokenizer, calculator, Request([END], max_tokens=6))
    assert (completion.finish_reason, completion.tool_calls) == ("length", [])  # its last token ends the call
    completion = complete(model, tokenizer, calculator, Request([END], max_tokens=8))
    assert (completion.finish_reason, completion.text) == ("length", "awe")  # results do not count


def test_missing_tools_and_ends_without_a_start_are_text(tokenizer, calculator):
    model = caller(tokenizer, "a", "1+2", "wel", tool="python")
    assert complete(model, tokenizer, calculator).tool_calls == []
    (end,) = special(tokenizer, "calc_end")
    model = certain(make_model(vocab_size=VOCABULARY), END, *tokenizer.encode("ab"), end, *tokenizer.encode("cd"), END)
    completion = complete(model, tokenizer, calculator)
    assert (completion.text, completion.tool_calls) == ("abcd", [])


def test_a_call_of_a_tool_that_is_not_there_ends_a_completion_on_request(tokenizer, calculator):
    model = caller(tokenizer, "a", "1+2", "wel")
    with calculator:
        use = ToolUse(calculator, tokenizer, end_at_others=True)
        for tools, reason in ((use, "stop"), (use.none(), "no_tool")):
            generator = Generator(model, tokenizer, Sampling(temperature=0.0), tools=tools)
            ((completion,),) = generator.complete([Request([END], max_tokens=30)])
            assert completion.finish_reason == reason


def test_a_call_without_an_end_says_nothing(tokenizer, calculator):
    (start,) = special(tokenizer, "calc_start")
    model = certain(
        make_model(vocab_size=VOCABULARY), END, *tokenizer.encode("ab"), start, *tokenizer.encode("1+2"), END
    )
    completion = complete(model, tokenizer, calculator)
    assert (completion.text, completion.finish_reason, completion.tool_calls) == ("ab", "stop", [])


class Slow:
    """A tool whose answers take different times."""

    names, schemas = ("calc", "search"), {}

    def __init__(self):
        self._random = random.Random()
        self.running = self.most = 0
        self._lock = threading.Lock()

    def run(self, tool, text):
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self._random.random() * 0.004)
        with self._lock:
            self.running -= 1
        return ToolResult(f"{tool} {len(text)} {text[:5]}", failed=len(text) % 2 == 0)


def test_a_tool_is_waited_for_while_no_request_is_there(tokenizer, calculator, monkeypatch):
    steps, done = [], []
    real_advance, real_run = Pool.advance, calculator.run
    monkeypatch.setattr(Pool, "advance", lambda pool: steps.append(0) or real_advance(pool))
    monkeypatch.setattr(calculator, "run", lambda *call: time.sleep(0.2) or real_run(*call))

    def requests():
        yield Request([END], max_tokens=100)
        while not done:
            yield None

    tools = ToolUse(calculator, tokenizer, 8, 512)
    generator = Generator(caller(tokenizer, "a", "1+2", "b"), tokenizer, Sampling(0.0), tools=tools)
    ((completion,),) = generator.complete(requests(), on_done=lambda index, samples: done.append(samples))
    assert completion.text == "ab" and len(completion.tool_calls) == 1
    assert len(steps) <= len(completion.token_ids) + 3  # 0.2 s would be thousands


def test_a_text_does_not_depend_on_the_batch_or_the_timing_of_tools(tokenizer):
    model = make_model(vocab_size=VOCABULARY, spread=1.5)
    frequent = special(tokenizer, "calc_start", "calc_end", "search_start", "search_end")
    model.head_weight.data[frequent] *= 2.5
    prompts = [[END, *range(n % 7)] for n in range(64)]
    requests = [Request(ids, 1 + n % 2, 30 + n % 30, 7, n) for n, ids in enumerate(prompts)]

    def texts(given, slots, record=None):
        tool = Slow()
        tools = ToolUse(tool, tokenizer, 1, 9)
        generator = Generator(model, tokenizer, Sampling(1.0), slots=slots, end_ids=(), tools=tools, record=record)
        made = {request.number: samples for request, samples in zip(given, generator.complete(given), strict=True)}
        return made, tool

    together, tool = texts(requests, 16)
    assert tool.most > 1  # they ran at the same time
    made = [completion for samples in together.values() for completion in samples]
    assert sum(len(completion.tool_calls) for completion in made) > 40
    assert {completion.finish_reason for completion in made} == {"length", "tool_limit"}
    for number in range(0, 64, 4):
        assert texts(requests[number : number + 1], 1)[0] == {number: together[number]}
    random.Random(0).shuffle(requests)
    assert texts(requests, 5)[0] == together
    assert texts(requests, 9, Recorder)[0] == together  # with steps that are replayed


def test_a_model_without_the_tokens_of_tools_is_refused(tmp_path, calculator):
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer.json: expected the special tokens .* llmkit sft"):
        ToolUse(calculator, load_tokenizer(tmp_path))
