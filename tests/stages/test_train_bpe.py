"""`llmkit train-bpe` as a user runs it: its output, loading it with Hugging Face, and every error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llmkit.errors import UserError
from llmkit.stages.train_bpe import TrainBpeConfig, run
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.tokenizer.folder import SPECIALS

STORIES = [
    f"Once upon a time, {who} {what} the {where}. “It didn't take {i} days,” said {who}!\n\n  They'd café au lait.\n"
    for i, who in enumerate(("a fox", "the old king", "Anna", "nobody"))
    for what in ("walked to", "dreamt of", "never saw")
    for where in ("sea", "mountain", "town hall")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    lines = [json.dumps({"text": text, "source": "odd" if i % 2 else "even"}) for i, text in enumerate(STORIES)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    out = corpus.with_name("tok")
    run(TrainBpeConfig(inputs=(str(corpus),), vocab_size=320, out=str(out), quiet=True))
    return out


def test_stdin_to_a_folder_and_one_json_line(llmkit, corpus: Path, trained: Path, tmp_path: Path) -> None:
    done = llmkit("train-bpe", "-", "--vocab-size", "320", "-o", tmp_path / "tok/", stdin=corpus.read_text())
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["path"] == str(tmp_path / "tok") and summary["vocab_size"] == 320
    assert summary["merges"] == 320 - 256 - len(SPECIALS) and summary["documents"] == len(STORIES)
    assert summary["bytes"] == len("".join(STORIES).encode())
    names = ["chat_template.jinja", "manifest.json", "report.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == names
    assert (tmp_path / "tok/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    manifest = json.loads((tmp_path / "tok/manifest.json").read_text())
    assert manifest["stage"] == "train-bpe" and manifest["options"]["vocab_size"] == 320


def test_the_report(corpus: Path, trained: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "tok")
    run(TrainBpeConfig(inputs=(str(corpus),), vocab_size=320, out=out, compare=(str(trained),), quiet=True))
    report = json.loads((tmp_path / "tok/report.json").read_text())
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokens = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in STORIES]
    sizes = [len(text.encode()) for text in STORIES]
    assert report["bytes_per_token"] == round(sum(sizes) / sum(tokens), 4)
    by_source = report["sample"]["bytes_per_token_by_source"]
    assert by_source == {"even": round(sum(sizes[::2]) / sum(tokens[::2]), 4), "odd": by_source["odd"]}
    assert report["round_trip"] == {"texts": len(STORIES), "lost": 0, "first_lost": []}
    used = {token for text in STORIES for token in tokenizer.encode(text, add_special_tokens=False).ids}
    sample = report["sample"]
    del sample["bytes"]
    assert report["compared"] == {str(trained): {"vocab_size": 320, **sample}}
    sizes = [entry["bytes"] for entry in report["longest_tokens"]]
    assert len(sizes) == 20 and sizes == sorted(sizes, reverse=True)
    assert report["unused_tokens"]["count"] == len(set(range(256, 320 - len(SPECIALS))) - used)


def test_transformers_loads_it(trained: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained)
    ours = Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert theirs.is_fast and len(theirs) == 320
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>",) * 3
    assert theirs.convert_ids_to_tokens(range(320 - len(SPECIALS), 320)) == list(SPECIALS)
    for text in [*STORIES[:3], " a  b\n\t日本 \x00"]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text).input_ids == ours.encode(text).ids == [theirs.bos_token_id, *ids]  # like documents
        assert load_tokenizer(trained).encode_prompt(text) == [theirs.bos_token_id, *ids]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    chat = theirs.apply_chat_template([{"role": "user", "content": "Who?"}], return_dict=False)
    assert chat[0] == theirs.convert_tokens_to_ids("<|im_start|>") and theirs.bos_token_id not in chat


def test_text_that_spells_special_tokens_is_text(tmp_path: Path) -> None:
    text = "<|im_start|>user<|endoftext|>\n" * 50 + "<|endoftext|>\n" * 50
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": text}) + "\n")
    run(TrainBpeConfig(inputs=(str(tmp_path / "docs.jsonl"),), vocab_size=320, out=str(tmp_path / "tok"), quiet=True))
    report = json.loads((tmp_path / "tok/report.json").read_text())
    assert report["round_trip"]["lost"] == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "tok/tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert report["bytes_per_token"] == round(len(text) / len(ids), 4)  # trained and measured on the text
    assert max(ids) < tokenizer.token_to_id("<|endoftext|>")
    with pytest.raises(UserError, match="was learned from text"):  # this pattern would make it a model token
        options = {"pattern": r"[^\n]+", "vocab_size": 512, "force": True, "quiet": True}
        run(TrainBpeConfig(inputs=(str(tmp_path / "docs.jsonl"),), out=str(tmp_path / "tok"), **options))
    assert (tmp_path / "tok/report.json").exists()


def test_a_small_corpus_gives_a_smaller_vocabulary_padded_to_a_multiple_of_64(llmkit, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    done = llmkit("train-bpe", tmp_path / "a.txt", "--vocab-size", "1000", "--min-frequency", "2", "-o", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert "--vocab-size 1000 becomes 1024" in done.stderr
    # few merges are possible: "be", "to", " be", " to"
    summary = json.loads(done.stdout)
    assert 0 < summary["merges"] < 10 and summary["vocab_size"] == 320
    assert f"only {summary['merges']} merges of 756" in done.stderr
    tokenizer = Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    reserved = 320 - 256 - len(SPECIALS) - summary["merges"]
    assert tokenizer.get_vocab_size() == 320 and tokenizer.id_to_token(319) == f"<|reserved_{reserved - 1}|>"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "docs.jsonl: no text to train on"),
        (b'{"text": ""}\n', "no text to train on"),
        (b'{"text": "a"}\n\nhello\n', "docs.jsonl:3: expected one JSON object per line"),
        (b'{"text": "a"}\n{"body": "b"}\n', "docs.jsonl:2: expected field 'text' (a document), found ['body']"),
        (b'{"text": ["a"]}\n', "docs.jsonl:1: expected 'text' to be a string, found a list"),
        (b'{"text": "caf\xe9"}\n', "docs.jsonl:1: expected one JSON object per line, found bytes that are not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "docs.jsonl:2: "),
    ],
)
def test_bad_documents_are_refused_in_one_line(llmkit, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "docs.jsonl").write_bytes(content)
    done = llmkit("train-bpe", tmp_path / "docs.jsonl", "--max-bad", "0", "-o", tmp_path / "tok")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("llmkit: error: ") and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


@pytest.mark.parametrize(
    "content, message",
    [("", "no text to train on"), ("WARC/1.0\r\nWARC-Type: response\r\n\r\n", "expected text, found a web archive")],
)
def test_binary_data_on_stdin_is_reported_as_stdin(llmkit, tmp_path: Path, content: str, message: str) -> None:
    done = llmkit("train-bpe", "-", "-o", tmp_path / "tok", stdin=content)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"llmkit: error: stdin: {message}; ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vocab-size", "267"], "--vocab-size: expected at least 268 (256 bytes and 12 special tokens), found 267"),
        (["--pattern", "(a"], "--pattern: expected qwen2, llama3, gpt2, o200k or a regular expression, found '(a'"),
        (["--compare", "absent.json"], "absent.json: no such file"),
        (["--min-frequency", "-1"], "--min-frequency: expected at least 0"),
        (["-o", "-"], "--out: expected a folder"),
    ],
)
def test_bad_options_are_refused_in_one_line(llmkit, corpus: Path, tmp_path: Path, options, message: str) -> None:
    done = llmkit("train-bpe", corpus, "-o", "tok", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_stays_unless_forced(llmkit, corpus: Path, trained: Path) -> None:
    before = (trained / "tokenizer.json").read_bytes()
    done = llmkit("train-bpe", corpus, "--vocab-size", "320", "-o", trained)
    assert done.returncode == 2 and "already exists; --force" in done.stderr
    dry = llmkit("train-bpe", corpus, "--vocab-size", "320", "-o", trained, "--dry-run")
    assert (dry.returncode, dry.stderr) == (2, done.stderr)
    assert (trained / "tokenizer.json").read_bytes() == before


def test_dry_run_writes_nothing(llmkit, corpus: Path, tmp_path: Path) -> None:
    done = llmkit("train-bpe", corpus, "--vocab-size", "8k", "--pattern", "gpt2", "-o", tmp_path / "tok", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert "8000" in done.stderr and "merges" in done.stderr and r"\p{L}+" in done.stderr
    done = llmkit("train-bpe", tmp_path / "absent.jsonl", "-o", tmp_path / "tok", "--dry-run")
    assert done.returncode == 2 and "absent.jsonl: expected a readable file" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_pattern_with_gaps_and_options_from_a_file(llmkit, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(
        'pattern = "[a-z]+"\nvocab_size = 320\nmin_frequency = 3\nlimit_bytes = "1kB"'
    )
    arguments = ["train-bpe", corpus, "--config", tmp_path / "options.toml", "-o", tmp_path / "tok"]
    done = llmkit(*arguments, "--compare", tmp_path / "tok", "--quiet")
    assert done.returncode == 2  # the output does not exist yet
    done = llmkit(*arguments, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bytes"] == 1000
    tokenizer = Tokenizer.from_file(str(tmp_path / "tok/tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("Once upon, é!").ids) == "Once upon, é!"


def test_a_script_without_a_main_guard_may_train_in_several_processes(corpus: Path, tmp_path: Path) -> None:
    script = f"""
from functools import partial
from llmkit.stages.train_bpe import TrainBpeConfig, run
from llmkit.tokenizer import corpus
corpus.BLOCK = 4000  # so that there is more than one
corpus.count_pieces = partial(corpus.count_pieces, processes=2, alone=1)
run(TrainBpeConfig(inputs=({str(corpus)!r},) * 3, out={str(tmp_path / "tok")!r}, vocab_size=320, quiet=True))
"""
    (tmp_path / "train.py").write_text(script)
    subprocess.run([sys.executable, str(tmp_path / "train.py")], check=True, timeout=120)
    assert (tmp_path / "tok/tokenizer.json").exists()


def test_a_process_that_dies_during_counting_is_reported_in_one_line(corpus: Path, tmp_path: Path) -> None:
    script = """
from functools import partial
from llmkit.__main__ import main
from llmkit.io import pool
from llmkit.tokenizer import corpus
corpus.BLOCK = 4000  # so that there is more than one
corpus.count_pieces = partial(corpus.count_pieces, processes=2, alone=1)
pool.CHILD = "import os; os.kill(os.getpid(), 9)"
main()
"""
    words = ["train-bpe", corpus, corpus, corpus, "-o", tmp_path / "tok", "--vocab-size", "320", "--quiet"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr == (
        "llmkit: error: a block of text: the worker process was ended by SIGKILL; not enough memory? "
        "use fewer cores (taskset)\n"
    )
    assert not (tmp_path / "tok").exists()
