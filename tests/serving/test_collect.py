"""Collected judgements are lines that train-reward and sft read without conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from served import served

from llmkit.formats.conversations import message, read_conversation
from llmkit.formats.preferences import Comparison, read_comparison
from llmkit.io.jsonl import read_jsonl

ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2?"},
]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("4\u2028.", "5"))
TOOL = {"role": "assistant", "content": [{"type": "calc", "text": "2+2"}, {"type": "result", "text": "4"}]}
ABOUT = {"model": "chat", "messages": ASKED, "labeller": "Ada", "seeds": [1], "settings": {"temperature": 0.5}}


def test_judgements_are_read_by_the_stages(tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text("# Be honest")
    options = ("--collect", tmp_path / "judged.jsonl", "--guide", guide)
    with served(tiny.save_assistant(tmp_path / "chat"), *options) as server:
        assert server.client.models.list().data[0].collect is True
        assert server.post("/guide", None) == (200, "# Be honest")
        for judgement in (
            {"kind": "comparison", "answers": [BAD, GOOD], "better": 1},
            {"kind": "comparison", "answers": [GOOD, TOOL], "better": None},
            {"kind": "rewrite", "answers": [BAD], "rewritten": "It is 4."},
            {"kind": "thumb", "answers": [TOOL], "better": 1},
            {"kind": "thumb", "answers": [BAD], "better": 0},
        ):
            assert server.post("/collect", {**ABOUT, **judgement}) == (200, {"ok": True})
        for field, value in (
            ("kind", "shrug"),
            ("answers", [GOOD, BAD]),
            ("answers", [ASKED[0]]),
            ("better", 2),
            ("better", True),
            ("labeller", "A" * 201),
            ("messages", ASKED[:2]),
            ("better", None),
            ("messages", []),
            ("stars", 5),
        ):
            judgement = {**ABOUT, "kind": "thumb", "answers": [GOOD], "better": 1, field: value}
            status, content = server.post("/collect", judgement)
            assert status == 400 and content["error"]["param"] == field, content
        for field, judgement in (
            ("better", {"kind": "comparison", "answers": [BAD, GOOD]}),  # no tie, for nobody said so
            ("better", {"kind": "rewrite", "answers": [BAD], "rewritten": "4", "better": 1}),
            ("rewritten", {"kind": "thumb", "answers": [GOOD], "better": 1, "rewritten": "4"}),
        ):
            status, content = server.post("/collect", {**ABOUT, **judgement})
            assert status == 400 and content["error"]["param"] == field, content
    files = [tmp_path / f"judged.{kind}.jsonl" for kind in ("preferences", "conversations")]
    compared = [read_comparison(row) for row in read_jsonl([str(files[0])])]
    assert all(isinstance(one, Comparison) and not one.losses for one in compared)
    assert [one.ranks for one in compared] == [(1, 2), (1, 1), (1, 2)]
    said = ["".join(part.text for turn in answer for part in turn.parts) for answer in compared[0].candidates]
    assert said == ["4\u2028.", "5"] and compared[2].candidates[0] == (message("assistant", "It is 4."),)
    conversations = [read_conversation(row) for row in read_jsonl([str(files[1])])]
    assert [one.rejected for one in conversations] == [False, False, True]
    assert [turn.weight for turn in conversations[0].messages] == [1, 0, 1, 1] and not conversations[1].losses
    record = json.loads(files[0].read_bytes().split(b"\n")[0])
    assert {name: record[name] for name in ("kind", "labeller", "model", "seeds", "settings")} == {
        "kind": "comparison",
        **{name: value for name, value in ABOUT.items() if name != "messages"},
    }
    assert [json.loads(line)["label"] for line in files[1].read_bytes().splitlines()] == [True, True, False]
    assert len(record["fingerprint"]) == 16 and record["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--collect", "no-such-folder/judged.jsonl"], "--collect"),
        (["--collect", "judged.jsonl.gz"], "--collect"),
        (["--guide", "chat/config.json"], "--guide"),
        (["--allow-origin", "foo"], "--allow-origin foo: expected a scheme and a host"),
        (["--allow-origin", "https://app.example/page"], "--allow-origin"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--host", "no.such.host.invalid"], "--api-key-file"),
        (["--api-key-file", "empty"], "empty: expected a key"),
        (["--thinking", "on"], "--thinking"),
        (["--thinking", "on", "--dry-run"], "--thinking"),
        (["--tools", "oven", "--dry-run"], "--tools"),
    ],
)
def test_user_errors_are_reported_before_the_server_listens(
    tmp_path: Path, llmkit, options: list[str], words: str
) -> None:
    tiny.save_assistant(tmp_path / "chat")
    (tmp_path / "empty").write_text("\n")
    done = llmkit("serve", "chat", *options, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("llmkit: error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_judgement_starts_a_new_line_after_a_truncated_one(tmp_path: Path) -> None:
    kept = tmp_path / "judged.conversations.jsonl"
    kept.write_text('{"messages": "by hand"}')
    with served(tiny.save_assistant(tmp_path / "chat"), "--collect", tmp_path / "judged.jsonl") as server:
        for _ in range(2):
            thumb = {**ABOUT, "kind": "thumb", "answers": [GOOD], "better": 1}
            assert server.post("/collect", thumb) == (200, {"ok": True})
    assert [json.loads(line).keys() >= {"messages"} for line in kept.read_text().rstrip("\n").split("\n")] == [True] * 3
