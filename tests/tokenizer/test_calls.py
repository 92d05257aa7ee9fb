"""Calls of functions in the forms of the families, and conversations with them in templates from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign_templates import save

from llmkit.errors import UserError
from llmkit.formats.conversations import Conversation, Message, Part, message
from llmkit.tokenizer.calls import FORMS, Call
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.templates import TemplateFormat, as_openai, chat_format

OSLO = Call("rain", {"city": "Oslo", "days": 2})
WRITTEN = '{"name": "rain", "arguments": {"city": "Oslo", "days": 2}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{WRITTEN}\n</tool_call>", [OSLO]),
        (f"Wait.\n<tool_call>\n{WRITTEN}\n</tool_call>\n<tool_call>\n{WRITTEN}\n</tool_call>", [OSLO, OSLO]),
        (f"<tool_call>{WRITTEN}", [OSLO]),  # without its end
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
    assert next((found for form in FORMS if (found := form.read(text))), []) == calls


END, START = "'<|im_end|>'", "'<|im_start|>' + m.role + '\n'"
TOOLS_SHOWN = "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>' }}{% endif %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {  # as the families have them, shortened
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
SPECIALS = {
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
    """A folder whose tokenizer has these special tokens, too."""
    save(folder, template, **config)
    spec = json.loads((folder / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    spec["added_tokens"] += [{**last, "id": last["id"] + 1 + i, "content": name} for i, name in enumerate(specials)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_conversation_with_calls_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    folder = save_with(tmp_path, TEMPLATES[family], SPECIALS.get(family, []))
    tokenizer = load_tokenizer(folder)
    chat = chat_format(tokenizer)
    assert isinstance(chat, TemplateFormat)
    call = Part("tool_call", '{"name": "rain", "arguments": {"city": "Oslo"}}')
    answer = Message("assistant", (call, Part("result", "no"), Part("text", "It is dry.")))
    asked = [message("user", "Rain?"), answer, message("user", "Sure?")]
    entries = as_openai(asked)
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


def test_a_template_without_calls_is_told_of(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ " + START + " + m.content + '<|im_end|>' }}{% endfor %}"
    chat = chat_format(load_tokenizer(save(tmp_path, template)))
    assert isinstance(chat, TemplateFormat) and not chat.shows_tools
    call = Part("tool_call", '{"name": "rain", "arguments": {}}')
    with pytest.raises(UserError, match="its chat template has no calls of tools and their results"):
        assert chat.call_form
    with pytest.raises(UserError, match="its chat template has no calls of tools and their results"):
        chat.encode([message("user", "Rain?"), Message("assistant", (call, Part("result", "no")))])
    other = TEMPLATES["qwen"].replace('<tool_call>\n{"name": ', "CALL ").replace("<tool_call>", "CALL")
    folder = save(tmp_path / "other", other.replace('{"name": ', "CALL "))
    chat = chat_format(load_tokenizer(folder))
    assert isinstance(chat, TemplateFormat) and chat.encode([Message("assistant", (call,))]).trained.any()
    with pytest.raises(
        UserError, match=r"writes calls in a form that llmkit does not know, .*; ask it without --tools"
    ):
        assert chat.call_form
