"""Every stage accepts folders written by transformers: any family, sharded or not, tied or not, in half precision."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pipeline
import pytest
import torch
import transformers
from foreign_templates import TEMPLATES
from foreign_templates import save as save_with_template
from safetensors.torch import load_file, save_file
from served import serving
from tiny import make_model, save_assistant

from llmkit.errors import UserError
from llmkit.model.folder import load_model, save_model
from llmkit.stages import export, pretrain, probe_knowledge, report, rl, sample, sft, train_reward
from llmkit.tokenizer.encoding import load_tokenizer

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 319, "eos_token_id": 319,
    "pad_token_id": 319, "query_pre_attn_scalar": 16,
}  # fmt: skip
# name: (family, tied, precision, shard size, stored name of the tied matrix)
FOLDERS = {
    "llama, tied, bfloat16, shards": ("Llama", True, torch.bfloat16, "40KB", None),
    "mistral, float16": ("Mistral", False, torch.float16, None, None),
    "qwen2, tied, stored as lm_head": ("Qwen2", True, torch.float32, None, "lm_head.weight"),
    "qwen3, bfloat16, shards": ("Qwen3", False, torch.bfloat16, "40KB", None),
    "gemma2, tied": ("Gemma2", True, torch.float32, None, None),
    "gemma3, tied": ("Gemma3Text", True, torch.float32, None, None),
    "gpt2, tied": ("GPT2", True, torch.float32, None, None),
    "granite": ("Granite", False, torch.float32, None, None),
    "olmo3, shards": ("Olmo3", False, torch.float32, "40KB", None),
    "phi3, bfloat16": ("Phi3", False, torch.bfloat16, None, None),
    "smollm3, tied": ("SmolLM3", True, torch.float32, None, None),
}
RUN = {"quiet": True, "force": True}


def save_foreign(folder: Path, name: str) -> Path:
    """Save a random model and a byte-level tokenizer with transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    family, tied, dtype, shard, stored = FOLDERS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=319, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([pipeline.WORDS] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=320, tie_word_embeddings=tied, **SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard or "5GB")
    assert (len(list(folder.glob("model*.safetensors"))) > 1) == (shard is not None)
    if stored is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors[stored] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=FOLDERS)
def foreign(request, tmp_path_factory) -> Path:
    return save_foreign(tmp_path_factory.mktemp("foreign") / "model", request.param)


@pytest.fixture(scope="module")
def chat(foreign) -> Path:
    """The folder after sft."""
    data = pipeline.write(foreign.parent / "chats.jsonl", [{"prompt": "Who?", "completion": "Ada."}] * 4)
    out = foreign.parent / "chat"
    sft.run(sft.SftConfig(model=str(foreign), data=(data,), out=str(out), max_steps=1, batch_tokens=128, **RUN))
    return out


def their_greedy(folder: Path, count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("The old ship", return_tensors="pt")
    ids = model.generate(**asked, do_sample=False, max_new_tokens=count, pad_token_id=319)
    return ids[0, asked["input_ids"].shape[1] :].tolist()


def test_sample_says_what_transformers_says(foreign: Path) -> None:
    out = foreign.parent / "said.jsonl"
    prompts = pipeline.write(foreign.parent / "prompts.jsonl", [{"prompt": "The old ship"}])
    options = {"jsonl": True, "temperature": 0.0, "max_tokens": 12, "dtype": "float32"}
    sample.run(sample.SampleConfig(model=str(foreign), inputs=(prompts,), out=str(out), **options, **RUN))
    assert json.loads(out.read_text())["token_ids"] == their_greedy(foreign, 12)


def test_sft_trains_it_and_keeps_its_family(foreign: Path, chat: Path) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (foreign, chat))
    assert after["model_type"] == before["model_type"]
    assert after["tie_word_embeddings"] == before["tie_word_embeddings"]
    assert after["vocab_size"] == 384  # with the chat tokens, padded to a multiple of 64
    transformers.AutoModelForCausalLM.from_pretrained(chat)


@pytest.mark.parametrize("ends_turns", [False, True])
def test_an_adapter_has_the_rows_that_a_template_needs_where_the_base_ends_no_turns(tmp_path, ends_turns):
    """Like stock base models with a chat template: <|im_end|> is in the tokenizer, but the base ends with <|end|>."""
    base = save_with_template(tmp_path / "base", TEMPLATES["chatml"])
    tokenizer = load_tokenizer(base)
    start, end, text = (tokenizer.specials[name] for name in ("<|im_start|>", "<|im_end|>", "<|end|>"))
    ends = (end, text) if ends_turns else text
    save_model(make_model(vocab_size=tokenizer.vocab_size, bos_token_id=text, eos_token_id=ends), base)
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"prompt": "Who?", "completion": "A ship."}) + "\n")
    out = str(tmp_path / "chat")
    details = {"lora_rank": 2, "keep_adapter": True, "max_steps": 2, "sequence_length": 96, **pipeline.TUNING}
    sft.run(sft.SftConfig(model=str(base), data=(str(data),), out=out, **details))
    rows = json.loads((tmp_path / "chat/adapter/adapter_config.json").read_text()).get("trainable_token_indices")
    assert rows == (None if ends_turns else {"embed_tokens": [start, end], "lm_head": [start, end]})


def test_train_reward_and_rl_train_it(foreign: Path) -> None:
    place = foreign.parent
    prefs = pipeline.write(
        place / "p.jsonl", [{"prompt": f"Say {i}", "chosen": "sea", "rejected": "hut"} for i in range(12)]
    )
    train = train_reward.TrainRewardConfig(
        inputs=(str(foreign),), data=(prefs,), max_steps=1, batch_size=4, out=str(place / "judge"), **RUN
    )
    assert train_reward.run(train) is not None
    if "granite" not in json.loads((place / "judge/config.json").read_text())["model_type"]:  # no such class
        transformers.AutoModelForSequenceClassification.from_pretrained(place / "judge")
    problems = pipeline.write(place / "problems.jsonl", [{"prompt": f"The {i}", "answer": "1"} for i in range(4)])
    config = rl.RlConfig(
        model=str(foreign), data=(problems,), reward=("format:(?s).*e.*",), group=8, batch_size=2, max_tokens=8,
        max_steps=1, out=str(place / "policy"), **RUN,
    )  # fmt: skip
    assert rl.run(config) is not None
    transformers.AutoModelForCausalLM.from_pretrained(place / "policy")


# ---- folders with a chat template: every stage uses it, with the same tokens as `apply_chat_template`


@pytest.fixture(params=("chatml", "llama2", "llama3"))
def templated(request, tmp_path) -> Path:
    folder = save_with_template(tmp_path / "model", TEMPLATES[request.param])
    ids = load_tokenizer(folder).specials
    ends = (ids["<|end|>"], ids["<|im_end|>"])
    save_model(make_model(vocab_size=320, bos_token_id=ends[0], eos_token_id=ends, spread=2.0), folder)
    return folder


def their_answer(folder: Path, question: str, count: int) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**asked, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_probe_knowledge_asks_by_its_template(templated: Path) -> None:
    place, report = templated.parent, templated.parent / "report.jsonl"
    questions = pipeline.write(place / "q.jsonl", [{"question": "What is it?", "answer": "Ada"}])
    options = {"samples": 1, "temperature": 0.0, "max_tokens": 12, "report": str(report), "out": str(place / "r.jsonl")}
    options |= {"model": str(templated), "questions": (questions,), "dtype": "float32", **RUN}
    expected = their_answer(templated, "What is it?", 12).strip()
    probe_knowledge.run(probe_knowledge.ProbeKnowledgeConfig(**options))
    assert json.loads(report.read_text())["responses"] == [expected]
    with serving(templated) as server:
        probe_knowledge.run(probe_knowledge.ProbeKnowledgeConfig(engine=server.spec, **options))
    assert json.loads(report.read_text())["responses"] == [expected]
    with pytest.raises(UserError, match=r"no verdict of .* could be read"):  # it answers at random
        probe_knowledge.run(probe_knowledge.ProbeKnowledgeConfig(judge=str(templated), **options))


def test_a_judge_reads_by_its_template_and_rewards_its_policy(templated: Path) -> None:
    place, judge = templated.parent, templated.parent / "judge"
    pairs = [{"prompt": f"Is {i} it?", "chosen": "Yes, it is." * (1 + i % 3), "rejected": " \n no"} for i in range(12)]
    train = train_reward.TrainRewardConfig(
        inputs=(str(templated),), data=(pipeline.write(place / "p.jsonl", pairs),), max_steps=2, batch_size=4,
        dtype="float32", out=str(judge), **RUN,
    )  # fmt: skip
    assert train_reward.run(train) is not None
    rows = [{"prompt": one["prompt"], "completion": one[side]} for one in pairs for side in ("chosen", "rejected")]
    score = train_reward.TrainRewardConfig(
        score=str(judge), inputs=(pipeline.write(place / "c.jsonl", rows),), out=str(place / "scored.jsonl"), **RUN
    )
    assert train_reward.run(score) is not None
    rewards = [json.loads(line)["reward"] for line in (place / "scored.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    said = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    batch = tokenizer.apply_chat_template(said, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert rewards == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    problems = pipeline.write(place / "problems.jsonl", [{"prompt": f"Is {i} it?", "answer": "1"} for i in range(4)])
    config = rl.RlConfig(
        model=str(templated), data=(problems,), reward=(f"rm:{judge}",), group=4, batch_size=2, max_tokens=8,
        max_steps=1, dtype="float32", out=str(place / "policy"), **RUN,
    )  # fmt: skip
    assert rl.run(config) is not None


def test_export_writes_it_in_every_form(foreign: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    out, file = foreign.parent / "wide", foreign.parent / "model.gguf"
    export.run(export.ExportConfig(model=str(foreign), format="hf", dtype="float32", out=str(out), **RUN))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = load_model(foreign)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert (theirs(ids).logits - ours.logits(ours(ids))).abs().max() < 1e-3
    assert their_greedy(out, 12) == their_greedy(foreign, 12)
    export.run(export.ExportConfig(model=str(foreign), format="gguf", out=str(file), **RUN))
    reader = gguf.GGUFReader(file)
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tied = json.loads((foreign / "config.json").read_text())["tie_word_embeddings"]
    assert ("output.weight" in {one.name for one in reader.tensors}) != tied


def test_the_documented_conversion_of_pickles_works(tmp_path: Path) -> None:
    folder = save_foreign(tmp_path / "model", "mistral, float16")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as raised:
        load_model(folder)
    command = re.search(r"python -c \".*\"", str(raised.value))
    assert command is not None
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command[0]], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    converted = load_file(tmp_path / "NEW_FOLDER" / "model.safetensors")
    assert {name: value.float().sum() for name, value in converted.items()} == {
        name: value.float().sum() for name, value in tensors.items()
    }
    load_model(tmp_path / "NEW_FOLDER")
    sample.run(
        sample.SampleConfig(model=str(tmp_path / "NEW_FOLDER"), prompt="The", max_tokens=2, out=str(tmp_path / "said"))
    )


def test_the_folder_of_an_adapter_is_reported_by_every_command(tmp_path):
    """Next to the model that it is merged into, and alone, as written by `export --format adapter` and PEFT."""
    chat = save_assistant(tmp_path / "chat", "4")
    data = str(tmp_path / "d.jsonl")
    Path(data).write_text('{"prompt": "2 + 2?", "answer": "4", "completion": "4", "text": "Four."}\n')
    for place in (chat / "adapter", tmp_path / "alone"):
        place.mkdir()
        (place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (place / "tokenizer.json").write_bytes((chat / "tokenizer.json").read_bytes())
        way = "use the merged model, .*chat" if place.parent == chat else "--keep-adapter"
        adapter, out = str(place), str(tmp_path / "out")
        for run, config in (
            (sample.run, sample.SampleConfig(model=adapter, prompt="x", out=out)),
            (export.run, export.ExportConfig(model=adapter, format="gguf", out=f"{out}.gguf")),
            (export.run, export.ExportConfig(model=adapter, format="adapter", out=out)),
            (report.run, report.ReportConfig(runs=(adapter,), out=f"{out}.html")),
            (rl.run, rl.RlConfig(model=adapter, data=(data,), out=out)),
            (sft.run, sft.SftConfig(model=adapter, data=(data,), out=out)),
            (pretrain.run, pretrain.PretrainConfig(model=adapter, inputs=(data,), out=out)),
        ):
            with pytest.raises(UserError, match=f"(adapter|alone): expected a complete model, found an adapter.*{way}"):
                run(config)
