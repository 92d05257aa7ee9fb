"""A folder with small versions of all inputs of the documented commands, with the same names.

The crawl and the conversations are Tiny World's (examples/tinyworld); the problems are easy enough for an untrained
model to solve one now and then; models have one layer and two steps of training. Needs python and llmkit (see
`WarmPrograms`) on PATH.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

from archives import http, members, record

ROOT = Path(__file__).parents[2]
WORDS = "the old ship sailed past a green island while small birds sang over warm grey stones"
RUNS = """
python examples/tinyworld/make.py world/ --quick
mkdir crawl && cp world/crawl-[01].warc.gz crawl/ && cp crawl/crawl-0.warc.gz page.warc.gz
cp world/school.jsonl val.jsonl && cp val.jsonl books.jsonl
cp p.jsonl world/problems.jsonl && cp v.jsonl world/problems-val.jsonl
cp world/blocklist.txt world/chats.jsonl world/tools.jsonl world/prefs.jsonl .
cp world/exam.jsonl questions.jsonl && cp world/questions.jsonl q.jsonl && cp world/prefs.jsonl ours.jsonl
llmkit crawl-filter crawl/ -o docs.jsonl && llmkit crawl-filter crawl/ --only url,extract -o texts.jsonl
jq -r .text docs.jsonl > notes.txt && gzip -k docs.jsonl val.jsonl chats.jsonl && gzip -c prefs.jsonl > hh.jsonl.gz
llmkit crawl-filter --dry-run > loose.toml && cp loose.toml mine.toml
llmkit train-bpe docs.jsonl val.jsonl -o tok/ && mkdir gpt2 && cp tok/tokenizer.json gpt2/
llmkit pretrain docs.jsonl --tokenizer tok/ --save-every 1 -o base/
llmkit sft base/ --data chats.jsonl --lora-rank 4 --keep-adapter -o chat/
llmkit train-reward chat/ --data prefs.jsonl -o judge/
llmkit rl chat/ --data p.jsonl --reward verifier -o policy/
cp -r base base.partial && rm base.partial/{config.json,generation_config.json,model.safetensors,tokenizer*}
rm -r base/state chat/state policy/state
mkdir ours && cp chats.jsonl ours/
mkdir seed1 seed2 demo runs && ln -s ../chat seed1/ && ln -s ../chat seed2/
cp -r tok base demo/ && cp -r tok judge runs/
llmkit sample chat/ --jsonl -n 2 prompts.jsonl -o completions.jsonl && gzip -k prompts.jsonl
llmkit probe-knowledge chat/ --questions q.jsonl --report before.jsonl -o refusals.jsonl && cp before.jsonl after.jsonl
cp -r chat honest && cp before.jsonl probe.jsonl
cp before.jsonl probe-before.jsonl && cp before.jsonl probe-after.jsonl
"""


def write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def make_small_world(folder: Path, environment: dict[str, str]) -> None:
    """Fill `folder`. Raises CalledProcessError if a command fails."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    words = WORDS.split()
    asked = [  # for sft, train-reward and rl
        {"prompt": f"Say {word}", "completion": word, "chosen": f"{word}!", "rejected": "a wall"}
        | {"answer": word, "pattern": "(?s).*[aeiou].*"}
        for word in words
    ]
    for name in ("held-out.jsonl", "prompts.jsonl", "problems.jsonl", "p.jsonl", "v.jsonl"):
        write(folder / name, asked)
    (folder / "eval").mkdir()
    choices = [{"query": "Question: Is it so?", "choices": ["yes", "no"], "gold": 0}] * 2
    lambada = [{"context": "one two", "continuation": "three"}] * 2
    mmlu = [{"subject": "law", "question": "Is it so?", "choices": ["a", "b", "c", "d"], "answer": 0}] * 2
    for name, rows in (("arc_easy", choices), ("piqa", choices), ("lambada_openai", lambada), ("mmlu.test", mmlu)):
        write(folder / "eval" / f"{name}.jsonl", rows)
    write(folder / "arc_easy.jsonl.gz", choices)
    (folder / "eval_bundle" / "eval_data").mkdir(parents=True)
    write(folder / "eval_bundle" / "eval_data" / "words.jsonl", lambada)
    described = (
        "icl_tasks:\n- {label: w, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: language_modeling}\n"
    )
    (folder / "eval_bundle" / "core.yaml").write_text(described)
    (folder / "eval_bundle" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nw,0\n")
    scores = {"models": [{"model": "base/", "tasks": {"piqa": {"score": 0.5, "stderr": 0.1, "metric": "acc"}}}]}
    (folder / "scores.json").write_text(json.dumps(scores))
    write(folder / "eval" / "arc.jsonl", [{"query": "Which gas do plants take in?", "choices": ["air"], "gold": 0}])
    questions = [{"question": f"Who is {word}?", "answers": {"text": [word]}, "id": "1"} for word in words]
    squad = {"data": [{"title": "A", "paragraphs": [{"context": "The ship.", "qas": questions}]}]}
    (folder / "squad.json.gz").write_bytes(gzip.compress(json.dumps(squad).encode()))
    more = "".join(json.dumps({"text": " ".join(words)}) + "\n" for _ in range(9)).encode()
    (folder / "more.jsonl.zst").write_bytes(zstandard.compress(more))
    (folder / "docs.jsonl.zst").write_bytes(zstandard.compress(more))
    (folder / "more").mkdir()
    parquet.write_table(pa.table({"text": [" ".join(words)] * 9}), folder / "more" / "part.parquet")
    parquet.write_table(pa.table({"content": [" ".join(words)] * 9}), folder / "more.parquet")
    page = record(http(f"<html><body><p>{' '.join(words)}.</p></body></html>".encode()), url="https://example.org/page")
    (folder / "crawl.warc.gz").write_bytes(members([page]))
    subprocess.run(
        ["bash", "-euo", "pipefail", "-xc", RUNS], cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL
    )
