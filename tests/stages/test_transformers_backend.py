"""sft and rl as a user runs them, on folders of families that transformers computes."""

import json

import pytest
import torch
import transformers
from foreign_models import save

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.generation.sampler import open_sampler
from llmkit.stages import rl, sft, train_reward
from llmkit.training.trainer import Trainer

CHATS = [("What is the sea?", "Salt water."), ("Who are you?", "A ship.")]
SHORT = {"sequence_length": 96, "batch_tokens": 384, "learning_rate": 0.01, "warmup_steps": 2}
FAMILIES = ("gpt_neox", "falcon_h1")  # of attention, and recurrent beside it


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "base"
    save(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return path


def tuned(base, chats, out, steps, **more):
    options = {"model": str(base), "data": (str(chats),), "out": str(out), "max_steps": steps, "quiet": True}
    return sft.run(sft.SftConfig(**options, **SHORT, **more))


@pytest.fixture(scope="module")
def chat(base, chats, tmp_path_factory):
    """A model that has learnt both conversations by heart."""
    out = tmp_path_factory.mktemp("chat") / "chat"
    assert tuned(base, chats, out, 60).loss < 0.3
    return out


def test_an_assistant_answers_and_stops_here_and_in_transformers(chat):
    with open_sampler(str(chat), Sampling(temperature=0.0)) as sampler:
        request = Request(sampler.encode([message("user", "What is the sea?")]), max_tokens=40)
        ((mine,),) = sampler.complete([request])
    assert (mine.text, mine.finish_reason) == ("Salt water.", "stop")
    model = transformers.AutoModelForCausalLM.from_pretrained(chat)
    ids = torch.tensor([request.prompt])
    answer = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answer.tolist() == mine.token_ids  # its end token is in generation_config.json
    assert (chat / "model.safetensors").stat().st_mode == (chat / "tokenizer.json").stat().st_mode


def test_a_resumed_run_ends_with_the_same_weights(base, chats, tmp_path, monkeypatch):
    tuned(base, chats, tmp_path / "whole", 6)
    step = Trainer.train_step

    def cut(trainer, batch):
        if trainer.step == 3:
            raise UserError("cut")
        return step(trainer, batch)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="saved after step 3"):
        patched.setattr(Trainer, "train_step", cut)
        tuned(base, chats, tmp_path / "cut", 6)
    tuned(base, chats, tmp_path / "cut", 6, resume=True)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert contents[0] == contents[1]


def test_rl_trains_on_the_tokens_that_were_sampled(chat, tmp_path):
    problems, reward = tmp_path / "problems.jsonl", tmp_path / "reward.py"
    problems.write_text('{"prompt": "Who are you?", "answer": "A ship."}\n{"prompt": "The sea?", "answer": "A"}\n')
    reward.write_text("def score(record):\n    return float(len(record['completion']))\n")
    options = {"max_steps": 2, "group": 4, "batch_size": 2, "max_tokens": 12, "temperature": 1.5, "kl_coef": 0.01}
    out = tmp_path / "policy"
    config = rl.RlConfig(
        model=str(chat), data=(str(problems),), reward=(f"py:{reward}:score",), out=str(out), quiet=True, **options
    )
    rl.run(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    differences = [row["logprob_difference_max"] for row in rows if "logprob_difference_max" in row]
    assert len(differences) == 2 and max(differences) < 1e-3
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.model_type in FAMILIES


def test_what_is_ours_alone_is_refused_by_name(base, chats, tmp_path):
    with pytest.raises(UserError, match="--quantize nf4: expected one of llama"):
        tuned(base, chats, tmp_path / "out", 1, lora_rank=4, quantize="nf4")
    with pytest.raises(UserError, match="--lora-rank: expected a native family, found"):
        tuned(base, chats, tmp_path / "out", 1, lora_rank=4)
    comparisons = tmp_path / "comparisons.jsonl"
    comparisons.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 8)
    with pytest.raises(UserError, match="train-reward: expected one of llama"):
        train_reward.run(
            train_reward.TrainRewardConfig(inputs=(str(base),), data=(str(comparisons),), out=str(tmp_path / "judge"))
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparisons.jsonl"]
