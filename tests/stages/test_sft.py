"""`llmkit sft` as a user runs it: an assistant that stops, and bad input."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import ANY

import pytest
from tiny import make_model, save_folder

from llmkit.errors import UserError
from llmkit.stages.sft import SftConfig, run
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import load_tokenizer
from llmkit.training.finetuning import EarlyStop
from llmkit.training.trainer import Trainer
from tests.helpers.jsonl import lines, write

CHATS = [("What is the sea?", "Salt water."), ("Who are you?", "A ship.")]
SPEED = ["--sequence-length", "96", "--batch-tokens", "192", "--learning-rate", "0.004", "--warmup-steps", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model whose tokenizer has no chat tokens."""
    return save_folder(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CHATS]
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", *rows)


@pytest.fixture(scope="module")
def assistant(base, chats, llmkit, tmp_path_factory) -> Path:
    """A model that has memorized both conversations."""
    out = tmp_path_factory.mktemp("chat") / "chat"
    done = llmkit("sft", base, "--data", chats, "--max-steps", "120", *SPEED, "-o", out)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["path"] == str(out) and summary["steps"] == 120 and summary["loss"] < 0.2
    return out


def answers(folder: Path, *prompts: str) -> list:
    from llmkit.formats.conversations import message
    from llmkit.generation.generator import Generator
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.requests import Request
    from llmkit.model.folder import load_model

    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer)
    generator = Generator(load_model(folder), tokenizer, Sampling(temperature=0.0))
    requests = [Request(chat.encode([message("user", p)], prompt=True).token_ids.tolist()) for p in prompts]
    return [samples[0] for samples in generator.complete(requests)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# ---- output


def test_it_answers_and_stops(assistant):
    found = answers(assistant, *(question for question, _ in CHATS))
    assert [(one.text, one.finish_reason) for one in found] == [(answer, "stop") for _, answer in CHATS]


def test_transformers_loads_it_and_stops_too(assistant):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(assistant), AutoTokenizer.from_pretrained(assistant)
    question, answer = CHATS[0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**asked, do_sample=False, max_new_tokens=40)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == f"{answer}<|im_end|>"


def test_the_folder_tells_its_ancestry(assistant, base, chats):
    manifest = json.loads((assistant / "manifest.json").read_text())
    assert manifest["stage"] == "sft" and manifest["parents"][0]["path"] == str(base)
    assert manifest["inputs"][0]["path"] == str(chats) and "sha256" in manifest["inputs"][0]
    assert (assistant / "loss.svg").exists() and "sft" in (assistant / "README.md").read_text()


def test_formats_weights_stdin_and_identity_together(base, chats, llmkit, tmp_path):
    text = write(tmp_path / "text.jsonl", {"text": "The sea is wide."}, {"prompt": "Hi", "completion": "Hello."})
    out = tmp_path / "chat"
    done = llmkit(
        "sft", base, "--data", "-:3", "--data", f"{text}:1", "--identity", "name=Ada;maker=Example Labs:0.2",
        "--system", "identity", "--max-steps", "8", *SPEED, "-o", out, stdin=chats.read_text(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    epochs = json.loads(done.stdout)["epochs"]
    assert set(epochs) == {"stdin", str(text), "--identity"}
    assert "--identity: 329 conversations" in done.stderr


def test_conversations_with_items_of_an_evaluation_are_left_out(base, chats, llmkit, tmp_path):
    item = "Which gas do plants take in from the air to feed on?"
    write(tmp_path / "e.jsonl", {"query": item, "choices": ["carbon dioxide", "neon"], "gold": 0})
    held = [
        {"messages": [{"role": "user", "content": item.upper()}, {"role": "assistant", "content": "Neon."}]},
        {"prompt": "A riddle, please.", "completion": f"Well:\n{item.replace(' ', chr(10))}"},
        {"text": f"A quiz. {item} Carbon dioxide."},
    ]
    data = write(tmp_path / "more.jsonl", chats.read_text().strip(), *held, {"prompt": "Hi", "completion": "Hello."})
    out = tmp_path / "chat"
    options = ["--not-in", tmp_path / "e.jsonl", "--max-steps", "2", *SPEED, "-o", out]
    done = llmkit("sft", base, "--data", data, *options)
    assert done.returncode == 0, done.stderr
    assert f"dropped: {data}:3: contains {tmp_path}/e.jsonl:1, score 1.00" in done.stderr
    assert "6 conversations, contaminated 3; 3 examples" in done.stderr
    assert json.loads(done.stdout)["contaminated"] == 3
    report = json.loads((out / "contamination.json").read_text())
    assert [(row["item"], row["documents"]) for row in report["items"]] == [(f"{tmp_path}/e.jsonl:1", 3)]
    assert [place["id"] for place in report["items"][0]["in"]] == [f"{data}:{line}" for line in (3, 4, 5)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert [item["path"] for item in manifest["not_in"]] == [f"{tmp_path}/e.jsonl"]
    assert f"without the items of `{tmp_path}/e.jsonl`" in (out / "README.md").read_text()
    clean = write(tmp_path / "clean.jsonl", chats.read_text().strip(), {"prompt": "Hi", "completion": "Hello."})
    assert llmkit("sft", base, "--data", clean, "--max-steps", "2", *SPEED, "-o", tmp_path / "same").returncode == 0
    assert weights(out) == weights(tmp_path / "same")
    only = write(tmp_path / "only.jsonl", *held)
    with pytest.raises(UserError, match=r"nothing to train on in 3 conversations \(contaminated 3\)"):
        run(SftConfig(model=str(base), data=(str(only),), not_in=(f"{tmp_path}/e.jsonl",), out=f"{tmp_path}/none"))
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


def test_a_validation_that_no_longer_gains_ends_the_run_with_its_best(base, chats, tmp_path, capfd, monkeypatch):
    held_out = write(tmp_path / "val.jsonl", {"prompt": "Quite another thing?", "completion": "zzzzzzzzzzzz"})
    options = {"model": str(base), "data": (str(chats),), "val": (str(held_out),), "eval_every": 5, "patience": 3}
    options |= {"max_steps": 500, "sequence_length": 96, "batch_tokens": 192, "learning_rate": 0.004}
    config = SftConfig(**options, out=f"{tmp_path}/chat")
    summary = asdict(run(config))
    said = capfd.readouterr().err
    assert summary["steps"] < 500 and said.count("no gain in 3 validations") == 1
    rows = lines(tmp_path / "chat" / "metrics.jsonl")
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    kept = min(losses, key=lambda step: losses[step])
    assert kept < max(losses) == summary["steps"]
    assert (summary["kept_step"], summary["val_loss"]) == (kept, round(losses[kept], 4))
    results = json.loads((tmp_path / "chat" / "manifest.json").read_text())["results"]
    assert (results["kept_step"], results["val_loss"]) == (kept, round(losses[kept], 4))
    assert f"| val_loss | {round(losses[kept], 4)} |" in (tmp_path / "chat" / "README.md").read_text()
    assert f"kept the parameters of step {kept}, the best: val_loss {losses[kept]:.4f}" in said

    # killed after the first evaluation without a gain, and resumed: the patience count continues
    note = EarlyStop.note

    def note_and_stop(early: EarlyStop, scores: dict[str, float]) -> None:
        note(early, scores)
        early._trainer.stopping |= early._trainer.step == kept + 5

    cut = replace(config, out=f"{tmp_path}/cut")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(EarlyStop, "note", note_and_stop)
        patched.setattr(Trainer, "_check_growth", lambda trainer: sys.exit())
        run(cut)
    assert max(row["step"] for row in lines(tmp_path / "cut.partial" / "metrics.jsonl")) == kept + 5
    assert asdict(run(replace(cut, resume=True))) == summary | {"path": f"{tmp_path}/cut"} | {
        name: ANY for name in summary if "second" in name or "per" in name
    }
    assert weights(tmp_path / "cut") == weights(tmp_path / "chat")


# ---- adapters


def test_an_adapter_is_merged_and_kept_apart_on_request(base, chats, llmkit, tmp_path):
    from safetensors.torch import load_file

    out = tmp_path / "chat"
    lora = ["--lora-rank", "4", "--keep-adapter", "--max-steps", "10"]
    done = llmkit("sft", base, "--data", chats, *lora, *SPEED, "-o", out)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout)["trained_parameters"]
        == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)) + 2 * 11 * 64
    )
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    name = "model.layers.0.self_attn.v_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    import torch

    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a)
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


@pytest.mark.parametrize(("tied", "quantize"), [(False, None), (True, None), (False, "nf4"), (True, "int8")])
def test_an_adapter_teaches_a_base_to_stop(llmkit, tmp_path, tied, quantize):
    """The base has never seen <|im_end|>: its rows, like those of all new tokens, are trained with the projections.
    An adapter trained on quantized weights also works when merged into the full-precision ones."""
    base = save_folder(tmp_path / "base", make_model(tie_word_embeddings=tied))
    colours = ["red", "green", "blue"]
    data = write(tmp_path / "colours.jsonl", *({"prompt": f"Say {one}", "completion": one} for one in colours))
    options = ["--lora-rank", "8", "--max-steps", "120", *SPEED, "--learning-rate", "0.01", "-o", tmp_path / "chat"]
    options += ["--quantize", quantize] if quantize else []
    done = llmkit("sft", base, "--data", data, *options)
    assert done.returncode == 0, done.stderr
    for colour, answer in zip(colours, answers(tmp_path / "chat", *(f"Say {one}" for one in colours)), strict=True):
        assert (answer.text, answer.finish_reason) == (colour, "stop")


# ---- resuming


def test_a_resumption_with_other_data_is_refused(base, chats, llmkit, tmp_path):
    options = ["--max-steps", "4", *SPEED, "-o", tmp_path / "chat"]
    (tmp_path / "chat.partial").mkdir()
    copy = write(tmp_path / "copy.jsonl", *chats.read_text().splitlines())
    first = llmkit("sft", base, "--data", copy, *options, "--force")
    assert first.returncode == 0
    os.rename(tmp_path / "chat", tmp_path / "chat.partial")
    write(copy, {"prompt": "a", "completion": "b"})
    second = llmkit("sft", base, "--data", copy, *options, "--resume")
    assert second.returncode == 2 and "the data was" in second.stderr


# ---- inspection, and bad input


def test_a_dry_run_shows_what_is_trained_on(base, chats, llmkit):
    done = llmkit("sft", base, "--data", chats, "--dry-run")
    assert done.returncode == 0, done.stderr
    expected = (
        "<|im_start|>user<|im_sep|>What is the sea?<|im_end|><|im_start|>assistant<|im_sep|>«Salt water.<|im_end|>»"
    )
    assert expected in done.stdout
    assert done.stdout.count("==> ") == 2


def test_functions_that_may_be_called_are_shown_and_their_calls_learnt(base, llmkit, tmp_path):
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    called = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [{"function": call}]}]
    answered = [{"role": "tool", "content": "No."}, {"role": "assistant", "content": "It is dry."}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    data = write(tmp_path / "calls.jsonl", {"messages": called + answered, "tools": tools})
    done = llmkit("sft", base, "--data", data, "--dry-run")
    assert done.returncode == 0, done.stderr
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    result = "<|result_start|>No.<|result_end|>«It is dry.<|im_end|>»"
    assert f"assistant<|im_sep|>«{written}»{result}" in done.stdout.replace("\\n", "\n")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in done.stdout and "not used" not in done.stderr


def test_functions_that_a_template_does_not_show_are_counted(llmkit, tmp_path):
    from foreign_templates import TEMPLATES, save
    from tiny import make_model

    from llmkit.model.folder import save_model

    folder = save(tmp_path / "model", TEMPLATES["zephyr"])
    save_model(make_model(vocab_size=320, bos_token_id=300, eos_token_id=300), folder)
    said = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}]
    data = write(tmp_path / "calls.jsonl", {"messages": said, "tools": [{"name": "rain"}]})
    done = llmkit("sft", folder, "--data", data, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "of 1 record: 'tools' not shown by the chat template 1\n" in done.stderr


def test_rejected_answers_are_not_trained_on_and_losses_are_counted(base, llmkit, tmp_path):
    called = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}]
    rows = [{"prompt": f"{n}?", "completion": "bad" if n % 3 else "good", "label": n % 3 == 0} for n in range(6)]
    data = write(tmp_path / "kto.jsonl", *rows, {"messages": called, "tools": "weather"})
    done = llmkit("sft", base, "--data", data, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("good") == 2 and "bad" not in done.stdout
    assert "7 conversations, rejected by its label 4; 3 examples" in done.stderr
    assert "of 7 records: 'tools' not used 1\n" in done.stderr
    write(data, *rows[1:3])
    alone = llmkit("sft", base, "--data", data, "--dry-run")
    assert alone.returncode == 2 and "nothing to train on in 2 conversations (rejected by its label 2)" in alone.stderr


def test_a_long_conversation_is_split_before_questions_and_keeps_its_system_message(base, llmkit, tmp_path):
    turns = [("user", "a" * 9), ("assistant", "b" * 9), ("user", "c" * 9), ("assistant", "d" * 9)]
    turns += [("user", "e" * 9), ("assistant", "f" * 99)]
    rows = [{"role": role, "content": text} for role, text in (("system", "Rhyme."), *turns)]
    data = write(tmp_path / "long.jsonl", {"messages": rows}, {"messages": rows[:5]})
    words = ["sft", base, "--data", data, "--sequence-length", "64"]
    done = llmkit(*words, "--on-long", "split", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 conversations, split 2; 5 examples" in done.stderr
    assert "1 answer cut at the context of" in done.stderr
    shown = done.stdout.split("==> ")[1:]
    assert [[letter for letter in "abcdef" if letter * 4 in one] for one in shown] == [
        *map(list, ("ab", "cd", "ef", "ab", "cd"))
    ]
    assert all("<|im_start|>system<|im_sep|>Rhyme.<|im_end|><|im_start|>user<|im_sep|>" in one for one in shown)
    refused = llmkit(*words, "--on-long", "error", "-o", tmp_path / "chat")
    assert refused.returncode == 2 and "of a row; shorten it, or choose --on-long" in refused.stderr
    assert "--sequence-length" not in refused.stderr


def test_dry_run_says_what_would_be_done(base, chats, llmkit):
    done = llmkit("sft", base, "--data", chats, "--dry-run")
    assert done.returncode == 0
    assert "trained parameters; 11 tokens are new to the model" in done.stderr
    assert re.search(r"about 0\.\d+ GB of memory, \d+s to train", done.stderr)
    long = llmkit("sft", base, "--data", chats, "--epochs", "9e15", "--dry-run").stderr
    assert "GB of memory, over 1000 days to train" in long
    told = llmkit("sft", base, "--data", chats, "--loss", "all", "--limit", "3", "--dry-run").stderr
    assert re.search(r"examples?, (\d+) tokens, \1 of them", told)  # nothing predicts the first


def test_the_plan_tells_when_a_step_takes_more_than_the_data(base, chats, tmp_path, llmkit):
    said = llmkit("sft", base, "--data", chats, "--epochs", "2", "--dry-run").stderr
    assert " epochs in total instead of 2: a step takes up to 1,024 tokens and there are " in said
    many = tmp_path / "many.jsonl"
    many.write_text(chats.read_text() * 60)
    quiet = [
        [chats, "--epochs", "2", "--batch-tokens", "64", "--sequence-length", "64"],
        [chats, "--max-steps", "3"],
        [many, "--epochs", "2"],
    ]
    for options in quiet:
        assert "in total instead of" not in llmkit("sft", base, "--data", *options, "--dry-run").stderr


@pytest.mark.parametrize(
    "name, start, told",
    [
        ("a.csv", b"q,a\n1,2,3\n", "a.csv:1: expected 2 fields"),
        ("a.jsonl", b"PAR1\x15\x04", "a.jsonl: damaged or truncated Parquet"),
        ("a.xlsx", b"PK\x03\x04", "; convert it to Parquet first"),
    ],
)
def test_the_error_of_an_unreadable_table_says_what_to_do(base, tmp_path, llmkit, name, start, told):
    (tmp_path / name).write_bytes(start)
    done = llmkit("sft", base, "--data", tmp_path / name, "-o", tmp_path / "chat")
    assert done.returncode == 2 and told in done.stderr, done.stderr


def test_a_batch_larger_than_the_data_is_reported(base, chats, llmkit):
    said = llmkit("sft", base, "--data", chats, "--max-steps", "3", "--batch-tokens", "4k", "--dry-run").stderr
    assert re.search(r"--batch-tokens 4,000: more than the \d+ tokens of the data, so a step repeats some", said)


def test_a_file_given_twice_has_separate_figures_and_empty_answers_are_counted(base, tmp_path, llmkit):
    data = write(tmp_path / "some.jsonl", *({"instruction": f"Say {n}", "output": "x" * (n % 3)} for n in range(6)))
    words = ["--data", f"{data}:0.7", "--data", f"{data}:0.3", "--max-steps", "2", *SPEED, "-o", tmp_path / "chat"]
    done = llmkit("sft", base, *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["epochs"]) == [str(data), f"{data} (2)"]
    assert summary["not_used"] == {"empty answers, trained as such": 4}  # two of each reading
    assert f"{data}: of 6 records: empty answers, trained as such 2" in done.stderr


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["{"], "chats.jsonl:1: expected one JSON object per line"),
        ([{"prompt": "a", "completion": "b"}, {"messages": []}], "chats.jsonl:2: expected at least one message"),
        ([{"messages": [{"role": "user", "content": "x"}]}], "nothing to train on in 1 conversation"),
        ([], "nothing to train on in 0 conversations (it is empty)"),
    ],
)
def test_bad_data_is_named(base, tmp_path, rows, reason):
    data = write(tmp_path / "chats.jsonl", *rows)
    with pytest.raises(UserError) as caught:
        run(SftConfig(model=str(base), data=(str(data),), out=str(tmp_path / "chat"), max_bad="0", quiet=True))
    assert reason in str(caught.value)
    assert not (tmp_path / "chat").exists() and not (tmp_path / "chat.partial").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"data": ("none.jsonl",)}, "none.jsonl: expected a readable file: no such file"),
        ({"data": ("kernels/*/",)}, "kernels/*/: expected files that match this pattern, found none"),
        ({"data": ("{chats}:0",)}, "expected a weight above 0, found 0"),
        ({"data": ("{chats}:1", "{chats}")}, "expected weights on all files or on none"),
        ({"sequence_length": 9999}, "--sequence-length: expected at most 512, the context"),
        ({"on_long": "error", "sequence_length": 8}, "chats.jsonl:1: "),
        ({"epochs": 1.0, "max_steps": 5}, "--epochs and --max-steps: expected one limit of the training length"),
        ({"identity": "name=Ada"}, "found no maker"),
        ({"system": "identity"}, "needs --identity"),
        ({"lora_rank": 129}, "--lora-rank: expected at most 64, the smaller side"),
        ({"keep_adapter": True}, "needs --lora-rank"),
        ({"quantize": "nf4"}, "--quantize nf4: needs --lora-rank"),
        (
            {"quantize": "int8", "lora_rank": 2, "compile": "on"},
            "--quantize int8: cannot be combined with --compile on",
        ),
        ({"eval_every": 5}, "--eval-every: needs --val"),
        ({"prompt": ("Hi",)}, "--prompt: needs --sample-every"),
        ({"identity": "name=Ada;maker=Example Labs:0"}, "--identity: expected a weight above 0"),
        ({"patience": 2}, "needs --val and --eval-every"),
        ({"model": "nowhere"}, "nowhere: expected a model folder, found nothing"),
    ],
)
def test_bad_options_are_named(base, chats, tmp_path, options, reason):
    options = {"model": str(base), "data": ("{chats}",), **options}
    options["data"] = tuple(text.replace("{chats}", str(chats)) for text in options["data"])
    with pytest.raises(UserError) as caught:
        run(SftConfig(out=str(tmp_path / "chat"), quiet=True, **options))
    assert reason in str(caught.value) and not (tmp_path / "chat.partial").exists()


@pytest.mark.parametrize(
    ("stored", "name", "more"),
    [
        ("model.norm.weight", "norm", []),
        ("model.layers.0.mlp.down_proj.weight", "layers.0.down", ["--lora-rank", "2", "--quantize", "nf4"]),
    ],
    ids=["whole", "nf4"],
)
def test_a_model_folder_with_nan_is_refused(base, chats, llmkit, tmp_path, stored, name, more):
    import torch
    from safetensors.torch import load_file, save_file

    spoilt = save_folder(tmp_path / "spoilt")
    tensors = load_file(spoilt / "model.safetensors")
    tensors[stored].view(-1)[3] = torch.nan
    save_file(tensors, spoilt / "model.safetensors")
    done = llmkit("sft", spoilt, "--data", chats, *SPEED, *more, "-o", tmp_path / "chat")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{spoilt}: expected finite weights, found NaN or infinity in {name};" in done.stderr
    assert not (tmp_path / "chat.partial").exists()


# ---- chatting


def test_a_pipe_holds_a_conversation(assistant, llmkit):
    done = llmkit("sample", assistant, "--chat", "--temperature", "0", stdin="What is the sea?\n/reset\nWho are you?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Salt water.\nA ship.\n"
    assert "a new conversation" in done.stderr


def test_a_base_model_holds_no_conversation_but_answers_by_examples(base, llmkit):
    talk = llmkit("sample", base, "--chat", stdin="hi\n")
    assert talk.returncode == 2 and "expected the special tokens of conversations" in talk.stderr
    asked = llmkit("sample", base, "-p", "What is tea?", "--shots", "assistant", "--max-tokens", "5")
    assert asked.returncode == 0, asked.stderr


def test_a_batch_that_no_memory_holds_is_refused_by_its_option(base, chats, llmkit, tmp_path):
    done = llmkit("sft", base, "--data", chats, "--batch-tokens", "1e13", "-o", tmp_path / "chat")
    assert done.returncode == 2 and done.stderr.endswith("; lower --batch-tokens\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
