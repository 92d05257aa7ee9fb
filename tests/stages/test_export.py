"""`llmkit export` as a user runs it: files that gguf and transformers read back, and refusals in one line.

test_export_llama_cpp.py runs the files with llama.cpp.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from exportable import FAMILIES, save_assistant
from safetensors.torch import load_file, save_file
from tiny import save_folder

from llmkit.errors import UserError
from llmkit.export.gguf_file import ARCHITECTURES
from llmkit.model.config import RopeScaling
from llmkit.model.folder import load_model, save_model
from llmkit.model.weights import embedding_name, stock_tensors
from llmkit.stages import export
from llmkit.stages.export import ExportConfig
from llmkit.tokenizer.encoding import load_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf.quants import dequantize  # noqa: E402


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    return save_assistant(tmp_path_factory.mktemp("chat") / "chat")


def written(model: Path, out: Path, **options):
    """Export a folder to GGUF and return its reader."""
    assert export.run(ExportConfig(model=str(model), format="gguf", out=str(out), quiet=True, **options)) is not None
    return gguf.GGUFReader(out)


def keys(reader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items()}


def values(reader) -> dict[str, torch.Tensor]:
    return {one.name: torch.tensor(np.array(dequantize(one.data, one.tensor_type))) for one in reader.tensors}


def refused(model: Path, out: Path, **options) -> str:
    """Check that an export fails without leaving anything; return the message."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(UserError) as raised:
        export.run(ExportConfig(model=str(model), out=str(out), quiet=True, **{"format": "gguf", **options}))
    assert sorted(os.listdir(out.parent)) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---- gguf: the model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_has_every_tensor_of_its_family(tmp_path: Path, name: str) -> None:
    folder = save_assistant(tmp_path / "chat", **FAMILIES[name])
    reader = written(folder, tmp_path / "chat.gguf")
    config, found = load_model(folder).config, values(reader)
    family = ARCHITECTURES[config.model_type].name
    stated = keys(reader)
    assert stated["general.architecture"] == family
    sizes = {
        "embedding_length": 64, "block_count": config.num_hidden_layers, "feed_forward_length": 160,
        "context_length": 512, "vocab_size": 384, "attention.head_count": 4,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": config.head_dim,
    }  # fmt: skip
    if not config.learned_positions:
        sizes |= {"rope.dimension_count": config.rotary_dim or config.head_dim, "rope.freq_base": config.rope_theta}
    assert {key: stated[f"{family}.{key}"] for key in sizes} == sizes
    epsilon = "layer_norm_epsilon" if config.layer_norm else "layer_norm_rms_epsilon"
    assert stated[f"{family}.attention.{epsilon}"] == pytest.approx(1e-6)
    stock = load_file(folder / "model.safetensors")
    made = {name for name in found if name.startswith("rope_")} | ({"output.weight"} if name == "olmo2-tied" else set())
    assert (
        len(found) == len(stock) + len(made) and ("output.weight" in found.keys() - made) != config.tie_word_embeddings
    )
    assert torch.equal(found["token_embd.weight"], stock[embedding_name(config)])
    query = stock.get("model.layers.1.self_attn.q_proj.weight")
    if query is not None:
        if ARCHITECTURES[config.model_type].neighbours:  # llama.cpp's own `permute`
            query = query.view(4, 2, config.head_dim // 2, 64).transpose(1, 2).reshape(query.shape)
        assert torch.equal(found["blk.1.attn_q.weight"], query)
    down = next(one for one in stock_tensors(config) if (one.layer, one.attribute) == (1, "down"))
    expected = stock[down.name].T if down.transposed else stock[down.name]
    assert torch.equal(found["blk.1.ffn_down.weight"], expected)
    if family == "gemma3":
        assert torch.equal(found["output_norm.weight"], stock["model.norm.weight"] + 1)


@pytest.mark.parametrize(
    ("dtype", "kind", "off"), [("bfloat16", "BF16", 2**-8), ("float16", "F16", 2**-11), ("q8_0", "Q8_0", 1 / 127)]
)
def test_matrices_are_narrowed_and_vectors_are_not(
    chat: Path, tmp_path: Path, dtype: str, kind: str, off: float
) -> None:
    reader = written(chat, tmp_path / "chat.gguf", dtype=dtype)
    kinds = {one.name: one.tensor_type.name for one in reader.tensors}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert {kinds[name] for name in kinds if "norm" not in name} == {kind}
    assert keys(reader)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    exact = load_file(chat / "model.safetensors")["model.embed_tokens.weight"]
    near = values(reader)["token_embd.weight"]
    assert 0 < (near - exact).abs().max() <= off * exact.abs().max()
    folder = save_assistant(tmp_path / "odd", intermediate_size=168)  # rows that q8_0 cannot divide become float16
    save_model(load_model(folder), folder, dtype=torch.bfloat16)
    kinds = {one.name: one.tensor_type.name for one in written(folder, tmp_path / "odd.gguf", dtype=dtype).tensors}
    assert (
        kinds["blk.0.ffn_down.weight"] == ("F16" if kind == "Q8_0" else kind) and kinds["blk.0.ffn_up.weight"] == kind
    )
    auto = keys(written(folder, tmp_path / "auto.gguf"))  # keeps the precision of the folder
    assert auto["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_scaled_frequencies_and_windows(tmp_path: Path, capsys) -> None:
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    folder = save_assistant(tmp_path / "llama3", **FAMILIES["llama"], rope_scaling=llama3)
    factors = values(written(folder, tmp_path / "llama3.gguf"))["rope_freqs.weight"]
    assert factors[0] == 1 and factors[-1] == 8 and (factors.diff() >= 0).all()
    folder = save_assistant(tmp_path / "linear", rope_scaling=RopeScaling("linear", 4.0))
    stated = keys(written(folder, tmp_path / "linear.gguf"))
    assert (stated["qwen3.rope.scaling.type"], stated["qwen3.rope.scaling.factor"]) == ("linear", 4.0)
    yarn = RopeScaling("yarn", 4.0, original_max_position_embeddings=128, attention_factor=0.1 * math.log(4.0) + 1.0)
    stated = keys(written(save_assistant(tmp_path / "yarn", rope_scaling=yarn), tmp_path / "yarn.gguf"))
    found = [stated[f"qwen3.rope.scaling.{key}"] for key in ("type", "factor", "original_context_length")]
    assert found == ["yarn", 4.0, 128] and abs(stated["qwen3.rope.scaling.attn_factor"] - 1) < 1e-6
    folder = save_assistant(tmp_path / "window", **FAMILIES["mistral"], layer_windows=(128, 128))
    assert keys(written(folder, tmp_path / "window.gguf"))["llama.context_length"] == 128
    assert "the context is reduced from 512 to 128 tokens, the sliding window" in capsys.readouterr().err


# ---- gguf: the tokenizer


def test_the_vocabulary_says_what_every_token_is(chat: Path, tmp_path: Path) -> None:
    stated, tokenizer = keys(written(chat, tmp_path / "chat.gguf")), load_tokenizer(chat)
    spec = tokenizer.content
    tokens, types = stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"]
    assert tokens == [tokenizer._reference.tokenizer.id_to_token(i) for i in range(384)]
    assert {i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == set(tokenizer.specials.values())
    assert stated["tokenizer.ggml.model"] == "gpt2" and stated["tokenizer.ggml.pre"] == "qwen2"
    assert stated["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    ids = {name: stated[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")}
    end, turn = tokenizer.specials["<|endoftext|>"], tokenizer.specials["<|im_end|>"]
    assert ids == {"bos": end, "eos": end, "eot": turn, "padding": end}
    assert not stated["tokenizer.ggml.add_bos_token"]  # conversations do not begin with it
    base = keys(written(save_assistant(tmp_path / "base", "llama3", assistant=False), tmp_path / "base.gguf"))
    assert base["tokenizer.ggml.add_bos_token"] is True and base["tokenizer.ggml.pre"] == "smaug-bpe"
    assert "tokenizer.chat_template" not in base and "tokenizer.ggml.eot_token_id" not in base
    folder = save_assistant(tmp_path / "ends", "gpt2")  # an end token named only in the tokenizer's configuration
    end, turn = (load_tokenizer(folder).specials[name] for name in ("<|endoftext|>", "<|im_end|>"))
    for name, value in (("config.json", end), ("tokenizer_config.json", "<|im_end|>")):
        key = "eos_token_id" if name == "config.json" else "eos_token"
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), key: value}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    stated = keys(written(folder, tmp_path / "ends.gguf"))
    assert [stated[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot")] == [turn, end]
    assert stated["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize("writes", [True, False])
def test_conversations_of_a_third_party_template_begin_as_in_training(tmp_path: Path, chat: Path, writes: bool) -> None:
    """llama.cpp prepends the beginning token to a conversation if its template does not write it."""
    from llmkit.formats.conversations import message
    from llmkit.tokenizer.templates import chat_format

    folder = tmp_path / "chat"
    shutil.copytree(chat, folder)
    turn = "{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}"
    template = "{{ bos_token }}" * writes + "{% for m in messages %}" + turn + "{% endfor %}"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    details = json.loads((folder / "tokenizer_config.json").read_text())
    details |= {"chat_template": template, "add_bos_token": True, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(details))
    tokenizer = load_tokenizer(folder)
    first = chat_format(tokenizer).encode([message("user", "Hello")], prompt=True).token_ids[0]
    assert tokenizer.add_bos and (first == tokenizer.bos_id) == writes
    stated = keys(written(folder, tmp_path / "chat.gguf"))
    assert stated["tokenizer.ggml.add_bos_token"] is writes and stated["tokenizer.chat_template"] == template


def test_the_chat_template_needs_no_extension_and_renders_the_same(chat: Path, tmp_path: Path) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers import AutoTokenizer

    template = keys(written(chat, tmp_path / "chat.gguf"))["tokenizer.chat_template"]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    call = {"function": {"name": "calc", "arguments": {"expression": "2+2"}}}
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": " So:", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "\nFour. "},
        {"role": "user", "content": [{"type": "text", "text": "And 3+3?"}]},
    ]
    theirs = AutoTokenizer.from_pretrained(chat)
    for count in (1, 2, 3, 4, 5, 6):
        for asked in (False, True):
            expected = theirs.apply_chat_template(messages[:count], add_generation_prompt=asked, tokenize=False)
            assert plain.render(messages=messages[:count], add_generation_prompt=asked) == expected


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def step(content: dict, number: int) -> dict:
    return content["pre_tokenizer"]["pretokenizers"][number]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: step(t, 0).update(pattern={"Regex": r"\w+|\W+"}), "expected a pre-tokenizer that llama.cpp"),
        (lambda t: step(t, 0).update(invert=True), "expected a pre-tokenizer that llama.cpp"),
        (lambda t: step(t, 1).update(add_prefix_space=True), "add_prefix_space"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges with the pattern qwen2"),
        (lambda t: t["model"].update(merges=[]), "expected a tokenizer with merges"),
        (lambda t: t["model"].update(byte_fallback=True), "prepared as by Llama's SentencePiece"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(tmp_path: Path, change, words: str) -> None:
    folder = save_assistant(tmp_path / "chat")
    edit(folder / "tokenizer.json", change)
    message = refused(folder, tmp_path / "m.gguf")
    assert words in message and message.startswith(f"{folder}/tokenizer.json: ")


# ---- hf


def logits(folder: Path, **details) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **details).eval()(torch.arange(40)[None]).logits.float()


@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.06), ("float16", 0.008), ("float32", 0.0)])
def test_a_folder_in_another_precision_and_in_shards(chat: Path, tmp_path: Path, dtype: str, off: float) -> None:
    out = tmp_path / "out"
    options = {"model": str(chat), "format": "hf", "dtype": dtype, "max_shard_size": 50_000, "out": str(out)}
    summary = export.run(ExportConfig(quiet=True, **options))
    assert summary is not None and summary.path == str(out) and summary.dtype == dtype
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    stored = {str(value.dtype) for shard in shards for value in load_file(out / shard).values()}
    assert stored == {f"torch.{dtype}"} and json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    expected = logits(chat)
    found = logits(out, dtype=torch.float32)
    assert (found - expected).abs().max() <= off * expected.abs().max()
    assert load_tokenizer(out).chat_template == load_tokenizer(chat).chat_template
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "export" and manifest["parents"][0]["path"] == str(chat)
    assert (out / "README.md").exists()


@pytest.mark.parametrize("options", [{"format": "hf", "dtype": "bfloat16"}, {"format": "hf"}])
def test_templates_and_terms_of_use_go_with_a_folder(chat: Path, tmp_path: Path, options: dict) -> None:
    from transformers import AutoTokenizer

    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(chat, source)
    theirs = AutoTokenizer.from_pretrained(source)
    theirs.chat_template = {"default": theirs.chat_template, "rag": "{{ 'rag' }}", "tool_use": "{{ 'tool' }}"}
    theirs.save_pretrained(source)
    terms = ("LICENSE", "LICENSE-MODEL.md", "Notice.txt", "USE_POLICY.md", "LICENCE")
    for name in terms:
        (source / name).write_text(name)
    (source / "licensed.py").write_text("no")
    export.run(export.ExportConfig(model=str(source), out=str(out), quiet=True, **options))
    found = AutoTokenizer.from_pretrained(out)
    assert [found.get_chat_template(name) for name in ("rag", "tool_use")] == ["{{ 'rag' }}", "{{ 'tool' }}"]
    assert found.get_chat_template(None) == theirs.get_chat_template(None)
    assert all((out / name).read_text() == name for name in terms) and not (out / "licensed.py").exists()
    assert found("a").input_ids == load_tokenizer(chat).encode_prompt("a")


def test_a_folder_of_transformers_4_says_its_rotation_in_both_forms(chat: Path, tmp_path: Path) -> None:
    older, out = tmp_path / "older", tmp_path / "out"
    shutil.copytree(chat, older)
    edit(older / "config.json", lambda config: config.pop("rope_parameters"))
    export.run(ExportConfig(model=str(older), format="hf", out=str(out), quiet=True))
    assert json.loads((out / "config.json").read_text()) == json.loads((chat / "config.json").read_text())
    assert torch.equal(logits(out), logits(chat))


def test_a_folder_without_a_tokenizer_stays_one_and_it_is_said(chat: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(chat, tmp_path / "words-less")
    (tmp_path / "words-less" / "tokenizer.json").unlink()
    export.run(ExportConfig(model=str(tmp_path / "words-less"), format="hf", out=str(tmp_path / "out")))
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_number_beyond_float16_is_refused(tmp_path: Path) -> None:
    folder = save_assistant(tmp_path / "chat")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for form in ("hf", "gguf"):
        message = refused(folder, tmp_path / "out", format=form, dtype="float16")
        assert "1e+05 is beyond float16's 6.55e+04; use --dtype bfloat16" in message


# ---- the command


def test_one_line_on_stdout_and_the_output_whole(chat: Path, tmp_path: Path, llmkit, capsys) -> None:
    out = tmp_path / "chat.gguf"
    done = llmkit("export", chat, "--format", "gguf", "--dtype", "q8_0", "-o", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["path"], found["format"], found["dtype"]) == (str(out), "gguf", "q8_0")
    assert found["bytes"] == out.stat().st_size and found["files"] == 1
    assert json.loads((tmp_path / "chat.gguf.manifest.json").read_text())["stage"] == "export"
    assert sorted(os.listdir(tmp_path)) == ["chat.gguf", "chat.gguf.manifest.json"]
    assert "already exists" in refused(chat, out)
    for form in ("gguf", "hf"):
        dry = ExportConfig(model=str(chat), format=form, dtype="bfloat16", out=str(tmp_path / "dry"), dry_run=True)
        assert export.run(dry) is None and "parameters of qwen3, float32; to " in capsys.readouterr().err
    assert not (tmp_path / "dry").exists()
    with pytest.raises(UserError, match="already exists"):
        export.run(ExportConfig(model=str(chat), format="gguf", out=str(out), dry_run=True))
    assert export.run(ExportConfig(model=str(chat), format="gguf", out=str(out), force=True, quiet=True)) is not None


@pytest.mark.parametrize("dtype", ["auto", "q8_0"])
def test_a_full_disk_is_one_line_and_leaves_nothing(chat: Path, tmp_path: Path, dtype: str, monkeypatch) -> None:
    import errno
    import resource

    size = written(chat, tmp_path / "whole.gguf", dtype=dtype).data.size
    (tmp_path / "out").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (10, 1000, 9000, size // 2, size - 100, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # simulates a full disk
        try:
            said = refused(chat, tmp_path / "out" / "chat.gguf", dtype=dtype)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert said == f"{tmp_path}/out/chat.gguf: no space left on disk; free some and run it again"

    def full(*arguments, **details):
        raise UserError("chat.gguf.manifest.json: no space left on disk") from OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(export, "write_manifest", full)
    assert "manifest.json: no space" in refused(chat, tmp_path / "out" / "chat.gguf", dtype=dtype)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": None}, "--format is required: one of gguf, hf, adapter"),
        ({"out": None}, "--out is required: the file for the result, such as -o chat.gguf"),
        ({"out": "-"}, "--out is required"),
        ({"format": "hf", "out": None}, "--out is required: the output folder, such as -o chat-bf16/"),
        ({"format": "hf", "dtype": "q8_0"}, "--dtype q8_0: needs --format gguf"),
        ({"max_shard_size": 10**6}, "--max-shard-size: needs --format hf"),
        ({"model": None}, "MODEL is missing"),
        ({"model": "nowhere"}, "nowhere: expected a model folder, found nothing"),
        ({"format": "adapter"}, "found no adapter; llmkit sft --lora-rank 16 --keep-adapter keeps one"),
    ],
)
def test_user_errors_are_one_line(chat: Path, tmp_path: Path, options: dict, words: str) -> None:
    given = {"model": str(chat), "format": "gguf", "out": str(tmp_path / "out"), **options}
    with pytest.raises(UserError) as raised:
        export.run(ExportConfig(**given))
    assert words in str(raised.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_pipe_is_no_place_for_a_gguf_file(chat: Path, tmp_path: Path, dry_run: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = refused(chat, tmp_path / "pipe", force=True, dry_run=dry_run)
    assert said.endswith("expected a file such as -o chat.gguf, found a folder, pipe or device")


def test_exports_that_llama_cpp_does_not_support_are_refused(tmp_path: Path, monkeypatch) -> None:
    o200k = save_assistant(tmp_path / "o200k", "o200k")
    assert "expected a pre-tokenizer that llama.cpp" in refused(o200k, tmp_path / "m.gguf")
    assert "is the model folder itself" in refused(o200k, o200k, format="hf", force=True)
    biased = save_assistant(tmp_path / "biased", attention_bias=True, attention_out_bias=True)
    assert "qwen3 does not support attention_bias; --format hf keeps it" in refused(biased, tmp_path / "m.gguf")
    wide = save_assistant(tmp_path / "wide", **FAMILIES["qwen2"], head_dim=24)
    assert "llama.cpp's qwen2 expects head_dim 16, found 24" in refused(wide, tmp_path / "m.gguf")
    for name, change, message in (
        ("gemma3", {"query_pre_attn_scalar": 24.0}, "gemma3 expects query_pre_attn_scalar 16, found 24.0"),
        ("gemma3", {"layer_windows": (64, None) * 3 + (64,)}, "gemma3 expects a window in all layers but the last"),
        ("olmo3", {"sliding_rope": None}, "olmo2 does not support the RoPE of the layers with a window"),
        ("phi3", {"rope_scaling": RopeScaling("linear", 2.0)}, "phi3 does not support rope scaling linear"),
        ("smollm3", {"no_rope_layers": (1,)}, "smollm3 expects RoPE in all layers but the last of every 4"),
    ):
        other = save_assistant(tmp_path / f"{name}{len(message)}", **FAMILIES[name] | change)
        assert f"llama.cpp's {message}" in refused(other, tmp_path / "m.gguf")
    foreign = save_folder(tmp_path / "foreign")
    edit(foreign / "config.json", lambda config: config.update(model_type="bloom"))
    assert "expected model_type to be one of llama, mistral, qwen2, " in refused(foreign, tmp_path / "m.gguf")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert "pip install 'llmkit[gguf]'" in refused(foreign, tmp_path / "m.gguf")
