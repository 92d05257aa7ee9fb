"""A report of real outputs of every stage, at the smallest size, so that the names of figures match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import write_lines
from selectolax.lexbor import LexborHTMLParser

pytestmark = pytest.mark.slow
PAGE = "<html><body><article><h1>{0}</h1><p>{1}</p></article></body></html>"
WORDS = "The town of {0} has a mill, a school and a market, and its people like to tell of the river that they love. "


@pytest.fixture(scope="module")
def made(llmkit, tmp_path_factory) -> Path:
    """A folder with the output of all eight stages."""
    place = tmp_path_factory.mktemp("made")
    (place / "web").mkdir()
    towns = [f"Town{number}" for number in range(30)]
    for town in towns:
        (place / "web" / f"{town}.html").write_text(PAGE.format(town, WORDS.format(town) * 8 + f"It is called {town}."))
    chats = [{"prompt": f"Where is {town}?", "completion": f"In {town}."} for town in towns]
    prefs = [{"prompt": f"Where is {town}?", "chosen": f"In {town}.", "rejected": "No."} for town in towns]
    for name, rows in {
        "chats.jsonl": chats,
        "prefs.jsonl": prefs,
        "problems.jsonl": [{"prompt": f"Say {town[-1]}", "answer": town[-1]} for town in towns],
        "q.jsonl": [{"question": f"Where is {town}?", "answer": town} for town in towns[:4]],
        "asks.jsonl": [{"prompt": "The town"}],
    }.items():
        write_lines(place / name, rows)
    for command in (
        "crawl-filter web/ -o docs.jsonl --rejects rejects.jsonl --workers 1 --only url,extract",
        "train-bpe docs.jsonl --vocab-size 320 -o tok/",
        "pretrain docs.jsonl --tokenizer tok/ --val docs.jsonl --depth 1 --max-steps 4 --eval-every 2 "
        "--sample-every 2 --sequence-length 64 -o base/",
        "sft base/ --data chats.jsonl --val chats.jsonl --eval-every 2 --sample-every 2 --max-steps 4 "
        "--sequence-length 64 --batch-tokens 256 -o chat/",
        "probe-knowledge chat/ --questions q.jsonl -n 2 --max-tokens 4 --balance none -o taught.jsonl --report p.jsonl",
        "train-reward chat/ --data prefs.jsonl --max-steps 3 --eval-every 2 -o judge/",
        "rl chat/ --data problems.jsonl --val problems.jsonl --limit 8 --eval-every 2 --reward rm:judge/ "
        "--reward length:-0.1 --gold verifier --group 4 --batch-size 4 --max-tokens 4 --max-steps 3 -o policy/",
        "sample policy/ --jsonl asks.jsonl --max-tokens 4 -o said.jsonl",
    ):
        done = llmkit(*command.split(), "--quiet", cwd=place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return place


def test_all_that_the_stages_write_is_found(made, llmkit):
    page = llmkit("report", ".", "-o", "report.html", cwd=made)
    assert page.returncode == 0 and json.loads(page.stdout)["bytes"] < 1_000_000, page.stderr
    sections = {node.attributes["id"] for node in LexborHTMLParser((made / "report.html").read_text()).css("section")}
    assert {"pipeline", "funnel", "tokenizer", "training-1", "training-4", "probe", "judge", "samples"} <= sections
    done = llmkit("report", made, "--json", cwd=made)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["notes"] == []
    runs = {Path(one["path"]).name: one for one in figures["runs"]}
    assert {name: one["stage"] for name, one in runs.items()} == {
        "docs.jsonl": "crawl-filter",
        "tok": "train-bpe",
        "base": "pretrain",
        "chat": "sft",
        "taught.jsonl": "probe-knowledge",
        "judge": "train-reward",
        "policy": "rl",
        "said.jsonl": "sample",
    }
    name_of = {one["name"]: name for name, one in runs.items()}
    parents = {name: {name_of[parent] for parent in one["parents"]} for name, one in runs.items()}
    assert parents["base"] == {"tok", "docs.jsonl"} and parents["taught.jsonl"] == {"chat"}
    assert parents["policy"] == {"chat", "judge"}
    assert all(one["key_figures"] for name, one in runs.items() if name != "said.jsonl")

    drawn = {one["stage"]: [chart["title"] for chart in one["charts"]] for one in figures["trainings"]}
    assert drawn == {
        "pretrain": ["Loss", "Bits per byte"],
        "sft": ["Loss"],
        "train-reward": ["Loss", "Accuracy"],
        "rl": ["Reward", "Length", "Divergence", "Entropy", "Parts of the reward"],
    }
    reward = figures["trainings"][3]["charts"][0]
    assert [line["label"] for line in reward["lines"]] == ["training", "held out", "gold"]
    assert [len(one["samples"]) for one in figures["trainings"]] == [1, 1, 0, 0]  # of rl rollouts.jsonl has all
    assert figures["funnels"][0]["documents"] == 30 and figures["tokenizers"][0]["rows"][0]["vocab_size"] == 320
    assert figures["probes"][0]["questions"] == 4
    assert [row["of"] for row in figures["judges"][0]["rows"]] == ["held out", "prefs.jsonl", "baseline: length"]
    assert {bias["feature"] for bias in figures["judges"][0]["biases"]} == {"length", "formatting"}
    kinds = {Path(one["path"]).name: one["kind"] for one in figures["samples"]}
    assert kinds["rollouts.jsonl"] == "rollouts" and kinds["disagreements.jsonl"] == "disagreements"
    assert kinds["p.jsonl"] == "probed questions" and kinds["taught.jsonl"] == "conversations"
    assert (
        kinds["said.jsonl"] == "completions"
        and kinds["chats.jsonl"] == "examples"
        and kinds["docs.jsonl"] == "documents"
    )
