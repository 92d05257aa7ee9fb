"""Patterns and folders as inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.io.jsonl import input_files, names_of


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """A folder with files like those of the hub's programs and ours."""
    monkeypatch.chdir(tmp_path)
    names = """data/README.md data/dataset_infos.json data/.gitattributes data/.cache/x.jsonl data/manifest.json
        data/train/b.jsonl data/train/a.parquet data/train/c.json.gz data/b.JSONL data/b.jsonl.manifest.json data/p.html
        data/notes.md data/model/config.json data/model/sub/x.jsonl data/tokens/x.safetensors data/tokens/inputs.json
        texts/README.md texts/b/two.txt.gz texts/a.txt od[d].jsonl none/a.png"""
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_the_records_of_a_folder(data: Path) -> None:
    records = ["data/b.JSONL", "data/train/a.parquet", "data/train/b.jsonl", "data/train/c.json.gz"]
    assert input_files(["data"]) == records
    assert input_files(["data/"], text=True) == [records[0], "data/notes.md", *records[1:]]
    assert input_files(["texts"], text=True) == ["texts/README.md", "texts/a.txt", "texts/b/two.txt.gz"]
    for folder, text in (("texts", False), ("none", True), ("data/model", True)):
        with pytest.raises(UserError, match=rf"^{folder}: expected files in this folder that end in \.jsonl"):
            input_files([folder], text)


def test_patterns(data: Path) -> None:
    assert input_files(["-", "data/**/[ab].*", "texts/a.txt"]) == [
        "-", "data/b.JSONL", "data/b.jsonl.manifest.json", "data/train/a.parquet", "data/train/b.jsonl", "texts/a.txt",
    ]  # fmt: skip
    assert input_files(["od[d].jsonl"]) == ["od[d].jsonl"]  # a name, not a pattern
    with pytest.raises(UserError, match=r"^data/\*.tsv: expected files that match this pattern, found none"):
        input_files(["data/*.tsv"])
    with pytest.raises(UserError, match=r"^gone\.jsonl: expected a readable file: no such file"):
        input_files(["gone.jsonl"])
    assert names_of(["a"] * 1000) == "a and 999 other files"


def test_a_pipe_is_not_opened(data: Path) -> None:
    os.mkfifo("pipe.jsonl")
    assert input_files(["pipe.jsonl"]) == ["pipe.jsonl"]
