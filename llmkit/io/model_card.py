"""The model card of a folder, `README.md`, from its manifest: what the model is, how it was made, how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.io.files import PARTIAL, atomic_file
from llmkit.io.manifest import flattened, sources

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
    commands = [f"1. `{command}`" for command in dict.fromkeys(_commands(manifest))]
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


def _commands(manifest: Mapping[str, Any]) -> list[str]:
    own, ancestors = flattened(manifest)
    manifests = {**ancestors, "": own}
    commands: list[str] = []
    seen: set[str] = set()
    waiting = [("", False)]
    while waiting:
        digest, sources_listed = waiting.pop()
        if sources_listed:
            command = manifests[digest].get("command")
            commands += [command] if isinstance(command, str) else []
        elif digest in manifests and digest not in seen:
            seen.add(digest)
            waiting.append((digest, True))
            waiting += [(item.get("manifest_sha256", "?"), False) for item in reversed(sources(manifests[digest]))]
    return commands


def _kind(manifest: Mapping[str, Any]) -> str:
    """A key of USES, by the stages that led here, each from its first parent."""
    current, ancestors = flattened(manifest)
    stages: list[str] = []
    while current:
        stages.append(current.get("stage", "?"))
        first = next(iter(sources({"parents": current.get("parents")})), {})
        current = ancestors.pop(first.get("manifest_sha256", ""), {})  # a file that was edited may have circles
    training_stages = [stage for stage in stages if stage != "export"]
    if training_stages[:1] == ["train-reward"]:
        return "judge"
    return "assistant" if "sft" in training_stages else "base"
