"""Opens a model folder after each of many edits of its files, one at a time, under limits; prints a line about each.

    python odd_values.py FOLDER FILE:EVERY...     # every EVERY-th edit of each file

Prints `outcome seconds megabytes edit`; the outcome is `ok`, `UserError` or the name of an unexpected exception. Run as
a program, because a library may end the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.errors import UserError

MORE_MEMORY = 500 << 20  # bytes beyond those used before the first edit
NESTED: Any = {"a": []}
for _ in range(110):
    NESTED = {"a": [NESTED]}
ODD = (
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 2**31, 2**32 - 1, 2**63, 10**30, 1e308, float("nan"), float("inf"), "",
    "8", "\0", "\x1b[2J", "x" * 100_000, [], [1], ["a"], [None], [[1]], [2**40] * 3, {}, {"a": 1}, {"type": "linear"},
    {"rope_type": "llama3", "factor": 0}, {"type": "Sequence"}, {"content": 5}, NESTED,
)  # fmt: skip
MORE_KEYS = {
    "config.json": (
        "rope_theta rope_scaling rope_parameters sliding_window use_sliding_window max_window_layers layer_types "
        "attention_bias mlp_bias quantization_config head_dim num_key_value_heads rms_norm_eps hidden_act "
        "partial_rotary_factor original_max_position_embeddings no_rope_layers no_rope_layer_interval text_config "
        "query_pre_attn_scalar logits_scaling attention_multiplier rope_local_base_freq sliding_window_pattern n_inner "
        "hidden_activation activation_function auto_map model_type tie_word_embeddings"
    ),
    "generation_config.json": "eos_token_id bos_token_id temperature max_length",
    "tokenizer_config.json": "bos_token eos_token pad_token unk_token add_bos_token chat_template added_tokens_decoder",
    "tokenizer.json": "normalizer post_processor truncation padding version",
    "manifest.json": "parents inputs options output results stage packages",
    "adapter/adapter_config.json": "base_model_name_or_path r lora_alpha target_modules",
}


def edits(value: Any, where: str, depth: int = 4) -> Iterator[tuple[str, Any]]:
    """Yield (name, edited value): every key and the first elements of every list, with each of the odd values."""
    if isinstance(value, dict):
        keys = list(value)[:12] if depth < 3 else list(value)
        extra = MORE_KEYS.get(where, "").split()
        for key in dict.fromkeys([*keys, *extra]):
            for odd in ODD:
                yield f"{where}.{key} = {odd!r:.40}", {**value, key: odd}
            yield f"{where}.{key} absent", {name: one for name, one in value.items() if name != key}
            if depth and key in value:
                for name, inner in edits(value[key], f"{where}.{key}", depth - 1):
                    yield name, {**value, key: inner}
    elif isinstance(value, list):
        for place in range(min(2, len(value))):
            for odd in ODD:
                yield f"{where}[{place}] = {odd!r:.40}", [*value[:place], odd, *value[place + 1 :]]
            if depth:
                for name, inner in edits(value[place], f"{where}[{place}]", depth - 1):
                    yield name, [*value[:place], inner, *value[place + 1 :]]


def open_all(folder: Path, name: str) -> None:
    """Open a folder the way commands do."""
    from llmkit.export.writers import open_adapter
    from llmkit.formats.conversations import message
    from llmkit.io.manifest import write_manifest
    from llmkit.model.folder import load_config, load_model
    from llmkit.tokenizer.encoding import load_tokenizer
    from llmkit.tokenizer.templates import chat_format

    if name == "manifest.json":
        write_manifest(folder / "adapter", "sft", {}, parents=[str(folder)])
    elif name.startswith("adapter"):
        open_adapter(str(folder))
    elif name.startswith("tokenizer"):
        tokenizer = load_tokenizer(folder)
        tokenizer.check_fits(10**9)
        ids, _ = tokenizer.encode_batch(["a b", "hello"])
        tokenizer.decode(ids)
        tokenizer.decode(tokenizer.encode_prompt("hello"))
        tokenizer.document_bounds()
        chat_format(tokenizer).encode([message("user", "hi"), message("assistant", "yo")])
    else:
        load_config(folder)
        load_model(folder)


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def try_all(folder: Path, name: str, every: int) -> None:
    whole = (folder / name).read_bytes()
    for number, (edit, value) in enumerate(edits(json.loads(whole), name)):
        if number % every:
            continue
        (folder / name).write_text(json.dumps(value))
        print(f"{'opening':12}", ascii(edit), file=sys.stderr, flush=True)
        start = time.process_time()
        try:
            open_all(folder, name)
            outcome = "ok"
        except UserError as error:
            outcome = "UserError" if "\n" not in str(error) else "several lines"
        except BaseException as error:
            outcome = type(error).__name__
            import traceback

            last = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in last if "llmkit/" in frame.filename][-1]
            edit += f" @{ours.filename[-30:]}:{ours.lineno} {error!s:.80}"
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{outcome:12} {time.process_time() - start:6.2f} {most:5}", ascii(edit), flush=True)
    (folder / name).write_bytes(whole)


if __name__ == "__main__":
    place, *files = sys.argv[1:]
    pairs = [file.split(":") for file in files]
    for name, _ in pairs:
        open_all(Path(place), name)
    limit_memory()
    for name, every in pairs:
        try_all(Path(place), name, int(every))
