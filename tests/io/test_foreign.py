"""Third-party model folders with arbitrary content: an error in one line, no traceback, hang or unbounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from odd_values import MORE_KEYS

from llmkit.errors import UserError
from llmkit.model.folder import load_model
from llmkit.tokenizer.encoding import load_tokenizer

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small third-party assistant with an adapter."""
    import torch
    from foreign_templates import TEMPLATES, save
    from safetensors.torch import save_file
    from tiny import make_model

    from llmkit.io.manifest import write_manifest
    from llmkit.model.folder import save_model

    place = save(tmp_path / "model", TEMPLATES["chatml"])
    save_model(make_model(vocab_size=320, hidden_size=16, intermediate_size=16), place)
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(place), "r": 2, "target_modules": ["q_proj"]})
    )
    save_file({"a": torch.zeros(2)}, place / "adapter" / "adapter_model.safetensors")
    write_manifest(place, "sft", {"a": 1})
    return place


SOME = [f"{name}:{29 if name == 'tokenizer.json' else 5}" for name in MORE_KEYS]


@pytest.mark.parametrize("files", [SOME, *(pytest.param([f"{name}:1"], marks=pytest.mark.slow) for name in MORE_KEYS)])
def test_odd_values_in_a_third_party_folder_are_an_error_in_one_line(folder: Path, files: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(HELPERS / "odd_values.py"), str(folder), *files],
        capture_output=True, text=True, timeout=3000,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPERS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    bad = [" ".join(line) for line in lines if line[0] not in ("ok", "UserError") or float(line[1]) > 5]
    assert not bad, "\n".join(bad[:30])
    for file in files:
        name = file.partition(":")[0]
        outcomes = {line[0] for line in lines if line[3].startswith(f"'{name}") or line[3].startswith(f'"{name}')}
        assert "UserError" in outcomes or (outcomes and name in ("manifest.json", "adapter/adapter_config.json"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_or_folder_in_place_of_a_model_file_is_named(folder: Path, name: str) -> None:
    place = folder / name
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match="expected a file, found a pipe"):
        load_model(folder)
    place.unlink()
    place.mkdir()
    with pytest.raises(UserError, match="expected a file, found a folder"):
        load_model(folder)
    place.rmdir()
    place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=r"a Git LFS pointer .*; run git lfs pull"):
        load_model(folder)


@pytest.mark.parametrize("odd", [5, None, "", ".", "..", "a\0b", "a" * 5000, ["model.safetensors"], {}])
def test_an_index_of_wrong_kinds_is_named(folder: Path, odd: object) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"model.norm.weight": "one.safetensors", "lm_head.weight": odd}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: expected a file of this folder|expected a file, found a folder"):
        load_model(folder)


def _replaced(times: int) -> dict:
    return {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * times}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec["model"]["vocab"].update(zzz=2**31), "expected ids from 0 to"),
        (lambda spec: spec["model"]["vocab"].update(zzz=-1), "expected ids from 0 to"),
        (lambda spec: spec["added_tokens"][0].update(id=4 * 10**9), "expected an integer from 0 to"),
        (lambda spec: spec["added_tokens"][0].pop("special"), "expected true or false for special"),
        (lambda spec: spec.update(normalizer=_replaced(10**7)), "expected texts of at most"),
        (
            lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": [_replaced(20)] * 4}),
            "replacements that make a text at most",
        ),
        (
            lambda spec: spec.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
            "tokenizers cannot encode a text with it",
        ),
        (lambda spec: spec.update(decoder=["a"]), "expected an object or null for decoder, found"),
        (
            lambda spec: spec.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {},
                }
            ),
            "expected special_tokens of post_processor to contain '<q>'",
        ),
    ],
)
def test_a_tokenizer_that_would_end_the_process_is_named(folder: Path, change, words: str) -> None:
    place = folder / "tokenizer.json"
    spec = json.loads(place.read_text())
    change(spec)
    place.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=words):
        load_tokenizer(folder).encode("a" * 40 + "! hello")


def test_a_pattern_that_panics_is_a_line(tmp_path: Path, llmkit) -> None:
    (tmp_path / "text.txt").write_text("a" * 40 + "!\n")
    command = ("train-bpe", tmp_path / "text.txt", "--pattern", "(a+)+$", "--vocab-size", "320", "-o", tmp_path / "t")
    done = llmkit(*command)
    assert done.returncode == 2 and "--pattern: the regular expression takes too much time" in done.stderr
    assert "Traceback" not in done.stderr


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers(folder: Path) -> None:
    from llmkit.model.config import RopeScaling
    from llmkit.model.folder import load_config

    values = json.loads((folder / "config.json").read_text())
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    values["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(values))
    config = load_config(folder)
    assert config.rope_scaling == RopeScaling("linear", 4.0) and config.rope_theta == values["rope_theta"]


def test_a_tokenizer_without_a_decoder_gives_its_text(folder: Path) -> None:
    place = folder / "tokenizer.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "decoder": None}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("hello"))


@pytest.mark.parametrize(
    ("former", "name", "words"),
    [
        ("model.safetensors", "model-q4.gguf", r"found neither, but model-q4\.gguf.*llama.cpp's; download"),
        ("model.safetensors", "consolidated.safetensors", "found neither, but consolidated.*rename it to"),
        (
            "tokenizer.json",
            "tokenizer.model",
            r"expected tokenizer\.json, found .*; convert it with transformers: python -c",
        ),
        (
            "tokenizer.json",
            "model.gguf",
            r"expected tokenizer\.json, found .*; convert it with transformers: python -c",
        ),
        (
            "tokenizer.json",
            "tekken.json",
            r"expected tokenizer\.json, found .*; convert it with transformers: python -c",
        ),
    ],
)
def test_the_error_for_other_formats_says_how_to_convert(folder: Path, former: str, name: str, words: str) -> None:
    (folder / former).rename(folder / name)
    with pytest.raises(UserError, match=words):
        (load_model if former.startswith("model") else load_tokenizer)(folder)
