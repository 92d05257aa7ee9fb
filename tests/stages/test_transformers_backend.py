"""sft and rl as a user runs them, on models that run through transformers."""

import json

import peft
import pytest
import torch
import transformers
from foreign_models import save
from served import served

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.generation.sampler import open_sampler
from llmkit.reward_model.head import load_reward_model
from llmkit.stages import export, rl, sft, train_reward
from llmkit.training.trainer import Trainer

CHATS = [("What is the sea?", "Salt water."), ("Who are you?", "A ship.")]
SHORT = {"sequence_length": 96, "batch_tokens": 384, "learning_rate": 0.01, "warmup_steps": 2}
FAMILIES = ("gpt_neox", "falcon_h1")  # attention only; attention and recurrence


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
    return sft.run(sft.SftConfig(**(options | SHORT | more)))


@pytest.fixture(scope="module")
def chat(base, chats, tmp_path_factory):
    """A model that has memorized both conversations."""
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


def test_a_server_of_it_is_found_after_its_notice(base):
    with served(base) as server:
        status, content = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "model": base.name})
        assert status == 200, content


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_rl_trains_on_the_tokens_that_were_sampled(lora_rank, chat, tmp_path):
    problems, reward = tmp_path / "problems.jsonl", tmp_path / "reward.py"
    problems.write_text('{"prompt": "Who are you?", "answer": "A ship."}\n{"prompt": "The sea?", "answer": "A"}\n')
    reward.write_text("def score(record):\n    return float(len(record['completion']))\n")
    options = {"max_steps": 2, "group": 4, "batch_size": 2, "max_tokens": 12, "temperature": 1.5, "kl_coef": 0.01}
    options["lora_rank"] = lora_rank
    out = tmp_path / "policy"
    config = rl.RlConfig(
        model=str(chat), data=(str(problems),), reward=(f"py:{reward}:score",), out=str(out), quiet=True, **options
    )
    rl.run(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    differences = [row["logprob_difference_max"] for row in rows if "logprob_difference_max" in row]
    assert len(differences) == 2 and max(differences) < 1e-3
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.model_type in FAMILIES


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_trained_merged_and_read_by_peft(tied, chats, tmp_path):
    model = save("gpt_neox", tmp_path / "base", tie_word_embeddings=tied)
    lora = {"lora_rank": 4, "keep_adapter": True, "learning_rate": 0.03}
    assert tuned(tmp_path / "base", chats, tmp_path / "chat", 40, **lora).loss < 1.5
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    rows = merged.get_input_embeddings().weight
    assert (rows is merged.get_output_embeddings().weight) is tied
    assert torch.equal(rows[:200], model.get_input_embeddings().weight[:200])
    model.resize_token_embeddings(len(rows))
    out = tmp_path / "adapter"
    export.run(export.ExportConfig(model=str(tmp_path / "chat"), format="adapter", out=str(out), quiet=True))
    adapted = peft.PeftModel.from_pretrained(model, out)
    ids = torch.arange(40)[None]
    assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_reward_model_scores_as_in_transformers(lora_rank, tmp_path):
    save("gpt_neox", tmp_path / "base")
    rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"learning_rate": 0.01, "max_steps": 12, "batch_size": 8, "ensemble": 2, "lora_rank": lora_rank}
    judge = tmp_path / "judge"
    config = train_reward.TrainRewardConfig(
        inputs=(str(tmp_path / "base"),), data=(str(tmp_path / "pairs.jsonl"),), out=str(judge), quiet=True, **options
    )
    assert train_reward.run(config).val_accuracy > 0.9
    ours = load_reward_model(judge)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (ours.scores(ours(ids)[:, -1]) - theirs(ids).logits).abs().max() < 1e-4
    assert theirs.config.id2label == {0: "reward_0", 1: "reward_1"}


def test_unsupported_features_are_refused_by_name(base, chats, tmp_path):
    with pytest.raises(UserError, match=r"--quantize nf4: expected a family that .* computes itself.* --quantize$"):
        tuned(base, chats, tmp_path / "out", 1, lora_rank=4, quantize="nf4")
    with pytest.raises(UserError, match="--lora-rank: expected at most"):
        tuned(base, chats, tmp_path / "out", 1, lora_rank=400)
    save("mamba", tmp_path / "mamba")
    with pytest.raises(UserError, match="'mamba': expected a family with a reward model"):
        train_reward.run(train_reward.TrainRewardConfig(inputs=(str(tmp_path / "mamba"),), out=str(tmp_path / "judge")))
    assert [path.name for path in tmp_path.iterdir()] == ["mamba"]
