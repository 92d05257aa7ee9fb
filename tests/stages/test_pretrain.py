"""`llmkit pretrain` as a user runs it: a model that transformers loads, and bad input."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.file_server import file_server
from tests.helpers.jsonl import write

WORDS = "the old ship sailed past a green island while small birds sang over warm grey stones and deep blue water"
WORDS = WORDS.split(" ")
SHAPE = ["--depth", "1", "--hidden-size", "64", "--sequence-length", "32"]
SIZES = [*SHAPE, "--batch-tokens", "256", "--dtype", "float32"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with docs.jsonl, val.jsonl and a tokenizer of 320 tokens in tok/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for name, count in (("docs", 120), ("val", 10)):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) + "." for _ in range(count)]
        write(folder / f"{name}.jsonl", *({"text": text} for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=319, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    (folder / "tok").mkdir()
    tokenizer.save(str(folder / "tok" / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["pretrain", f"{corpus}/docs.jsonl", "--tokenizer", f"{corpus}/tok/", "-o", str(out), *SIZES, *more]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]


@pytest.fixture(scope="module")
def base(corpus, llmkit, tmp_path_factory) -> Path:
    """A model after 40 uninterrupted steps."""
    out = tmp_path_factory.mktemp("runs") / "base"
    done = llmkit(*arguments(corpus, out, "--max-steps", "40", "--val", f"{corpus}/val.jsonl"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["path"] == str(out) and summary["steps"] == 40 and summary["tokens"] == 40 * 256
    return out


def test_it_learns(base):
    curve = losses(base)
    assert len(curve) == 40
    assert curve[-1] < 0.75 * curve[0]


def test_the_folder_is_what_it_should_be(base, corpus):
    names = {path.name for path in base.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names >= {"generation_config.json", "manifest.json", "metrics.jsonl", "loss.svg", "README.md", "state"}
    manifest = json.loads((base / "manifest.json").read_text())
    assert manifest["results"]["val_bits_per_byte"] > 0
    assert manifest["inputs"][0]["path"] == f"{corpus}/docs.jsonl" and len(manifest["inputs"][0]["sha256"]) == 64
    assert {path.stat().st_mode & 0o777 for path in base.iterdir() if path.is_file()} == {0o666 & ~_umask()}
    assert not list(base.rglob("*.pt")) and not list(base.rglob("*.bin"))  # no pickle anywhere


def test_sigterm_in_a_long_step_gives_it_up_and_the_resumed_run_is_equal(corpus, llmkit, tmp_path):
    """Regression: it waited for the end of the step, which is very long with a batch of millions of tokens."""
    long = ["--max-steps", "2", "--batch-tokens", "40k", "--micro-batch-size", "8"]
    assert llmkit(*arguments(corpus, tmp_path / "whole", *long)).returncode == 0
    out = tmp_path / "base"
    command = [sys.executable, "-m", "llmkit", *arguments(corpus, out, *long)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "base.partial" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "stopped; saved after step 1 in" in error.splitlines()[-1] and "Traceback" not in error
    assert len(metrics.read_text().splitlines()) == 1
    assert llmkit(*command[3:], "--resume").returncode == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def test_resuming_a_finished_run_does_nothing_and_succeeds(base, corpus, llmkit):
    before = weights(base)
    command = arguments(corpus, base, "--max-steps", "40", "--val", f"{corpus}/val.jsonl", "--resume")
    for words in (command, [str(word).rstrip("/") for word in command]):  # the tokenizer as tok/ and as tok
        done = llmkit(*words)
        assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 40, done.stderr
        assert weights(base) == before


def test_dry_run_prints_the_plan_and_writes_nothing(corpus, llmkit, tmp_path):
    done = llmkit(*arguments(corpus, tmp_path / "base", "--tokens", "10k", "--dry-run"))
    assert done.returncode == 0 and done.stdout == ""
    assert (
        "1 x 64" in done.stderr and "parameters" in done.stderr and "FLOPs" in done.stderr and "memory" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_adjusted_batches_are_reported(corpus, llmkit, tmp_path):
    done = llmkit(*arguments(corpus, tmp_path / "base", "--tokens", "10k", "--batch-tokens", "100", "--dry-run"))
    assert "--batch-tokens 100 becomes 96, whole rows of 32" in done.stderr, done.stderr
    done = llmkit(*arguments(corpus, tmp_path / "base", "--max-steps", "2", "--batch-tokens", "64k", "--dry-run"))
    assert "tokens of the documents, so a step repeats some" in done.stderr, done.stderr


def test_a_time_budget_chooses_for_itself_and_keeps_to_it(corpus, llmkit, tmp_path):
    command = ["pretrain", f"{corpus}/docs.jsonl", "--tokenizer", f"{corpus}/tok", "-o", str(tmp_path / "base")]
    done = llmkit(*command, "--time-budget", "20s", "--sequence-length", "32")
    assert done.returncode == 0, done.stderr
    assert "promises the lowest loss in 20 s" in done.stderr
    assert json.loads(done.stdout)["steps"] > 0  # few on a busy machine


@pytest.mark.parametrize(
    "change, message",
    [
        (["--hidden-size", "100", "--num-attention-heads", "3"], "--hidden-size 100: not a multiple of 3"),
        (["--sequence-length", "100000"], "fewer than one context of 100,000"),
        (["--learning-rate", "0"], "--learning-rate: expected more than 0"),
        (["--tokenizer", "gpt2"], "found no gpt2; llmkit train-bpe makes one, and hf://ORG/MODEL names one"),
        (["--out", "-"], "--out: expected a folder, such as -o base/, found -"),
    ],
)
def test_a_users_mistake_is_one_line(corpus, llmkit, tmp_path, change, message):
    done = llmkit(*arguments(corpus, tmp_path / "base", *change))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("llmkit: error: ")
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"base.tokens"}


@pytest.mark.parametrize(
    "change, message",
    [
        (["--val", "nowhere.jsonl"], "nowhere.jsonl: expected a readable file"),
        (["--epochs", "2", "--max-steps", "3"], "--max-steps and --epochs: expected one limit of the training length"),
        (["--hidden-size", "33", "--num-attention-heads", "1"], "--hidden-size 33: expected heads of an even number"),
        (["--eval-every", "5"], "--eval-every: needs --val, held-out documents, or --evaluate, tasks"),
        (["--prompt", "Once"], "--prompt: needs --sample-every, the steps between samples"),
    ],
)
def test_errors_that_need_no_documents_come_before_reading_them(corpus, llmkit, tmp_path, change, message):
    done = llmkit(*arguments(corpus, tmp_path / "base", *change))
    assert done.returncode == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_documents_is_named_and_leaves_nothing(corpus, llmkit, tmp_path):
    docs = write(tmp_path / "docs.jsonl")
    done = llmkit("pretrain", docs, "--tokenizer", f"{corpus}/tok", "-o", tmp_path / "base", *SIZES)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"llmkit: error: {docs}") and "no document" in last, done.stderr
    assert list(tmp_path.iterdir()) == [docs]


def test_a_second_run_and_a_resume_with_other_options_are_refused(corpus, llmkit, tmp_path):
    out = tmp_path / "base"
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", *arguments(corpus, out, "--max-steps", "100000", "--save-every", "2")],
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list((tmp_path / "base.partial").glob("state/step-*")):
        time.sleep(0.01)
    for more in ("--resume", "--force", "--quiet"):
        done = llmkit(*arguments(corpus, out, "--max-steps", "100000", more))
        busy = f"llmkit: error: {out}: another run is writing it (process {process.pid}); wait for it"
        assert done.returncode == 2 and done.stderr.startswith(busy), done.stderr
    process.kill()
    process.wait()
    done = llmkit(*arguments(corpus, out, "--max-steps", "100000", "--learning-rate", "0.5", "--resume"))
    assert done.returncode == 2
    assert "--learning-rate was none and is now 0.5; resume with the same options" in done.stderr
    (tmp_path / "base.tokens").rename(tmp_path / "kept.tokens")
    done = llmkit(*arguments(corpus, out, "--max-steps", "100000"))
    assert done.returncode == 2 and f"{out}.partial: an unfinished run; --resume continues it" in done.stderr
    assert not (tmp_path / "base.tokens").exists()  # the error came before the documents were read
    more = ["--max-steps", "100000", "--resume", "--dry-run", "--save-every", "9"]
    done = llmkit(*arguments(corpus, out, *more))
    assert done.returncode == 0 and "100,000, 50 warm-up" in done.stderr, done.stderr


def test_stdin_documents_and_the_token_cache(corpus, llmkit, tmp_path):
    text = (corpus / "docs.jsonl").read_text()
    command = [
        "pretrain",
        "-",
        "--tokenizer",
        f"{corpus}/tok",
        "-o",
        str(tmp_path / "base"),
        *SIZES,
        "--max-steps",
        "2",
    ]
    done = llmkit(*command, stdin=text)
    assert done.returncode == 0, done.stderr
    again = llmkit(*arguments(corpus, tmp_path / "two", "--max-steps", "2"))
    (shard,) = (tmp_path / "two.tokens").glob("tokens-*/shard-00000.safetensors")
    stamp, written = os.stat(shard).st_mtime_ns, weights(tmp_path / "two")
    third = llmkit(*arguments(corpus, tmp_path / "two", "--max-steps", "2", "--force"))
    assert again.returncode == third.returncode == 0
    assert os.stat(shard).st_mtime_ns == stamp
    assert written == weights(tmp_path / "two") == weights(tmp_path / "base")


# ---- sources with shares


def mixed(corpus: Path, out: Path, *more: str) -> list[str]:
    inputs = [f"{corpus}/docs.jsonl:0.75", f"{corpus}/val.jsonl:0.25", "--phase", "0.5:docs=0.4,val=0.6"]
    steps = ["--max-steps", "20", "--val", f"{corpus}/val.jsonl"]
    return ["pretrain", *inputs, "--tokenizer", f"{corpus}/tok", "-o", str(out), *SIZES, *steps, *more]


@pytest.fixture(scope="module")
def mixture(corpus, llmkit, tmp_path_factory) -> Path:
    """A model of two sources after 20 uninterrupted steps."""
    out = tmp_path_factory.mktemp("runs") / "mixture"
    done = llmkit(*mixed(corpus, out))
    assert done.returncode == 0, done.stderr
    assert re.search(r"source +tokens +share +from step 10 +trained on +epochs", done.stderr), done.stderr
    assert re.search(r"docs +\S+ +75.0% +40.0% +2,944 +0.\d\d$", done.stderr, re.MULTILINE), done.stderr
    assert re.search(r"val runs out and repeats: [3-9]\.\d\d epochs", done.stderr), done.stderr
    assert json.loads(done.stdout)["shares"] == {"docs": 0.575, "val": 0.425}
    return out


def shares(folder: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["share_docs"], row["share_val"]) for row in rows if "share_docs" in row]


def test_the_shares_realised_are_in_metrics_and_manifest(mixture):
    assert shares(mixture) == [(0.75, 0.25)] * 10 + [pytest.approx((0.4, 0.6), abs=1 / 256)] * 10
    manifest = json.loads((mixture / "manifest.json").read_text())
    assert manifest["results"]["shares"] == {"docs": 0.575, "val": 0.425}
    assert 3 < manifest["results"]["epochs"]["val"] < 10 and manifest["results"]["epochs"]["docs"] < 1
    assert [Path(one["path"]).name for one in manifest["inputs"]] == ["docs.jsonl", "val.jsonl"]


@pytest.mark.slow
def test_two_processes_keep_the_shares(mixture, corpus, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmkit"]
    out = tmp_path / "base"
    done = subprocess.run([*launcher, *mixed(corpus, out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert shares(out) == shares(mixture) and losses(out) == pytest.approx(losses(mixture), abs=1e-4)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (["{docs}:0.7", "{docs}:0.3"], "docs.jsonl: expected each input once if there are shares; add up its weig"),
        (["{docs}:half"], "docs.jsonl:half: expected FILE:WEIGHT with a number, found 'half'"),
        (["{docs}:1", "nowhere.jsonl:1"], "nowhere.jsonl: expected a readable file: no such file"),
        (["{docs}:1", "--phase", "0.9:web=1"], "--phase 0.9:web=1: expected NAME=SHARE with a name of docs, found"),
        (["{docs}:1", "--phase", "0.9:docs=1", "--time-budget", "1m"], "--phase: expected a run of known length, fou"),
        (
            ["{docs}:0.7", "ftp://host:21/x.parquet:0.3"],
            "ftp://host:21/x.parquet: expected an address that begins with https:// s3:// gs:// or hf",
        ),
        (["--", "-:0.5", "-:0.5"], "stdin: expected each input once"),
    ],
)
def test_an_error_in_the_shares_is_one_line(corpus, llmkit, tmp_path, inputs, message):
    inputs = [text.format(docs=f"{corpus}/docs.jsonl") for text in inputs]
    done = llmkit("pretrain", "--tokenizer", f"{corpus}/tok", "-o", tmp_path / "base", *inputs)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_streams_patterns_and_folders_may_be_sources(corpus, llmkit, tmp_path):
    """The tokens of each stream are cached separately."""
    (tmp_path / "more").mkdir()
    for name in "ab":
        (tmp_path / "more" / f"{name}.jsonl").write_bytes((corpus / "val.jsonl").read_bytes())
    with file_server() as server:
        server.files["docs.jsonl"] = (corpus / "docs.jsonl").read_bytes()
        command = ["pretrain", "--tokenizer", f"{corpus}/tok", *SIZES, "--max-steps", "2", "-o", tmp_path / "base"]
        text = (corpus / "val.jsonl").read_text()
        more = [f"{tmp_path}/more:0.125", f"{tmp_path}/more/*.jsonl:0.125"]
        done = llmkit(*command, "--", *more, f"{server.address}docs.jsonl:0.5", "-:0.25", stdin=text)
    assert done.returncode == 0, done.stderr
    summary, more = json.loads(done.stdout), f"{tmp_path}/more"
    assert summary["shares"] == {more: 0.125, f"{more}/*.jsonl": 0.125, "docs": 0.5, "stdin": 0.25}
    assert summary["epochs"]["docs"] < summary["epochs"]["stdin"]
    assert summary["epochs"]["stdin"] == pytest.approx(4 * summary["epochs"][more], abs=0.01)  # it has half the tokens


def test_other_documents_at_a_url_prevent_resuming(corpus, llmkit, tmp_path):
    """Even documents with the same number of tokens: the same ones in another order."""
    with file_server() as server:
        server.files["docs.jsonl"] = data = (corpus / "docs.jsonl").read_bytes()
        out = tmp_path / "base"
        command = ["pretrain", f"{server.address}docs.jsonl", "--tokenizer", f"{corpus}/tok", "-o", str(out), *SIZES]
        command += ["--max-steps", "100000", "--save-every", "2"]
        process = subprocess.Popen([sys.executable, "-m", "llmkit", *command], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / "base.partial").glob("state/step-*")):
            time.sleep(0.01)
        process.kill()
        process.wait()
        server.files["docs.jsonl"], server.version = b"".join(data.splitlines(keepends=True)[::-1]), "2"
        done = llmkit(*command, "--resume")
    assert done.returncode == 2 and "another run: the data was " in done.stderr, done.stderr


# ---- --from MODEL


@pytest.fixture(scope="module")
def longer(corpus, base, llmkit, tmp_path_factory) -> Path:
    """The model after ten more steps."""
    out = tmp_path_factory.mktemp("runs") / "longer"
    done = llmkit(*further(corpus, base, out, "--max-steps", "10"))
    assert done.returncode == 0, done.stderr
    return out


def further(corpus: Path, model: Path, out: Path, *more: str) -> list[str]:
    details = ["--from", str(model), "-o", str(out), "--dtype", "float32", "--batch-tokens", "256"]
    return ["pretrain", f"{corpus}/docs.jsonl", "--val", f"{corpus}/val.jsonl", *details, *more]


def test_training_continues_from_the_given_model(base, longer, corpus, llmkit, tmp_path):
    untouched = llmkit(*further(corpus, base, tmp_path / "same", "--max-steps", "1", "--learning-rate", "1e-12"))
    before = json.loads((base / "manifest.json").read_text())["results"]
    assert json.loads(untouched.stdout)["val_loss"] == pytest.approx(before["val_loss"], abs=1e-4)
    assert losses(longer)[0] == pytest.approx(losses(base)[-1], abs=0.2) and losses(base)[0] - losses(longer)[0] > 1
    manifest = json.loads((longer / "manifest.json").read_text())
    assert manifest["results"]["val_loss"] < before["val_loss"] - 0.1
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (longer / name).read_bytes() == (base / name).read_bytes()
    assert [one["path"] for one in manifest["parents"]] == [str(base)] and len(manifest["ancestors"]) == 1
    card = (longer / "README.md").read_text()
    assert card.index("--tokenizer") < card.index("--from")  # the commands, in their order


def test_transformers_gives_held_out_documents_the_same_bits_per_byte(base, corpus, llmkit, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    texts = ["the old ship sailed past", "small birds sang over warm grey stones", "deep blue water"]
    write(tmp_path / "val.jsonl", *({"text": text} for text in texts))
    # no document is cut by the end of a row of 32 tokens
    assert sum(len(tokenizer.encode(text)) for text in texts) <= 32
    total = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    untouched = ["--max-steps", "1", "--learning-rate", "1e-12", "--val", f"{tmp_path}/val.jsonl"]
    options = ["--from", base, "-o", tmp_path / "same", "--dtype", "float32", "--batch-tokens", "256", *untouched]
    done = llmkit("pretrain", corpus / "docs.jsonl", *options)
    assert done.returncode == 0, done.stderr
    expected = total / math.log(2) / sum(map(len, texts))
    assert json.loads(done.stdout)["val_bits_per_byte"] == pytest.approx(expected, abs=1e-3)


def test_one_pass_over_the_documents_is_the_default_of_going_on(base, corpus, llmkit, tmp_path):
    done = llmkit(*further(corpus, base, tmp_path / "out", "--dry-run"))
    assert done.returncode == 0 and "one pass over the documents is the default of --from" in done.stderr, done.stderr
    assert "AdamW 0.004" in done.stderr and list(tmp_path.iterdir()) == []
    assert float(re.search(r"\((\S+) epochs of", done.stderr)[1]) == pytest.approx(1, abs=0.1)


def test_two_processes_continue_training_a_model(base, longer, corpus, tmp_path):
    out = tmp_path / "longer"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmkit"]
    done = subprocess.run(
        [*launcher, *further(corpus, base, out, "--max-steps", "10")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(longer), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_third_party_model_keeps_its_family(corpus, llmkit, tmp_path, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    details = {"num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 4096}
    kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[family]
    config = getattr(transformers, kind)(**shape, **details, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_bytes((corpus / "tok" / name).read_bytes())
    done = llmkit(*further(corpus, tmp_path / "theirs", tmp_path / "ours", "--max-steps", "3"))
    assert done.returncode == 0, done.stderr
    assert "context         2048 tokens" in done.stderr  # length of a row; the model's context is longer
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["model_type"] == family and written["max_position_embeddings"] == 4096
    assert written["vocab_size"] == 384 and written["tie_word_embeddings"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(model)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--hidden-size", "64"], "--hidden-size: is set by the model of --from "),
        (["--depth", "1"], "--depth: is set by the model"),
        (["--tie-word-embeddings"], "--tie-word-embeddings: is set by the model"),
        (["--tokenizer", "tok/"], "--tokenizer: is set by the model"),
        (
            ["--learning-rate", "1.5"],
            "--learning-rate: expected at most 1 with --from, which trains with AdamW, found 1.5",
        ),
        (["--sequence-length", "64"], "is 32, found 64"),
        (["--from", "nowhere/"], "nowhere/: expected a model folder, found nothing"),
        (["--from", "{corpus}/tok"], "config.json: not found"),
    ],
)
def test_options_that_the_model_fixes_are_refused_with_it(base, corpus, llmkit, tmp_path, change, message):
    change = [word.format(corpus=corpus) for word in change]
    done = llmkit(*further(corpus, base, tmp_path / "out", *change))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr and list(tmp_path.iterdir()) == []


def test_a_model_in_the_place_of_documents_says_what_it_is_for(base, corpus, llmkit, tmp_path):
    done = llmkit("pretrain", base, "--tokenizer", f"{corpus}/tok", "-o", tmp_path / "out")
    assert done.returncode == 2 and f"found a model folder; to train it further: --from {base}" in done.stderr
    (tmp_path / "longer.toml").write_text(f'from = "{base}"\nmax_steps = 1\ndry_run = true\n')
    done = llmkit("pretrain", f"{corpus}/docs.jsonl", "--config", tmp_path / "longer.toml", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (["--batch-tokens", "1e13"], "about 800,000 GB of memory, and cpu has "),
        (["--batch-tokens", "1e13"], "; lower --batch-tokens\n"),
        (["--hidden-size", "1e9"], "; lower --depth or --hidden-size"),
        (["--micro-batch-size", "1e9", "--batch-tokens", "1e10"], "; lower --micro-batch-size or --sequence-length"),
        (["--tokens", "1e30"], "--tokens: expected at most 9,223,372,036,854,775,807, found '1e30'"),
    ],
)
def test_a_size_that_no_memory_holds_is_refused_by_its_option(corpus, llmkit, tmp_path, change, message):
    done = llmkit(*arguments(corpus, tmp_path / "base", *change))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "base.partial").exists()  # so that the corrected command runs
