"""Manifests of output folders and files: how each was made and from what, back to the first ancestor.

A manifest names the manifests of its parents and inputs by digest (`manifest_sha256`), and contains those of all its
ancestors in one flat mapping, `ancestors`. In version 1 they were nested; `flattened` reads both.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import orjson

from llmkit.display import redacted
from llmkit.errors import UserError
from llmkit.io.files import PARTIAL, atomic_file, file_sha256
from llmkit.io.hub import fetched, local_folder
from llmkit.io.jsonl import PARTS, read_object, write_json
from llmkit.io.progress import counted, say
from llmkit.io.remote import is_remote, size_and_version

MANIFEST_VERSION, MANIFEST = 2, "manifest.json"
OF_FILE = ".manifest.json"  # appended to the name of a file
SOURCES = ("parents", "inputs")  # fields of a manifest whose items may have manifests
TRAINING = ("pretrain", "sft", "rl")  # stages that train a model on their inputs
PACKAGES = ("llmkit", "torch", "triton", "numpy", "tokenizers", "safetensors")
LARGEST_MANIFEST = 64 << 20  # bytes; a run has 2 to 4 kB, and 250 per input
# Kind of model to the Hub's name of its task, an example command, its class in transformers, and its use
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


def read_manifest(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the manifest of a folder or file, or None if there is none."""
    path = _manifest_path(output)
    return read_object(path, LARGEST_MANIFEST) if path.exists() else None


def _manifest_path(output: str | os.PathLike[str]) -> Path:
    """Return the manifest's path: inside a folder, but next to a file or a Parquet folder, as readers expect."""
    path = os.fspath(output).rstrip("/")
    beside = os.path.isfile(path) or os.path.isfile(f"{path}/{PARTS.format(0)}")
    return Path(f"{path}{OF_FILE}") if beside else Path(output) / MANIFEST


def sources(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the parents of a manifest, then its inputs."""
    both = [manifest.get(kind) for kind in SOURCES]
    return [item for items in both if isinstance(items, list) for item in items if isinstance(item, dict)]


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 that identifies a manifest, without its ancestors."""
    own, _ = flattened({**manifest, "ancestors": None})
    return hashlib.sha256(orjson.dumps(own, option=orjson.OPT_SORT_KEYS)).hexdigest()


def flattened(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return a manifest that names those of its parents and inputs by digest, and all ancestors' likewise by digest."""
    ancestors: dict[str, dict[str, Any]] = {}

    def named(item: dict[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in item.items() if name not in ("manifest", "manifest_sha256")}
        digest = item.get("manifest_sha256")
        if isinstance(item.get("manifest"), dict):
            whole, above = flattened(item["manifest"])
            digest = str(digest or manifest_digest(whole))
            for name, other in {digest: whole, **above}.items():
                ancestors.setdefault(name, other)
        return {**rest, "manifest_sha256": str(digest)} if digest else rest

    own = {name: value for name, value in manifest.items() if name != "ancestors"}
    for kind in SOURCES:
        if isinstance(own.get(kind), list):
            own[kind] = [named(item) if isinstance(item, dict) else item for item in own[kind]]
    listed = manifest.get("ancestors")
    for digest, other in listed.items() if isinstance(listed, dict) else ():
        if isinstance(other, dict):
            whole, above = flattened(other)
            for name, each in {digest: whole, **above}.items():
                ancestors.setdefault(name, each)
    return own, ancestors


def training_files(model: str) -> tuple[list[str], list[str]]:
    """Return the files that a model and its ancestors were trained on, and the sources that cannot be read: files that
    are missing or have changed, and models without a manifest.

    Raise UserError if the model has no manifest.
    """
    manifest = read_manifest(local_folder(model))
    if manifest is None:
        expected = f"expected {MANIFEST}, which lists the training data of a model, found none"
        raise UserError(f"{model}: {expected}; name the training documents themselves")
    own, ancestors = flattened(manifest)
    unchanged: dict[str, bool] = {}  # by path
    for run in (own, *ancestors.values()):
        options = run.get("options", {})
        if run.get("stage") not in TRAINING:
            continue
        validation = tuple(map(str, options.get("val") or ()))
        taken_out = {item.get("path") for item in sources({"inputs": run.get("not_in")})}
        for item in sources({"inputs": run.get("inputs")}):
            path = str(item.get("path"))
            if path not in taken_out and not any(
                path.startswith(f"{name.rstrip('/')}/") or fnmatch(path, name) for name in validation
            ):
                unchanged[path] = _is_unchanged(item)
        if options.get("model") is not None:
            parents = sources({"parents": run.get("parents")})
            unchanged |= {str(item.get("path")): False for item in parents if "manifest_sha256" not in item}
    return [path for path, same in unchanged.items() if same], [path for path, same in unchanged.items() if not same]


def check_sources(output: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError if a local file or model that a finished run read has changed since; missing ones may be gone."""
    for item in sources(manifest):
        path = str(item.get("path"))
        if not os.path.exists(path) or os.path.realpath(path) == os.path.realpath(output):
            continue
        if "sha256" in item:
            same = _is_unchanged(item)
        else:
            model = read_manifest(path) if os.path.isdir(path) else None
            same = model is None or manifest_digest(model) == item.get("manifest_sha256")
        if not same:
            raise UserError(f"{output}: another run: {path} has changed since; start over with --force")


def _is_unchanged(item: Mapping[str, Any]) -> bool:
    """Return True if an input of a manifest still exists with the same content."""
    path = str(item.get("path"))
    with suppress(UserError, OSError):
        if is_remote(path):
            return size_and_version(path) == (item.get("bytes"), item.get("version"))
        return os.path.getsize(path) == item.get("bytes") and file_sha256(path) == item.get("sha256")
    return False


# ---- writing


def describe_inputs(paths: Iterable[str], known: Mapping[str, tuple[int | None, str]] = {}) -> list[dict[str, Any]]:
    """Describe each input file by path, bytes and SHA-256; pipes only by path, addresses by path, bytes and version.

    The output of a stage also gets its manifest, and the evaluations whose items were removed from it (`not_in`).
    known: size and version of addresses that need not be requested again
    """
    described = []
    for path in paths:
        if is_remote(path):
            described.append({"path": path})
            with suppress(UserError):
                size, version = known[path] if path in known else size_and_version(path)
                described[-1] |= {"bytes": size, "version": version}
            continue
        content = _content(path) if os.path.isfile(path) else {}
        described.append({"path": path.encode(errors="replace").decode(), **content})  # names may not be UTF-8
        with suppress(UserError, OSError):  # a damaged manifest is no reason to lose the finished work
            manifest = read_manifest(path) if content else None
            # the file may no longer be the one that the manifest describes
            if content and (manifest or {}).get("output") != content:
                manifest = read_manifest(os.path.dirname(path) or ".") or {}  # of a Parquet folder
                manifest = manifest if manifest.get("outputs", {}).get(os.path.basename(path)) == content else None
            if manifest:
                described[-1]["manifest"] = manifest
                described[-1] |= {"not_in": manifest["not_in"]} if isinstance(manifest.get("not_in"), list) else {}
    return described


def _content(path: str | os.PathLike[str]) -> dict[str, Any]:
    return {"bytes": os.path.getsize(path), "sha256": file_sha256(path)}


def write_manifest(
    output: str | os.PathLike[str],
    stage: str,
    options: Mapping[str, Any],
    *,
    inputs: Iterable[str] = (),
    parents: Sequence[str] = (),
    results: Mapping[str, Any] | None = None,
    packages: Sequence[str] = PACKAGES,
    not_in: Sequence[str] = (),
    known: Mapping[str, tuple[int | None, str]] = {},
) -> dict[str, Any]:
    """Write the manifest of `output` into its folder, or next to it if it is a file, and return it.

    not_in: evaluations among the inputs whose items were removed from the others. The manifest lists these, and those
    whose items had already been removed from all other inputs.
    known: as in `describe_inputs`
    """
    from importlib.metadata import PackageNotFoundError, version  # 11 ms that --help does not pay

    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    above: list[dict[str, Any]] = [{"path": path, "manifest": None} for path in parents]
    for parent in above:
        try:
            if is_remote(parent["path"]):
                parent |= fetched(parent["path"])
            parent["manifest"] = read_manifest(local_folder(parent["path"]))
        except (UserError, OSError) as error:  # no reason to lose the finished work
            say(f"{error}; the manifest does not record how {parent['path']} was made")
    described = describe_inputs(inputs, known)
    before = [item.get("not_in", []) for item in described if item["path"] not in not_in]
    absent = [{"path": item["path"], "sha256": item.get("sha256")} for item in described if item["path"] in not_in]
    absent += [item for item in (before or [[]])[0] if item not in absent and all(item in others for others in before)]
    tables = sorted(Path(output).glob("part-*.parquet"))
    own, ancestors = flattened(
        {
            "manifest_version": MANIFEST_VERSION,
            "stage": stage,
            "command": shlex.join(["llmkit", *map(redacted, sys.argv[1:])]),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "options": dict(options),
            "versions": versions,
            "machine": f"{platform.machine()} {platform.system()}, {counted(os.cpu_count() or 1, 'core')}",
            "inputs": described,
            "parents": above,
            **({"not_in": absent} if absent else {}),
            **({"output": _content(output)} if os.path.isfile(output) else {}),
            **({"outputs": {path.name: _content(path) for path in tables}} if tables else {}),
            "results": dict(results or {}),
        }
    )
    manifest = {**own, "ancestors": ancestors}
    write_json(_manifest_path(output), manifest)
    return manifest


def write_model_card(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `README.md` into the folder that this manifest describes."""
    name = folder.name.removesuffix(PARTIAL)
    results = {
        k: v for k, v in manifest.get("results", {}).items() if v is not None and not isinstance(v, (dict, list))
    }
    table = [f"| {key} | {value} |" for key, value in results.items()]
    commands = [f"1. `{command}`" for command in dict.fromkeys(_commands(manifest))]
    absent = [item["path"] for item in manifest.get("not_in", [])]
    read = [item for item in manifest.get("inputs", []) if item["path"] not in absent]
    inputs = [f"- `{item['path']}` {item.get('sha256', '')[:12]}" for item in read]
    without = f", without the items of {', '.join(f'`{path}`' for path in absent)}" if absent else ""
    task, command, model_class, meaning = USES[_kind(manifest)]
    sections = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags: [llmkit]\n---\n# " + name,
        f"Made by `llmkit {manifest.get('stage', '?')}` on {manifest.get('created', '?')[:10]}.",
        "\n".join(["| | |", "|---|---|", *table]) if table else "",
        "\n".join(["## How it was made", *commands]),
        "\n".join([f"Inputs of the last step{without}:", *inputs]) if inputs else "",
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
    """Return the key of USES for a model, from the stages of its first parents."""
    current, ancestors = flattened(manifest)
    stages: list[str] = []
    while current:
        stages.append(current.get("stage", "?"))
        first = next(iter(sources({"parents": current.get("parents")})), {})
        current = ancestors.pop(first.get("manifest_sha256", ""), {})  # pop: an edited file may have cycles
    training_stages = [stage for stage in stages if stage != "export"]
    if training_stages[:1] == ["train-reward"]:
        return "judge"
    return "assistant" if "sft" in training_stages else "base"
