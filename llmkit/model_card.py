"""The model card of a folder, `README.md`, from its manifest: what the model is, how it was made, how to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmkit.files import PARTIAL, atomic_file

# By kind of model: the task, by the Hub's name; a command; what loads it in transformers, and what it is used for
USES = {
    "base": (
        "text-generation",
        'llmkit sample {name}/ -p "Once upon a time"',
        "AutoModelForCausalLM",
        "A model trained on its inputs alone: it continues documents, and what it says may be wrong.",
    ),
    "assistant": (
        "text-generation",
        'llmkit sample {name}/ -p "Hello, who are you?" --chat',
        "AutoModelForCausalLM",
        "An assistant: ask it by the tokenizer's `apply_chat_template`. What it says may be wrong.",
    ),
    "judge": (
        "text-classification",
        "llmkit train-reward --score {name}/ completions.jsonl",
        "AutoModelForSequenceClassification",
        "A reward model: its only logit, or one for each head, is the score of a conversation as the tokenizer's\n"
        "`apply_chat_template` writes it. It has the tastes of its inputs.",
    ),
}


def write_model_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `README.md` into a folder that this manifest is of."""
    name = folder.name.removesuffix(PARTIAL)
    results = {
        k: v for k, v in manifest.get("results", {}).items() if v is not None and not isinstance(v, (dict, list))
    }
    table = [f"| {key} | {value} |" for key, value in results.items()]
    commands = [f"1. `{command}`" for command in dict.fromkeys(_ancestry(manifest))]
    inputs = [f"- `{item['path']}` {item.get('sha256', '')[:12]}" for item in manifest.get("inputs", [])]
    task, command, model_class, meaning = USES[_kind(manifest)]
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [llmkit]\n---\n# " + name,
        f"Made by `llmkit {manifest.get('stage', '?')}` on {manifest.get('created', '?')[:10]}.",
        "\n".join(["| | |", "|---|---|", *table]) if table else "",
        "\n".join(["## How it was made", *commands]),
        "\n".join(["Inputs of the last step:", *inputs]) if inputs else "",
        f"""## Use

    {command.format(name=name)}

or with transformers:

    from transformers import {model_class}, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("{name}")
    model = {model_class}.from_pretrained("{name}")

{meaning}
""",
    ]
    with atomic_file(folder / "README.md", "w") as handle:
        handle.write("\n\n".join(section for section in sections if section))


def _ancestry(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The commands that led to a manifest, ancestors first, its own last."""
    for item in (*manifest.get("parents", []), *manifest.get("inputs", [])):
        if item.get("manifest"):
            yield from _ancestry(item["manifest"])
    if "command" in manifest:
        yield manifest["command"]


def _kind(manifest: Mapping[str, Any]) -> str:
    """A key of USES, by the stages that led here, each from its first parent."""
    stages: list[str] = []
    one: Mapping[str, Any] | None = manifest
    while one:
        stages.append(one.get("stage", "?"))
        one = next((parent["manifest"] for parent in one.get("parents", [])), None)
    made = [stage for stage in stages if stage != "export"]
    if made[:1] == ["train-reward"]:
        return "judge"
    return "assistant" if "sft" in made else "base"
