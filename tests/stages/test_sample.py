"""`llmkit sample` as a user runs it: text from prompts, JSONL in and out, and bad input."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import END, make_model, save_folder

from llmkit.config import resolve
from llmkit.display import printable
from llmkit.errors import UserError
from llmkit.stages.sample import SampleConfig, run
from tests.helpers.jsonl import lines, write

PROMPTS = ["It was a dark", "and stormy night;", "", "the rain fell", "ü", "It was a dark", "in torrents, except", "at"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "base", make_model(context=128, spread=1.5))


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write(tmp_path / "prompts.jsonl", *[{"id": i, "prompt": text} for i, text in enumerate(PROMPTS)])


def sample(folder: Path, out: Path, **options):
    """Run in this process, overwriting the output, and return its text."""
    summary = run(
        resolve(SampleConfig, {"model": str(folder), "out": str(out), "force": True, "quiet": True, **options})
    )
    assert summary is not None and summary.path == str(out) and summary.tokens > 0
    return out.read_text()


def sample_jsonl(folder: Path, out: Path, prompts: Path, **options) -> list[dict]:
    sample(folder, out, inputs=[str(prompts)], jsonl=True, max_tokens="20", **options)
    return lines(out)


# ---- text


def test_as_many_built_in_examples_are_shown_as_fit_the_context(tmp_path, llmkit):
    """With one token per byte, the five examples have about 480 tokens."""
    folder = save_folder(tmp_path / "base", make_model(context=256))
    done = llmkit("sample", folder, "--shots", "assistant", "-p", "Who are you?", "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    assert "--shots assistant: 2 of the 5 built-in examples fit the model's context of 256 tokens" in done.stderr
    prompts = write(tmp_path / "p.jsonl", {"prompt": "Who?"}, {"prompt": "Where?"}, {"prompt": "Who are we?"})
    done = llmkit("sample", folder, prompts, "--jsonl", "--shots", "assistant", "--max-tokens", "5")
    assert len(done.stdout.splitlines()) == 3 and done.stderr.count("built-in examples fit") == 1


def test_the_error_names_the_examples_if_they_do_not_fit(tmp_path, llmkit):
    folder = save_folder(tmp_path / "base", make_model(context=64))
    shots = write(tmp_path / "shots.jsonl", {"prompt": "a?" * 20, "completion": "b" * 40})
    for given, told in (
        (
            ["--shots", "assistant"],
            "--shots assistant: 0 of the 5 built-in examples fit the model's context of 64 tokens; use ",
        ),
        (
            ["--shots", shots],
            "the prompt with its 1 example is 132 tokens long and the model's context is 64, including ",
        ),
    ):
        done = llmkit("sample", folder, *given, "-p", "Who are you?", "--max-tokens", "5")
        assert done.returncode == 2 and told in done.stderr and "shorter" in done.stderr


def test_a_prompt_is_continued(folder, llmkit):
    done = llmkit("sample", folder, "-p", "It was", "--max-tokens", "12", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and 2 <= len(done.stdout) <= 13 and not done.stdout.startswith("It was")
    assert "tok/s" in done.stderr and len(done.stderr.splitlines()) == 1
    piped = llmkit("sample", folder, "--max-tokens", "12", "--seed", "3", "--quiet", stdin="It was\n")
    assert (piped.stdout, piped.stderr, piped.returncode) == (done.stdout, "", 0)


def test_several_samples_have_numbered_headers(folder, tmp_path):
    text = sample(folder, tmp_path / "out.txt", prompt="It was", samples="3", max_tokens="12")
    assert [text.count(f"==> {number}/3 <==\n") for number in (1, 2, 3)] == [1, 1, 1]
    first = sample(folder, tmp_path / "one.txt", prompt="It was", max_tokens="12")
    assert text.startswith("==> 1/3 <==\n" + first)


def test_on_a_terminal_the_text_is_that_of_a_pipe(folder, on_terminal, llmkit):
    words = ["sample", str(folder), "-p", "It was", "--max-tokens", "30", "--top-k", "20", "--quiet"]
    shown = on_terminal(sys.executable, "-m", "llmkit", *words)
    piped = llmkit(*words)
    assert piped.stdout.strip() and shown.replace("\r\n", "\n").split() == printable(piped.stdout).split()


def test_transformers_is_not_imported(folder):
    code = "import sys; from llmkit.cli import run_command_line as run; run(sys.argv[1:])"
    code += "; print('transformers' in sys.modules)"
    command = [sys.executable, "-c", code, "sample", str(folder), "-p", "a", "--max-tokens", "1", "--quiet"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.endswith("False\n")


def test_a_dry_run_says_what_would_be_done(folder, llmkit):
    done = llmkit("sample", folder, "-p", "a", "--top-k", "5", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert "parameters" in done.stderr and "top_k 5" in done.stderr and "float32 on c" in done.stderr
    assert "MB of cached prompt prefixes" in done.stderr


def test_temperature_zero_and_stop_strings_and_limits_are_heard(folder, tmp_path):
    out = tmp_path / "out.txt"
    greedy = sample(folder, out, prompt="It was", temperature="0", max_tokens="40").rstrip("\n")
    assert greedy == sample(folder, out, prompt="It was", temperature="0", max_tokens="40", seed="9").rstrip("\n")
    assert sample(folder, out, prompt="It was", max_tokens="40", seed="9", top_k="1").rstrip("\n") == greedy
    stop = next(part for part in (greedy[i : i + 2] for i in range(2, 20)) if "\ufffd" not in part)
    cut = sample(folder, out, prompt="It was", temperature="0", max_tokens="40", stop=["not in it", stop])
    assert cut == greedy[: greedy.index(stop)] + "\n"


def test_a_foreign_folder_is_continued_as_it_was_trained(shared_data, tmp_path):
    out = tmp_path / "out.jsonl"
    story = shared_data / "ckpt" / "story-llama"
    sample(story, out, prompt="Once upon a time", temperature="0", max_tokens="20", jsonl=True)
    (record,) = lines(out)
    assert record["completion"].startswith(", a little girl named Lily lived in a small house")
    expected = json.loads(story.with_name("story-llama.greedy-expected.json").read_text())["greedy_ids"]
    assert record["token_ids"] == expected[6:26]


# ---- JSONL


def test_records_come_back_in_order_with_what_was_made(folder, prompts, tmp_path, llmkit):
    done = llmkit("sample", folder, "--jsonl", "--max-tokens", "20", "--quiet", stdin=prompts.read_text())
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(record["id"], record["prompt"]) for record in records] == list(enumerate(PROMPTS))
    for record in records:
        assert list(record) == ["id", "prompt", "completion", "token_ids", "finish_reason", "seed"]
        assert (record["finish_reason"] == "stop") == (record["token_ids"][-1] == END)
        assert record["finish_reason"] == "stop" or len(record["token_ids"]) == 20
    assert records == sample_jsonl(folder, tmp_path / "out.jsonl", prompts)


def test_a_text_is_the_same_at_any_batch_size_in_any_order_and_alone(folder, tmp_path):
    words = " ".join(PROMPTS).split()
    texts = sorted({" ".join(random.Random(n).choices(words, k=n % 7)) for n in range(40)})
    whole = write(tmp_path / "all.jsonl", *[{"prompt": text} for text in texts])
    together = {record["prompt"]: record for record in sample_jsonl(folder, tmp_path / "out.jsonl", whole)}
    assert len({record["completion"] for record in together.values()}) > 0.9 * len(texts)
    for size in ("1", "3", "64"):
        random.Random(size).shuffle(texts)
        shuffled = write(tmp_path / "some.jsonl", *[{"prompt": text} for text in texts])
        records = sample_jsonl(folder, tmp_path / "out.jsonl", shuffled, batch_size=size)
        assert [record["prompt"] for record in records] == texts
        assert {record["prompt"]: record for record in records} == together
    for text in texts[:5]:
        alone = sample(folder, tmp_path / "out.txt", prompt=text, max_tokens="20")
        assert alone == together[text]["completion"] + "\n"


def test_the_seed_of_a_record_makes_its_text_again(folder, prompts, tmp_path):
    records = sample_jsonl(folder, tmp_path / "out.jsonl", prompts, seed="11")
    first, again = records[0], records[5]  # the same prompt twice
    assert first["prompt"] == again["prompt"] and first["completion"] != again["completion"]
    assert first["seed"] == 11 and again["seed"] != 11
    alone = sample(folder, tmp_path / "out.txt", prompt=again["prompt"], seed=str(again["seed"]), max_tokens="20")
    assert alone == again["completion"] + "\n"
    # a record as input reproduces itself, with any --seed
    back = write(tmp_path / "back.jsonl", *records[::-1])
    assert sample_jsonl(folder, tmp_path / "out.jsonl", back, seed="12") == records[::-1]


def test_samples_of_a_record_follow_one_another(folder, prompts, tmp_path):
    records = sample_jsonl(folder, tmp_path / "out.jsonl", prompts, samples="3", limit="4")
    assert [(record["id"], record["sample"]) for record in records] == [(i, j) for i in range(4) for j in range(3)]
    single = sample_jsonl(folder, tmp_path / "out.jsonl", prompts, limit="4")
    assert [record["completion"] for record in records[::3]] == [record["completion"] for record in single]
    assert len({record["completion"] for record in records}) > 8


def test_earlier_fields_of_a_record_are_kept_with_the_new_ones(folder, tmp_path):
    record = {"id": 123456789012345678901234567890, "prompt": "Once", "completion": "gold", "meta": {"n": [-(10**25)]}}
    odd = {**record, "token_ids": [1], "logprobs": "kept", "sample": 9, "seed": 5, "finish_reason": None, "given": "x"}
    lines = "".join(json.dumps(row) + "\n" for row in (record, odd))
    for name, text in (("lines.jsonl", lines), ("array.json", json.dumps([record, odd]))):
        (tmp_path / name).write_text(text)
        rows = sample_jsonl(folder, tmp_path / f"{name}.out", tmp_path / name)
        plain, other = rows
        assert {name: plain[name] for name in ("id", "meta")} == {"id": record["id"], "meta": record["meta"]}
        assert plain["given"] == {"completion": "gold"} and plain["completion"] != "gold"
        assert other["given"] == {"completion": "gold", "token_ids": [1], "given": "x"}
        assert (other["logprobs"], other["sample"], other["seed"]) == ("kept", 9, 5)  # a field of another program
        assert len(other["token_ids"]) == 20 and other["finish_reason"] == "length"


def test_records_stream_and_a_closed_pipe_ends_it_all(folder):
    """The first results arrive while the input is open, and closing the output ends the command silently."""
    command = [sys.executable, "-m", "llmkit", "sample", folder, "--jsonl", "--max-tokens", "3", "--batch-size", "2"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        for number in range(100):
            process.stdin.write(json.dumps({"prompt": "a", "id": number}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 0
        process.stdout.close()
        with suppress(BrokenPipeError):
            for number in range(100000):
                process.stdin.write(json.dumps({"prompt": "a", "id": number}) + "\n")
        with suppress(BrokenPipeError):
            process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""


def test_log_probabilities_are_written_on_request(folder, prompts, tmp_path):
    for record in sample_jsonl(folder, tmp_path / "out.jsonl", prompts, logprobs=True, top_k="5"):
        assert len(record["logprobs"]) == len(record["truncated_logprobs"]) == len(record["token_ids"])
        assert all(a <= b <= 0 for a, b in zip(record["logprobs"], record["truncated_logprobs"], strict=True))


@pytest.fixture(scope="module")
def assistant(tmp_path_factory) -> Path:
    """A model that calls the calculator after `<|im_sep|>`, and ends after its result."""
    from tiny import certain, save_tokenizer

    from llmkit.model.folder import save_model
    from llmkit.tokenizer.chat import CHAT_SPECIALS
    from llmkit.tokenizer.encoding import load_tokenizer

    path = tmp_path_factory.mktemp("models") / "chat"
    path.mkdir()
    save_tokenizer(path, *CHAT_SPECIALS)
    tokenizer = load_tokenizer(path)
    names = ("<|im_sep|>", "<|calc_start|>", "<|calc_end|>", "<|result_end|>")
    header, start, end, result_end = (tokenizer.specials[name] for name in names)
    chain = [header, *tokenizer.encode("it"), start, *tokenizer.encode("6*7"), end, result_end, END]
    ends = (END, tokenizer.specials["<|im_end|>"])
    model = make_model(vocab_size=257 + len(CHAT_SPECIALS), eos_token_id=ends)
    save_model(certain(model, *chain), path)
    return path


def test_conversations_are_answered_with_tools(assistant, tmp_path):
    said = [{"role": "system", "content": "Count."}, {"role": "user", "content": "6 times 7? <|im_sep|>"}]
    given = write(tmp_path / "chats.jsonl", {"id": 1, "messages": said})
    (record,) = sample_jsonl(assistant, tmp_path / "out.jsonl", given, tools=["calc"], temperature="0")
    assert (record["id"], record["messages"], record["completion"]) == (1, said, "it")
    assert record["tool_calls"] == [{"tool": "calc", "input": "6*7", "result": "42"}]
    assert record["sampled"].count(False) == 4 and record["finish_reason"] == "stop"
    (record,) = sample_jsonl(
        assistant, tmp_path / "out.jsonl", given, tools=["calc"], temperature="0", max_tool_calls="0"
    )
    assert record["finish_reason"] == "tool_limit"


@pytest.mark.parametrize("field", ["question", "problem", "query", "instruction", "context", "input", "sQuestion"])
def test_an_assistant_is_asked_by_all_but_the_text_of_a_prompt(assistant, tmp_path, field):
    asked = [{"role": "user", "content": "6 times 7?"}]
    given = write(tmp_path / "all.jsonl", {field: "6 times 7?"}, {"messages": asked}, {"prompt": "6 times 7?"})
    found = sample_jsonl(assistant, tmp_path / "out.jsonl", given, seed=3, temperature=0.0)
    assert found[0]["token_ids"] == found[1]["token_ids"] != found[2]["token_ids"]
    shots = write(tmp_path / "shots.jsonl", {"prompt": "a?", "completion": "b"})
    found = sample_jsonl(assistant, tmp_path / "out.jsonl", given, temperature=0.0, shots=str(shots))
    assert found[0]["token_ids"] == found[2]["token_ids"]


def test_calls_of_a_tool_that_was_not_given_are_counted(assistant, tmp_path, capsys):
    given = write(tmp_path / "chats.jsonl", *[{"messages": [{"role": "user", "content": "6 times 7?"}]}] * 2)
    for tools, told in (([], True), (["python"], True), (["calc"], False)):
        options = {"tools": tools, "temperature": "0", "quiet": False}
        sample_jsonl(assistant, tmp_path / "out.jsonl", given, **options)
        said = "2 calls of calc stayed text in the completions, because it is not enabled; enable it with --tools calc"
        assert (said in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "chats.jsonl:1: expected at least one message"),
        ([{"role": "judge", "content": "a"}], "chats.jsonl:1: expected a role .*'judge'"),
        ([{"role": "user", "content": 3}], "chats.jsonl:1: expected 'content' to be a string"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "chats.jsonl:1: .* found the assistant's",
        ),
    ],
)
def test_a_bad_conversation_is_named(assistant, tmp_path, messages, message):
    given = write(tmp_path / "chats.jsonl", {"messages": messages})
    with pytest.raises(UserError, match=message):
        sample_jsonl(assistant, tmp_path / "out.jsonl", given)


def test_a_base_model_continues_a_question_and_has_no_conversations_and_no_tools(folder, tmp_path):
    given = write(tmp_path / "all.jsonl", {"question": "Who?"}, {"prompt": "Who?"})
    asked, told = sample_jsonl(folder, tmp_path / "out.jsonl", given, temperature=0.0)
    assert asked["token_ids"] == told["token_ids"]
    given = write(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    for options in ({"inputs": [str(given)], "jsonl": True}, {"prompt": "a", "tools": ["calc"]}):
        with pytest.raises(UserError, match=r"tokenizer.json: expected the special tokens of conv.*llmkit sft"):
            sample(folder, tmp_path / "out.jsonl", **options)


def killed(words: list, state: Path, number: int) -> tuple[int, str]:
    """Send a signal to a command once its state has some records; return its exit status and stderr."""
    command = [sys.executable, "-m", "llmkit", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (state.exists() and state.stat().st_size > 8000) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate()
    return process.returncode, said


def test_a_killed_run_is_resumed_to_the_same_bytes(folder, tmp_path, llmkit):
    given = write(tmp_path / "prompts.jsonl", *[{"prompt": PROMPTS[n % 8], "id": n} for n in range(160)])
    out, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.state"
    words = ["sample", folder, given, "--jsonl", "--max-tokens", "6", "-n", "2", "--seed", "5", "--quiet", "-o"]
    killed([*words, out], state, signal.SIGKILL)
    assert not out.exists()
    with state.open("ab") as handle:
        handle.write(b'["key", 900, "checksum"]\n{"prompt": "cut in two')
    done = llmkit(*words, out, "--resume")
    assert done.returncode == 0, done.stderr
    summary, tokens = json.loads(done.stdout), sum(len(record["token_ids"]) for record in lines(out))
    assert [summary[name] for name in ("prompts", "completions", "tokens")] == [160, 320, tokens]
    assert llmkit(*words, tmp_path / "whole.jsonl").returncode == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not list(tmp_path.glob("*.state"))


def test_an_interrupted_run_says_how_to_resume_and_is_kept(folder, tmp_path, llmkit):
    given = write(tmp_path / "prompts.jsonl", *[{"prompt": PROMPTS[n % 8], "id": n} for n in range(400)])
    out, state = tmp_path / "out.jsonl", tmp_path / "out.jsonl.state"
    words = ["sample", folder, given, "--jsonl", "--max-tokens", "20", "--quiet", "-o", out]
    code, said = killed(words, state, signal.SIGTERM)
    assert code == 130 and "out.jsonl.state)" in said
    kept = state.read_bytes()
    again = llmkit(*words)
    assert again.returncode == 2 and "an unfinished run; --resume continues it" in again.stderr
    assert state.read_bytes() == kept and not out.exists()


def keep_state(monkeypatch):
    """Keep the state of a finished command, so that a test can make it unfinished again."""
    monkeypatch.setattr("llmkit.io.resume.Kept.remove", lambda state: state._file.close())


def test_a_full_disk_is_reported_with_the_file(folder, tmp_path):
    given = write(tmp_path / "prompts.jsonl", *[{"prompt": PROMPTS[n % 8]} for n in range(200)])
    out = tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "llmkit", "sample", folder, given, "--jsonl", "--quiet", "--max-tokens", "20"]
    words = [*map(str, words), "-o", str(out)]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{out}.state: no space left on disk; free some" in done.stderr
    done = subprocess.run([*words, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(lines(out)) == 200, done.stderr


def test_a_finished_run_has_nothing_to_resume(folder, prompts, tmp_path, llmkit):
    out = tmp_path / "out.jsonl"
    words = ["sample", folder, prompts, "--jsonl", "--max-tokens", "3", "-o", out, "--resume"]
    assert llmkit(*words, "--quiet").returncode == 0
    made = out.read_bytes()
    again = llmkit(*words)
    assert again.returncode == 0 and "already finished" in again.stderr and out.read_bytes() == made
    summary = json.loads(again.stdout)
    assert [summary[name] for name in ("prompts", "completions", "tokens")] == [8, 8, 24]


def test_narrow_weights_make_text_too(folder, prompts, tmp_path):
    from llmkit.model.devices import can_narrow

    plain = sample_jsonl(folder, tmp_path / "out.jsonl", prompts, temperature="0", logprobs=True)
    texts = {}
    for dtype in ("bfloat16", *(["int8"] if can_narrow() else [])):
        texts[dtype] = sample_jsonl(
            folder, tmp_path / "out.jsonl", prompts, temperature="0", dtype=dtype, logprobs=True
        )
        same = sum(a["token_ids"][0] == b["token_ids"][0] for a, b in zip(plain, texts[dtype], strict=True))
        assert same > len(PROMPTS) // 2 and texts[dtype] != plain
    if "int8" in texts:
        for size in ("1", "5"):
            alike = sample_jsonl(
                folder, tmp_path / "out.jsonl", prompts, temperature="0", dtype="int8", batch_size=size, logprobs=True
            )
            assert alike == texts["int8"]


def test_a_run_of_other_prompts_is_not_resumed(folder, prompts, tmp_path, monkeypatch):
    keep_state(monkeypatch)
    out = tmp_path / "out.jsonl"
    records = sample_jsonl(folder, out, prompts)
    out.unlink()
    for other in ({"seed": "3"}, {"inputs": [str(write(tmp_path / "other.jsonl", {"prompt": "x"}))]}):
        with pytest.raises(UserError, match=r"--seed was 0 and is now 3|other.jsonl:1"):
            sample(
                folder, out, **{"inputs": [str(prompts)], "jsonl": True, "max_tokens": "20", "resume": True, **other}
            )
    run(resolve(SampleConfig, {"model": str(folder), "inputs": [str(prompts)], "jsonl": True, "max_tokens": "20",
                               "out": str(out), "resume": True, "quiet": True}))  # fmt: skip
    assert lines(out) == records


def test_a_run_of_another_model_or_other_options_is_not_resumed(folder, tmp_path, llmkit):
    good, bad = [{"prompt": PROMPTS[n % 8], "id": n} for n in range(40)], '{"prompt": 3}\n'
    given, out = write(tmp_path / "prompts.jsonl", *good), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.state"
    whole = sample_jsonl(folder, out, given)
    out.unlink()
    given.write_text(given.read_text() + bad)
    with pytest.raises(UserError, match=r"prompts\.jsonl:41"):  # that line is read when some completions are done
        sample_jsonl(folder, out, given, batch_size="1", max_bad="0")
    kept = partial.read_bytes()
    assert kept
    given.write_text(given.read_text().removesuffix(bad))
    other = save_folder(tmp_path / "other", make_model(context=128, spread=1.4))
    words = [given, "--jsonl", "--max-tokens", "20", "--quiet", "--resume", "-o", out]
    for model, options, reason in (
        (other, [], "the model was "),
        (folder, ["--temperature", "0"], "--temperature was 0.8 and is now 0"),
        (folder, ["--max-tokens", "9"], "--max-tokens was 20 and is now 9"),
        (folder, ["--shots", "assistant"], "what is in --shots was none and is now "),
        (folder, ["--dtype", "bfloat16"], "the precision was float32 and is now "),
    ):
        done = llmkit("sample", model, *words, *options)
        assert done.returncode == 2 and reason in done.stderr and len(done.stderr.splitlines()) == 1
        assert partial.read_bytes() == kept
    done = llmkit("sample", folder, *words, "--batch-size", "3")
    assert done.returncode == 0, done.stderr
    assert lines(out) == whole and not partial.exists()


# ---- bad input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl:2: expected one JSON object"),
        ("[1]", r"bad.jsonl:2: expected one JSON object per line, found a list"),
        ('{"text": "a"}', r"bad.jsonl:2: expected field 'prompt' .*found \['text'\]"),
        ('{"prompt": 3}', r"bad.jsonl:2: expected 'prompt' to be text or messages, found a number"),
        ('{"prompt": null}', r"bad.jsonl:2: expected field 'prompt' or 'messages'"),
        ('{"prompt": "\\ud800"}', r"bad.jsonl:2: "),
        ('{"prompt": "a", "seed": "x"}', r"bad.jsonl:2: expected 'seed' to be a whole number"),
        ('{"prompt": "a", "seed": -1}', r"bad.jsonl:2: expected 'seed' to be a whole number"),
        (json.dumps({"prompt": "a" * 200}), r"bad.jsonl:2: the prompt is 201 tokens long and .* 128.*; shorten"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_left(folder, tmp_path, line, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        sample_jsonl(folder, tmp_path / "out.jsonl", bad, max_bad="0")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def spoiled(folder: Path, target: Path, how: str) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    if how == "no tokenizer":
        (target / "tokenizer.json").unlink()
    if how == "no config":
        (target / "config.json").unlink()
    if how == "cut weights":
        os.truncate(target / "model.safetensors", 5000)
    if how == "nan":
        tensors = load_file(target / "model.safetensors")
        tensors["model.norm.weight"][0] = torch.nan
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if how == "tokenizer too large":
        from tiny import save_tokenizer

        save_tokenizer(target, *[f"<|{n}|>" for n in range(9)])
    return target


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tokenizer", r"spoiled: expected a folder with tokenizer.json, found config.json"),
        ("no config", r"spoiled/config.json: not found"),
        ("cut weights", r"spoiled/model.safetensors: damaged or truncated"),
        ("nan", r"spoiled: its logits are not finite.*NaN"),
        ("tokenizer too large", r"spoiled/tokenizer.json: the tokenizer has 266 tokens and the model 257"),
    ],
)
def test_a_bad_model_folder_is_named(folder, tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        sample(spoiled(folder, tmp_path / "spoiled", how), tmp_path / "out.txt", prompt="a")
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "nowhere: expected a model folder, found nothing"),
        ({"model": __file__}, "expected a model folder, found a file"),
        ({"inputs": ["a.jsonl"]}, "a.jsonl: an input file needs --jsonl"),
        ({"inputs": ["a.jsonl"], "jsonl": True, "prompt": "a"}, "expected one or the other"),
        ({"inputs": ["nowhere.jsonl"], "jsonl": True}, "nowhere.jsonl: expected a readable file"),
        ({"prompt": "a", "temperature": "-1"}, "--temperature: expected at least 0"),
        ({"prompt": "a", "top_p": "0"}, "--top-p: expected more than 0"),
        ({"prompt": "a", "stop": [""]}, "--stop: expected text"),
        ({"prompt": "a", "seed": str(2**63)}, "--seed: expected at most 9,223,372,036,854,775,807"),
        ({"prompt": "a", "device": "cuda"}, "--device cuda: no GPU"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(folder, options, message):
    if options.get("device") == "cuda" and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        run(resolve(SampleConfig, {"model": str(folder), "quiet": True, **options}))


def test_no_prompts_make_no_completions_and_it_is_said(folder, tmp_path, llmkit):
    done = llmkit("sample", folder, "--jsonl")
    assert (done.returncode, done.stdout) == (0, "") and "stdin: no prompts, so no completions" in done.stderr
    (tmp_path / "empty.jsonl").touch()
    out = tmp_path / "out.jsonl"
    done = llmkit("sample", folder, tmp_path / "empty.jsonl", "--jsonl", "--quiet", "-o", out)
    assert "no prompts" not in done.stderr and json.loads(done.stdout)["prompts"] == 0 and out.read_text() == ""


def test_text_that_is_not_utf8_is_refused(folder):
    command = [sys.executable, "-m", "llmkit", "sample", str(folder)]
    done = subprocess.run(command, input=b"one\ntwo \xff", capture_output=True)
    assert done.returncode == 2 and b"stdin:2: not UTF-8 at byte 8" in done.stderr and not done.stdout
