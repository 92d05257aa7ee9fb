"""The smallest files and folders of every kind that the stages write, for other programs to load."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "the old ship sailed past a green island while small birds sang over warm grey stones and deep blue water"
SIZES = {"depth": 1, "hidden_size": 64, "sequence_length": 128, "batch_tokens": 512, "dtype": "float32"}
TUNING = {"learning_rate": 0.004, "warmup_steps": 2, "quiet": True}


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    words = WORDS.split()
    return [{"text": " ".join(rng.choices(words, k=rng.randint(8, 60))) + "."} for _ in range(count)]


def page(number: int) -> dict:
    """Return a web page that crawl-filter keeps, made of distinct sentences."""
    sentences = [row["text"].capitalize() for row in documents(12, seed=100 + number)]
    body = "".join(
        f"<p>{first} And this is what we saw of it: {second}</p>"
        for first, second in zip(sentences[::2], sentences[1::2], strict=True)
    )
    return {
        "url": f"https://example.org/{number}",
        "html": f"<html><head><title>Page {number}</title></head><body>{body}</body></html>",
    }


def make_models(folder: Path, pretrain_steps: int = 2, sft_steps: int = 2) -> None:
    """Write tok/, base/, chat/ and lora/ (with its adapter) to `folder`."""
    from llmkit.stages import pretrain, sft, train_bpe

    docs = write(folder / "docs.jsonl", documents(200, seed=0))
    chats = [{"prompt": f"What is {word}?", "completion": f"It is {word}."} for word in WORDS.split()]
    chats.append({"messages": [{"role": role, "content": "Hello"} for role in ("system", "user", "assistant")]})
    asked = (write(folder / "chats.jsonl", chats),)
    tok, base = str(folder / "tok"), str(folder / "base")
    train_bpe.run(train_bpe.TrainBpeConfig(inputs=(docs,), vocab_size=384, out=tok, quiet=True))
    pretrain.run(
        pretrain.PretrainConfig(inputs=(docs,), tokenizer=tok, max_steps=pretrain_steps, out=base, quiet=True, **SIZES)
    )
    rows = {"sequence_length": 96, "batch_tokens": 384, "model": base, "data": asked, "max_steps": sft_steps, **TUNING}
    sft.run(sft.SftConfig(out=str(folder / "chat"), **rows))
    sft.run(sft.SftConfig(out=str(folder / "lora"), lora_rank=4, keep_adapter=True, **rows))


def make_others(folder: Path) -> None:
    """Write judge/, policy/ (with rollouts.jsonl), and every kind of JSONL, from `chat/` in `folder`."""
    from llmkit.stages import crawl_filter, probe_knowledge, rl, sample, train_reward

    chat = str(folder / "chat")
    pairs = [{"prompt": f"Say {i}", "chosen": "sea " * (1 + i % 3), "rejected": "wall"} for i in range(40)]
    prefs = write(folder / "prefs.jsonl", pairs)
    problems = write(folder / "problems.jsonl", [{"prompt": f"1+{i}", "answer": str(1 + i)} for i in range(4)])
    questions = write(folder / "questions.jsonl", [{"question": f"Who is {i}?", "answer": "Ada"} for i in range(3)])
    prompts = [{"prompt": "The old", "id": 1}, {"messages": [{"role": "user", "content": "Who?"}], "id": 2}]
    pages = write(folder / "pages.jsonl", [page(number) for number in (0, 1, 2, 3, 0)])
    train_reward.run(
        train_reward.TrainRewardConfig(inputs=(chat,), data=(prefs,), max_steps=2, out=str(folder / "judge"), **TUNING)
    )
    rl.run(
        rl.RlConfig(
            model=chat, data=(problems,), group=4, batch_size=2, max_tokens=6, max_steps=2,
            reward=("format:(?s).*e.*",), out=str(folder / "policy"), **TUNING,
        )
    )  # fmt: skip
    probe_knowledge.run(
        probe_knowledge.ProbeKnowledgeConfig(
            model=chat, questions=(questions,), samples=2, max_tokens=8, report=str(folder / "probe.jsonl"),
            out=str(folder / "refusals.jsonl"), quiet=True,
        )
    )  # fmt: skip
    sample.run(
        sample.SampleConfig(
            model=chat, inputs=(write(folder / "prompts.jsonl", prompts),), jsonl=True, samples=2, max_tokens=8,
            logprobs=True, out=str(folder / "completions.jsonl"), quiet=True,
        )
    )  # fmt: skip
    train_reward.run(
        train_reward.TrainRewardConfig(
            inputs=(str(folder / "completions.jsonl"),), score=str(folder / "judge"), rank=True,
            out=str(folder / "scored.jsonl"), quiet=True,
        )
    )  # fmt: skip
    crawl_filter.run(
        crawl_filter.CrawlFilterConfig(
            inputs=(pages,), workers=1, only=("extract", "exact_duplicates", "near_duplicates"),
            out=str(folder / "documents.jsonl"), rejects=str(folder / "rejects.jsonl"), quiet=True,
        )
    )  # fmt: skip
