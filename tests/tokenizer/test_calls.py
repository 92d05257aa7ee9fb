"""Function calls in the formats of model families, and conversations with calls in third-party templates."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from foreign_templates import as_templates_take, save

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Message, Part, message
from llmkit.tokenizer.calls import FORMS, Call
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.templates import TemplateFormat, chat_format

OSLO = Call("rain", {"city": "Oslo", "days": 2})
WRITTEN = '{"name": "rain", "arguments": {"city": "Oslo", "days": 2}}'

NAMES = ("calls begin", "call begin", "sep", "call end", "calls end")
DEEPSEEK = {f"<|{name}|>": f"<\uff5ctool▁{name.replace(' ', '▁')}\uff5c>" for name in NAMES}


def in_deepseeks_tokens(text: str) -> str:
    for short, token in DEEPSEEK.items():
        text = text.replace(short, token)
    return text


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{WRITTEN}\n</tool_call>", [OSLO]),
        (f"Wait.\n<tool_call>\n{WRITTEN}\n</tool_call>\n<tool_call>\n{WRITTEN}\n</tool_call>", [OSLO, OSLO]),
        (f"<tool_call>{WRITTEN}", [OSLO]),  # without the end tag
        (
            "<tool_call>\n<function=rain>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>",
            [OSLO],
        ),
        (f"[TOOL_CALLS] [{WRITTEN}]", [OSLO]),
        ('[TOOL_CALLS]rain[ARGS]{"city": "Oslo", "days": 2}', [OSLO]),
        ('[TOOL_CALLS]rain[CALL_ID]a1[ARGS]{"city": "Oslo", "days": 2}[TOOL_CALLS]x[ARGS]{}', [OSLO, Call("x", {})]),
        (f"<|tool_call|>[{WRITTEN}]<|/tool_call|>", [OSLO]),
        ('<|tool_call>call:rain{city:<|"|>Oslo<|"|>,days:2}<tool_call|>', [OSLO]),
        ("<start_function_call>call:rain{city:<escape>Oslo<escape>,days:2}<end_function_call>", [OSLO]),
        (WRITTEN.replace("arguments", "parameters"), [OSLO]),
        (f"<|python_tag|>{WRITTEN}; {WRITTEN}", [OSLO, OSLO]),
        (json.dumps({"name": "rain", "arguments": json.dumps(OSLO.arguments)}), [OSLO]),
        (
            "<tool_call>rain\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>2</arg_value>\n</tool_call>",
            [OSLO],
        ),
        (f"functools[{WRITTEN}]", [OSLO]),
        (f"<tool_calls>[{WRITTEN}, {WRITTEN}]</tool_calls>", [OSLO, OSLO]),
        (f"<TOOLCALL>[{WRITTEN}]</TOOLCALL>", [OSLO]),
        ("<|tool_call_start|>[rain(city='Oslo', days=2), x()]<|tool_call_end|>", [OSLO, Call("x", {})]),
        ('<function_calls>rain(city="Oslo", days=2)\nweather.rain(a=null, b=[true])</function_calls>',
         [OSLO, Call("weather.rain", {"a": None, "b": [True]})]),
        ("<function_calls>f(a='\\ud83c\\udf27 \\d')</function_calls>", [Call("f", {"a": "🌧 \\d"})]),
        (
            "<|calls begin|><|call begin|>function<|sep|>rain\n```json\n"
            '{"city": "Oslo", "days": 2}\n```<|call end|><|calls end|>',
            [OSLO],
        ),
        (
            '<|calls begin|><|call begin|>rain<|sep|>{"city": "Oslo", "days": 2}<|call end|>'
            "<|call begin|>x<|sep|>{}<|call end|><|calls end|>",
            [OSLO, Call("x", {})],
        ),
        ("<|tool_calls_section_begin|><|tool_call_begin|>functions.rain:0<|tool_call_argument_begin|>"
         '{"city": "Oslo", "days": 2}<|tool_call_end|><|tool_calls_section_end|>', [OSLO]),
        ("<|channel|>analysis<|message|>Wet?<|end|><|start|>assistant<|channel|>commentary to=functions.rain "
         '<|constrain|>json<|message|>{"city": "Oslo", "days": 2}<|call|>', [OSLO]),
        (' to=functions.rain<|channel|>commentary json<|message|>{"city": "Oslo", "days": 2}', [OSLO]),
        # truncated or malformed text is not a call
        ("<tool_call>\n<function=rain>\n<parameter=city>\nOslo", []),
        ("<tool_call>\n<function=rain>\n<parameter=city>\nOslo\n</function>\n</tool_call>", []),
        ("<tool_call>rain\n<arg_key>city</arg_key>\n<arg_value>Os", []),
        ("<tool_call>rain\n<arg_key>city</arg_key>\n</tool_call>", []),
        ("<|tool_call_start|>[rain(city='Os", []),
        ("<|tool_call_start|>[rain('Oslo')]", []),
        ("<|tool_call_start|>[rain(city=open('x'))]", []),
        ("<|tool_call_start|>[rain(city=b'x')]", []),
        ("<|tool_call_start|>[rain(city=1e999)]", []),
        ("<|tool_call_start|>[rain()(city=1)]", []),
        ("<|tool_call_start|>city = rain()", []),
        ("<|tool_call_start|>" + "[" * 9999, []),
        ("<function_calls>" + "-" * 9999 + "1", []),
        ('<|calls begin|><|call begin|>rain<|sep|>{"city"', []),
        ("<|calls begin|><|call begin|>rain", []),
        (" to=functions.rain <|constrain|>json<|message|>{", []),
        ("<tool_call>\n{'name': 'rain'}\n</tool_call>", []),
        ('<tool_call>\n{"arguments": {}}\n</tool_call>', []),
        ('{"city": "Oslo"}', []),
        ('It is {"name": "rain", "arguments": {}}', []),
        ("[TOOL_CALLS]rain[ARGS]{", []),
        ("It rains.", []),
        ("", []),
    ],
)  # fmt: skip
def test_every_form_of_a_call_is_read(text: str, calls: list[Call]) -> None:
    assert next((found for form in FORMS if (found := form.read(in_deepseeks_tokens(text)))), []) == calls


def test_a_schema_tells_text_from_numbers_where_a_form_sets_no_quotes() -> None:
    values = {"zip": "0123", "days": "3", "dry": "True", "note": "a\n"}
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>" for key, value in values.items())
    known = {"zip": {"type": "string"}, "days": {"type": "integer"}, "dry": True}
    schema = {"type": "function", "function": {"name": "rain", "parameters": {"properties": known}}}
    for text in (f"<tool_call><function=rain>{tags}</function></tool_call>", f"<tool_call>rain{pairs}</tool_call>"):
        (call,) = next(found for form in FORMS if (found := form.read(text, [schema])))
        assert call.arguments == {"zip": "0123", "days": 3, "dry": True, "note": "a\n"}
    (call,) = next(found for form in FORMS if (found := form.read(text)))
    assert call.arguments["zip"] == "0123"  # not JSON


END, START = "'<|im_end|>'", "'<|im_start|>' + m.role + '\n'"
TOOLS_SHOWN = "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>' }}{% endif %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {  # of the families, shortened
    "qwen": TOOLS_SHOWN + "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' "
    "+ m.content + '\n</tool_response><|im_end|>\n' }}{% else %}{{ " + START + " + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ ('\n' if m.content or not loop.first else '') + '<tool_call>\n{\"name\": \"' "
    "+ c.function.name + '\", \"arguments\": ' + c.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + ASKS,
    "llama": TOOLS_SHOWN + "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>ipython\n' "
    "+ m.content | tojson + '<|im_end|>' }}{% elif m.tool_calls %}{{ '<|im_start|>assistant\n{\"name\": \"' "
    '+ m.tool_calls[0].function.name + \'", "parameters": \' + m.tool_calls[0].function.arguments | tojson '
    "+ '}<|im_end|>' }}{% else %}{{ " + START + " + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}" + ASKS,
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.tool_call_id + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids of nine characters') }}{% endif %}{{ '[' + {'name': c.function.name, 'arguments': "
    "c.function.arguments, 'id': c.id} | tojson + ']' }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "gemma": TOOLS_SHOWN + "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ 'response:' + m.name + '{value:<|\"|>' + m.content + '<|\"|>}<tool_response|>' }}"
    "{% else %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ "
    + START
    + " }}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<|tool_call>call:' "
    "+ c.function.name + '{' }}{% for key, value in c.function.arguments | items %}{{ key + ':<|\"|>' + value "
    "+ '<|\"|>' }}{% endfor %}{{ '}<tool_call|>' }}{% endfor %}"
    "{{ '<|tool_response>' if m.tool_calls else '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
NAMED = "{% for c in m.tool_calls or [] %}{% set f = c.function %}"
ITEMS = "{% for key, value in f.arguments.items() %}"
PYTHON = NAMED + "{{ f.name + '(' }}" + ITEMS + "{{ key + '=' + value | tojson + (', ' if not loop.last else '') }}"
PYTHON += "{% endfor %}{{ ')' + (SEPARATOR if not loop.last else '') }}{% endfor %}"
CALLS = {  # only the calls differ; the turns are those of "qwen"
    "coder": NAMED + "{{ '\n<tool_call>\n<function=' + f.name + '>\n' }}" + ITEMS + "{{ '<parameter=' + key + '>\n' }}"
    "{{ value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}"
    "{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}",
    "glm": NAMED + "{{ '\n<tool_call>' + f.name + '\n' }}" + ITEMS + "{{ '<arg_key>' + key + '</arg_key>\n' }}"
    "{{ '<arg_value>' + (value if value is string else value | tojson) + '</arg_value>\n' }}{% endfor %}"
    "{{ '</tool_call>' }}{% endfor %}",
    "olmo3": "{% if m.tool_calls %}{{ '<function_calls>' }}" + PYTHON.replace("SEPARATOR", "'\n'")
    + "{{ '</function_calls>' }}{% endif %}",
    "lfm2": "{% if m.tool_calls %}{{ '<|tool_call_start|>[' }}" + PYTHON.replace("SEPARATOR", "', '")
    + "{{ ']<|tool_call_end|>' }}{% endif %}",
    "deepseek": "{% if m.tool_calls %}{{ '<|calls begin|>' }}" + NAMED + "{{ '<|call begin|>' + c.type + '<|sep|>' "
    "+ f.name + '\n```json\n' + f.arguments + '\n```<|call end|>' }}{% endfor %}{{ '<|calls end|>' }}{% endif %}",
    "gpt-oss": "{% if m.tool_calls %}" + NAMED + "{{ '<|channel|>commentary to=functions.' + f.name "
    "+ ' <|constrain|>json<|message|>' + f.arguments | tojson + '<|call|>' }}{% endfor %}{% endif %}",
    "apriel": "{% if m.tool_calls %}{{ '\n<tool_calls>[' }}" + NAMED + "{{ {'name': f.name, 'arguments': f.arguments} "
    "| tojson + (', ' if not loop.last else '') }}{% endfor %}{{ ']</tool_calls>' }}{% endif %}",
}  # fmt: skip
CALLS["deepseek"] = in_deepseeks_tokens(CALLS["deepseek"])
OF_QWEN = TEMPLATES["qwen"].partition("+ m.content }}")[2].partition("{{ '<|im_end|>")[0]
TEMPLATES |= {name: TEMPLATES["qwen"].replace(OF_QWEN, calls) for name, calls in CALLS.items()}
TEMPLATES |= {  # with calls in the text of an answer
    "smollm3": "{% if xml_tools or tools %}{{ '<tools>' + tools | tojson + '</tools><tool_call>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' "
    "+ m.content + '<|im_end|>\n' }}{% endfor %}" + ASKS,
    "granite3": "{% if tools %}{{ '<|im_start|>available_tools' + tools | tojson(indent=4) + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ " + START + " + m.content + '<|im_end|>\n' }}{% endfor %}" + ASKS,
    "phi4-mini": "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] "
    "+ '<|/tool|><|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
}
SPECIALS = {
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>"],
    "deepseek": [*DEEPSEEK.values()],
    "gpt-oss": ["<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"],
    "granite3": ["<|tool_call|>"],
    "phi4-mini": [
        "<|tool_call|>",
        "<|/tool_call|>",
        "<|tool|>",
        "<|/tool|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]", "[/INST]"],
    "gemma": ["<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'],
}
RAIN = [{"type": "function", "function": {"name": "rain", "description": "Whether it rains."}}]
LEARNT = {
    "qwen": '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>It is dry.<|im_end|>',
    "llama": '{"name": "rain", "parameters": {"city": "Oslo"}}<|im_end|>It is dry.<|im_end|>',
    "mistral": '[TOOL_CALLS][{"name": "rain", "arguments": {"city": "Oslo"}, "id": "call00000"}]<|end|>'
    "It is dry.<|end|>",
    "gemma": '<|tool_call>call:rain{city:<|"|>Oslo<|"|>}<tool_call|><|tool_response>It is dry.<|im_end|>',
}
ANSWERED = {
    "qwen": "\n<|im_start|>user\n<tool_response>\nno\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "llama": '<|im_start|>ipython\n"no"<|im_end|><|im_start|>assistant\n',
    "mistral": "[TOOL_RESULTS]call00000no[/TOOL_RESULTS]",
    "gemma": 'response:rain{value:<|"|>no<|"|>}<tool_response|>',
}


def save_with(folder: Path, template: str, specials: list[str], **config: object) -> Path:
    """Write a folder whose tokenizer has additional special tokens."""
    save(folder, template, **config)
    spec = json.loads((folder / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    spec["added_tokens"] += [{**last, "id": last["id"] + 1 + i, "content": name} for i, name in enumerate(specials)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


HARD = {"city": "Os\"lo\n <b>'x'</b> ü 雨 \\n", "days": 2, "near": [{"a": None, "b": [True, 1.5]}], "code": "007"}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_call_that_a_template_has_written_is_read_again(tmp_path: Path, family: str) -> None:
    """Arguments of every type; calls are trained on, results are not."""
    tokenizer = load_tokenizer(save_with(tmp_path, TEMPLATES[family], SPECIALS.get(family, [])))
    chat = chat_format(tokenizer)
    assert isinstance(chat, TemplateFormat)
    known = {"city": {"type": "string"}, "code": {"type": "string"}}
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"properties": known}}}]
    tried = 0
    for arguments, text in itertools.product(
        (HARD if family != "gemma" else {"city": HARD["city"]}, {}), ("", "Wait.")
    ):
        call = Part("tool_call", json.dumps({"name": "rain", "arguments": arguments}))
        said = (Part("text", text),) if text else ()
        messages = [
            message("user", "Rain?"),
            Message("assistant", (*said, call, Part("result", "RESULT"), Part("text", "Dry."))),
        ]
        if text and family in ("llama", "mistral"):
            with pytest.raises(UserError, match="drops or changes messages: turn 2"):
                chat.encode(messages, tools=tools)
            continue
        encoded = chat.encode(messages, tools=tools)
        if family != "mistral":
            assert '"city": {' in tokenizer.decode(encoded.token_ids)
        whole, learnt = tokenizer.decode(encoded.token_ids), tokenizer.decode(encoded.token_ids[encoded.trained])
        assert "RESULT" in whole and "RESULT" not in learnt and "Dry." in learnt
        end = next(name for name, number in tokenizer.specials.items() if number == chat.call_end)
        written = learnt.partition("Dry.")[0].rpartition(end)[0]
        read = chat.call_form.read(written, tools) or chat.call_form.read(written + end, tools)
        assert read == [Call("rain", arguments)] and text in written
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("family", LEARNT)
def test_a_conversation_with_calls_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    folder = save_with(tmp_path, TEMPLATES[family], SPECIALS.get(family, []))
    tokenizer = load_tokenizer(folder)
    chat = chat_format(tokenizer)
    assert isinstance(chat, TemplateFormat)
    call = Part("tool_call", '{"name": "rain", "arguments": {"city": "Oslo"}}')
    answer = Message("assistant", (call, Part("result", "no"), Part("text", "It is dry.")))
    asked = [message("user", "Rain?"), answer, message("user", "Sure?")]
    entries = as_templates_take(asked)
    entries[1]["tool_calls"][0]["id"] = "call00000"
    entries[2] |= {"name": "rain", "tool_call_id": "call00000"}
    theirs = AutoTokenizer.from_pretrained(folder)
    for count, prompt in ((2, False), (3, True)):
        said = entries[: count + 2]
        expected = theirs.apply_chat_template(said, tools=RAIN, add_generation_prompt=prompt, return_dict=False)
        found = chat.encode(asked[:count], prompt=prompt, tools=RAIN)
        assert found.token_ids.tolist() == expected
    (found,) = chat.encode_many([Conversation(tuple(asked[:2]), tools=RAIN)])
    assert tokenizer.decode(found.token_ids[found.trained]) == LEARNT[family]
    assert len(found.turn_ends) == 2 and found.turn_ends[-1] == len(found)
    answered = chat.encode_results([call], ["no"])
    assert tokenizer.decode(answered) == ANSWERED[family]
    whole, end = found.token_ids.tolist(), chat.call_end
    after = whole.index(end, found.turn_ends[0]) + 1
    assert whole[after : after + len(answered)] == answered
    spelled = chat.encode_results([call], ["<|im_end|>"])
    assert spelled.count(tokenizer.specials["<|im_end|>"]) == answered.count(tokenizer.specials["<|im_end|>"])


def test_a_response_template_says_how_calls_are_written(tmp_path: Path) -> None:
    form = {"open": "<<", "close": ">>", "repeats": True, "content": "json", "transform": {"function": "{content}"}}
    response = {"start_anchor": "assistant", "fields": {"tool_calls": form, "content": {"close": "<|im_end|>"}}}
    template = TEMPLATES["qwen"].replace("<tool_call>\n", "<<").replace("\n</tool_call>", ">>")
    chat = chat_format(load_tokenizer(save(tmp_path, template, response_template=response)))
    assert isinstance(chat, TemplateFormat) and chat.call_form.openers == ("<<",)
    assert chat.call_form.read(f"Wait. <<{WRITTEN}>>") == [OSLO] and chat.call_form.read("<<{>>") == []


def test_a_template_without_calls_is_reported(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ " + START + " + m.content + '<|im_end|>' }}{% endfor %}"
    chat = chat_format(load_tokenizer(save(tmp_path, template)))
    assert isinstance(chat, TemplateFormat) and not chat.shows_tools
    call = Part("tool_call", '{"name": "rain", "arguments": {}}')
    with pytest.raises(UserError, match="its chat template does not support tool calls with results"):
        assert chat.call_form
    with pytest.raises(UserError, match="its chat template does not support tool calls with results"):
        chat.encode([message("user", "Rain?"), Message("assistant", (call, Part("result", "no")))])
    other = TEMPLATES["qwen"].replace('<tool_call>\n{"name": ', "CALL ").replace("<tool_call>", "CALL")
    folder = save(tmp_path / "other", other.replace('{"name": ', "CALL "))
    chat = chat_format(load_tokenizer(folder))
    assert isinstance(chat, TemplateFormat) and chat.encode([Message("assistant", (call,))]).trained.any()
    with pytest.raises(UserError, match=r"writes calls in a form unknown to llmkit, .*; use it without --tools"):
        assert chat.call_form
