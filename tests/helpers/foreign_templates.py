"""Chat templates of other models, and tokenizers with such a template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llmkit.formats.conversations import Message
from llmkit.generation.served_sampler import as_openai
from llmkit.tokenizer.patterns import PATTERNS

# the templates of these families, shortened
TEMPLATES = {
    "chatml": (
        "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif -%}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama2": (
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant, please') }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|im_start|>' + m['role'] + '<|header|>\n\n'"
        " + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|header|>\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|im_start|>assistant' }}\n{% endif %}\n{% endfor %}"
    ),
    "mistral": (  # the system message goes into the user's last turn
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
        "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}"
        "{%- for m in turns %}{%- if m.role == 'user' %}"
        "{%- if loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}"
        "{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "apertus": (  # an end-of-turn token only between turns
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not (loop.last and m.role == 'assistant') %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "seed": (  # an empty answer has no newline and no end token
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "looks": (  # depends on a message's length and its beginning
        "{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content | length) | string }}"
        "{{ ' ?' if m.content.startswith('What') else '\n' }}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
    "tools": (
        "{% if tools is defined and tools is none and documents is none %}{{ '<|im_start|>none<|im_end|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m | length | tojson(false, 2) + '\n' + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
}
# like Qwen 3's: thoughts only in the last answer, results in a user turn
QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n<tool_call>\\n{"name": <name>, "arguments": <arguments>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(asked=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content, thought = m.content, m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.asked and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|header|>"]
KINDS = ("bytes", "first", "always", "prepend")
TEXT = "What is assistant user system Sure? Four. Yes, \n\n"


def as_templates_take(messages: Sequence[Message]) -> list[dict]:
    """Return messages in OpenAI's format, with call arguments as objects and without call ids."""
    entries = [{name: entry[name] for name in entry if name != "tool_call_id"} for entry in as_openai(messages)]
    for call in (call for entry in entries for call in entry.get("tool_calls", ())):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        del call["id"]
    return entries


def save(folder: Path, template: str | None, kind: str = "bytes", strips: bool = False, **config: object) -> Path:
    """Write a folder with a tokenizer: byte-level, or in one of the formats of converted SentencePiece models."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(PATTERNS["qwen2"].regex), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    pieces = [] if kind == "bytes" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    size = 300 if kind == "bytes" else 400
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=pieces, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT if kind == "bytes" else f"{TEXT} <|>[INST]</"] * 9, trainer)
    flags = {"special": True, "normalized": False, "lstrip": strips, "rstrip": strips}
    tokenizer.add_special_tokens([AddedToken(name, **flags) for name in SPECIALS])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    known = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder
