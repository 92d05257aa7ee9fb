"""Chat templates of other models, and a tokenizer with one of them."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.tokenizer.patterns import PATTERNS

# as the models of these families have them, shortened
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
    "generation": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
}
SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|header|>"]


def save(folder: Path, template: str) -> Path:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS["qwen2"].regex), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["What is assistant user system Sure? Four. Yes, \n\n"] * 9, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>", "eos_token": "<|end|>",
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
