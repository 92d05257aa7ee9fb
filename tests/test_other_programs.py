"""Interoperability: transformers, PEFT, Hugging Face datasets and TRL load our files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pipeline
import pytest
import torch
from safetensors.torch import load_file

from llmkit.stages import export
from tests.helpers.jsonl import lines

CAUSAL = ("base", "chat", "lora", "policy", "narrow", "shards")
TOKENS = torch.arange(2, 62).view(2, 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    pipeline.make_models(folder)
    pipeline.make_others(folder)
    chat = str(folder / "chat")
    export.run(export.ExportConfig(model=chat, format="hf", dtype="bfloat16", out=str(folder / "narrow"), quiet=True))
    export.run(
        export.ExportConfig(model=chat, format="hf", max_shard_size=40_000, out=str(folder / "shards"), quiet=True)
    )
    export.run(
        export.ExportConfig(model=str(folder / "lora"), format="adapter", out=str(folder / "adapter"), quiet=True)
    )
    return folder


# ---- transformers


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_transformers_has_our_logits(made: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmkit.model.folder import load_model
    from llmkit.tokenizer.encoding import load_tokenizer

    theirs = AutoModelForCausalLM.from_pretrained(made / kind, dtype=torch.float32).eval()
    ours = load_model(made / kind)
    assert (theirs(TOKENS).logits - ours.logits(ours(TOKENS))).abs().max() < 1e-4
    text = "The old ship's 12 birds, and\n\n \N{GRINNING FACE} so on."
    tokenizer = AutoTokenizer.from_pretrained(made / kind)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == load_tokenizer(made / kind).encode(text)
    assert tokenizer(text)["input_ids"] == load_tokenizer(made / kind).encode_prompt(text)  # begins as in training


@torch.no_grad()
def test_transformers_has_our_scores(made: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from llmkit.reward_model.head import load_reward_model

    theirs, ours = AutoModelForSequenceClassification.from_pretrained(made / "judge"), load_reward_model(made / "judge")
    assert theirs.config.num_labels == 1
    expected = ours.scores(ours(TOKENS)[:, -1])
    assert (theirs(TOKENS).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [*CAUSAL, "judge"])
def test_transformers_continues_training(made: Path, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

    is_judge = kind == "judge"
    model_class = AutoModelForSequenceClassification if is_judge else AutoModelForCausalLM
    model = model_class.from_pretrained(made / kind)
    before = model.model.embed_tokens.weight.detach().clone()
    rows = [
        {"input_ids": row, "labels": torch.tensor(float(place)) if is_judge else row}
        for place, row in enumerate([*TOKENS, *TOKENS])
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    done = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert done.global_step == 2 and 0 < done.training_loss < 20
    assert not torch.equal(model.model.embed_tokens.weight, before)


# ---- PEFT


@torch.no_grad()
def test_peft_puts_the_adapter_on_the_base(made: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(made / "base")
    merged = AutoModelForCausalLM.from_pretrained(made / "lora")
    expected, plain = merged(TOKENS).logits, base(TOKENS).logits
    assert (expected - plain).abs().max() > 1e-3
    for place in (made / "lora" / "adapter", made / "adapter"):
        adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), place)
        assert (adapted(TOKENS).logits - expected).abs().max() < 1e-4
        assert (adapted.merge_and_unload()(TOKENS).logits - expected).abs().max() < 1e-4
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(made / "adapter")  # finds its base
    assert (alone(TOKENS).logits - expected).abs().max() < 1e-4


def test_an_adapter_in_another_precision(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrow"
    summary = export.run(
        export.ExportConfig(model=str(made / "lora"), format="adapter", dtype="bfloat16", out=str(out), quiet=True)
    )
    exact, near = (load_file(place / "adapter_model.safetensors") for place in (made / "adapter", out))
    assert summary is not None and summary.parameters == sum(value.numel() for value in exact.values())
    assert all(torch.equal(near[name], value.bfloat16()) for name, value in exact.items())


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_the_rows_of_tokens_that_a_base_lacks(made: Path, tmp_path: Path, tied: bool) -> None:
    """A base of 257 tokens becomes an assistant of 268: the adapter contains the new rows."""
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    from tiny import make_model, save_folder
    from transformers import AutoModelForCausalLM

    from llmkit.errors import UserError
    from llmkit.stages import sft

    base, grown = save_folder(tmp_path / "base", make_model(tie_word_embeddings=tied)), tmp_path / "grown"
    sft.run(
        sft.SftConfig(
            model=str(base), data=(str(made / "chats.jsonl"),), lora_rank=2, keep_adapter=True, max_steps=3,
            out=str(grown), sequence_length=96, **pipeline.TUNING,
        )
    )  # fmt: skip
    exporting = export.ExportConfig(model=str(grown), format="adapter", out=str(tmp_path / "out"), quiet=True)
    export.run(exporting)
    tokens = torch.tensor([[257, 72, 258, 105, 259]])
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(grown)(tokens).logits
        assert expected.shape[-1] == 268 and (adapted(tokens).logits - expected).abs().max() < 1e-4
        assert (adapted.merge_and_unload()(tokens).logits - expected).abs().max() < 1e-4
    kept = grown / "adapter" / "adapter_config.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "trainable_token_indices": None}))
    with pytest.raises(UserError, match=r"has 268 tokens, its base .* 257, and the adapter lacks the other rows"):
        export.run(replace(exporting, force=True))


# ---- datasets

FILES = (
    "documents.jsonl", "rejects.jsonl", "refusals.jsonl", "probe.jsonl", "completions.jsonl", "scored.jsonl",
    "policy/rollouts.jsonl", "policy/metrics.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_datasets_loads_every_kind_of_jsonl(made: Path, name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    rows = lines(made / name)
    found = datasets.load_dataset("json", data_files=str(made / name), split="train", cache_dir=str(tmp_path))
    assert len(rows) == len(found) > 0
    for expected, row in zip(rows, found, strict=True):
        assert set(expected) <= set(row)
        for key in ("text", "completion", "messages", "question", "reward", "reason", "loss"):
            if key in expected:
                assert row[key] == expected[key]


# ---- TRL


def test_trl_takes_what_we_write_for_its_own_forms(made: Path) -> None:
    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    lesson, rollout = lines(made / "refusals.jsonl")[0], lines(made / "policy" / "rollouts.jsonl")[0]
    assert trl.is_conversational(lesson)
    assert [turn["role"] for turn in lesson["messages"]] == ["user", "assistant"]
    assert {"prompt", "completion"} <= set(rollout) and not trl.is_conversational(rollout)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "chat")
    text = trl.maybe_apply_chat_template({"messages": lesson["messages"]}, tokenizer)["text"]
    question, answer = (turn["content"] for turn in lesson["messages"])
    expected = f"<|im_start|>user<|im_sep|>{question}<|im_end|><|im_start|>assistant<|im_sep|>{answer}<|im_end|>"
    assert text == expected


def calc(calc: str) -> str:
    """Compute an expression.

    Args:
        calc: The expression.
    """
    return f"{calc} is 42"


def test_trl_trains_on_our_template_and_runs_its_calls(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    import torch
    from tiny import certain, save_assistant
    from transformers import AutoTokenizer
    from trl import chat_template_utils as checks

    from llmkit.model.folder import load_model, save_model
    from llmkit.tokenizer.chat import write_chat_tokenizer
    from llmkit.tokenizer.encoding import load_tokenizer

    folder = save_assistant(tmp_path / "chat", "6", context=2048)
    ours = write_chat_tokenizer(load_tokenizer(folder), folder)
    special, (six, said) = ours.specials, ours.encode("6!")
    model = certain(load_model(folder), special["<|im_sep|>"], special["<|calc_start|>"], six, special["<|calc_end|>"])
    with torch.no_grad():  # after the result it generates "!" and ends
        for row, (token, following) in enumerate([(special["<|result_end|>"], said), (said, special["<|im_end|>"])], 9):
            model.embed_tokens[token, row], model.lm_head[following, row] = 1.0, 10.0
    save_model(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert checks.supports_tool_calling(tokenizer) and checks.is_chat_template_prefix_preserving(tokenizer)
    assert checks.is_chat_template_stop_token_trained(tokenizer)
    assert checks.get_training_chat_template(tokenizer) is None  # TRL does not need to patch it
    settings = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    rows = datasets.Dataset.from_list([{"messages": conversation("6?", "42")}] * 2)
    options = trl.SFTConfig(assistant_only_loss=True, **settings)
    trainer = trl.SFTTrainer(model=str(folder), args=options, train_dataset=rows, processing_class=tokenizer)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    assert tokenizer.decode(labels[labels >= 0]) == "42<|im_end|>"
    trainer.train()
    answers: list = []

    def reward(completions, **_) -> list[float]:
        answers.extend(completions)
        return [1.0] * len(completions)

    ends = [special["<|im_end|>"], special["<|calc_end|>"]]
    options = trl.GRPOConfig(
        per_device_train_batch_size=2, num_generations=2, max_completion_length=64, temperature=0.01,
        generation_kwargs={"eos_token_id": ends}, **settings,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": conversation("6?")}] * 2)
    trainer = trl.GRPOTrainer(
        model=str(folder),
        args=options,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
        tools=[calc],
    )
    trainer.train()
    call = {"type": "function", "function": {"name": "calc", "arguments": {"calc": "6"}}}
    assert answers[0] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calc", "content": "6 is 42"},
        {"role": "assistant", "content": "!"},
    ]


def conversation(*turns: str) -> list[dict]:
    return [{"role": role, "content": said} for role, said in zip(("user", "assistant") * 2, turns, strict=False)]


PREFERENCES = {
    "explicit prompt": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "implicit prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "conversational": {
        "prompt": conversation("What is it?"),
        "chosen": [{"role": "assistant", "content": "Blue."}],
        "rejected": [{"role": "assistant", "content": "Green."}],
    },
    "conversational, implicit prompt": {
        "chosen": conversation("What is it?", "Blue."),
        "rejected": conversation("What is it?", "Green."),
    },
}


@pytest.mark.parametrize("form", PREFERENCES)
def test_train_reward_reads_trl_s_forms_as_trl_does(form: str) -> None:
    from llmkit.formats.conversations import as_record
    from llmkit.formats.preferences import Comparison, read_comparison
    from llmkit.io.records import Row

    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    found = read_comparison(Row(PREFERENCES[form], "prefs.jsonl", 1))
    assert isinstance(found, Comparison) and found.ranks == (1, 2)
    theirs = trl.maybe_extract_prompt(dict(PREFERENCES[form]))
    for name, ours in zip(("prompt", "chosen", "rejected"), (found.prompt, *found.candidates), strict=True):
        expected = theirs[name]
        if isinstance(expected, str):
            expected = [{"role": "user" if name == "prompt" else "assistant", "content": expected}]
        assert as_record(ours) == expected
