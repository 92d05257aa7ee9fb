"""Loading and saving folders: the same logits as transformers for every family, and errors that name the problem."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from families import FAMILIES, SMALL, save, tokens
from safetensors.torch import load_file, save_file

from llmkit.errors import UserError
from llmkit.generation.decode import Decoder
from llmkit.model.config import ModelConfig
from llmkit.model.families import FAMILIES as FAMILY_TABLE
from llmkit.model.folder import load_config, load_model, save_model
from llmkit.model.transformer import Transformer
from llmkit.model.weights import export_state_dict


@pytest.fixture
def folder(tmp_path):
    save("llama", tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers_loaded_and_saved_again(name, tmp_path):
    theirs = save(name, tmp_path / "theirs")
    expected = theirs(tokens(), labels=tokens())
    ours = load_model(tmp_path / "theirs")
    assert (ours.logits(ours(tokens())) - expected.logits).abs().max() < 1e-4
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert (again(tokens()).logits - expected.logits).abs().max() < 1e-4
    assert load_config(tmp_path / "ours") == ours.config
    loss = ours.train().loss(tokens()[:, :-1], tokens()[:, 1:])
    assert abs(loss - expected.loss) < 1e-5
    loss.backward()
    expected.loss.backward()
    # gradients can be rearranged like parameters, because only rows are moved
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    gradients, offset = export_state_dict(ours), FAMILY_TABLE[ours.config.model_type].gain_offset
    for key, parameter in theirs.named_parameters():
        gradient = gradients[key] + offset * key.endswith("norm.weight")
        error = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4 or parameter.grad.norm() < 1e-5, key


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_greedy_answers_are_those_of_transformers(name, tmp_path):
    """Beyond the windows, in a batch with another, and after an extended prefix."""
    theirs = save(name, tmp_path)
    prompt, count = tokens(1, 9)[0].tolist(), 24
    asked = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    ids = theirs.generate(asked, attention_mask=torch.ones_like(asked), **options)
    decoder = Decoder(load_model(tmp_path), 2)
    prefix = decoder.extend(decoder.prefill(prompt[:5]), prompt[5:])
    decoder.load(0, decoder.prefill(prompt[:3]))
    decoder.load(1, prefix)
    answer = [int(prefix.logits_1V.argmax())]
    while len(answer) < count:
        logits_BV = decoder.step([7, answer[-1]], [2 + len(answer), len(prompt) + len(answer) - 1])
        answer.append(int(logits_BV[1].argmax()))
    assert answer == ids[0, len(prompt) :].tolist()


@torch.no_grad()
def test_sharded_folders_load_and_save(tmp_path):
    theirs = save("qwen3", tmp_path / "one")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = load_model(tmp_path / "theirs")
    assert (ours.logits(ours(tokens())) - theirs(tokens()).logits).abs().max() < 1e-4
    save_model(ours, tmp_path / "one", max_shard_size=40_000)  # the other format is gone
    assert not (tmp_path / "one" / "model.safetensors").exists()
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert (again(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-4
    save_model(load_model(tmp_path / "one"), tmp_path / "one", dtype=torch.bfloat16)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert load_file(tmp_path / "one" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "one").embed_tokens.dtype == torch.float32
    assert json.loads((tmp_path / "one" / "config.json").read_text())["torch_dtype"] == "bfloat16"


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OF_OLD = "model.layers.0.self_attn.rotary_emb.inv_freq"


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def without_prefix(tensors):
    """Rename tensors as in openai-community/gpt2, whose masks are not weights."""
    named = {name.removeprefix("transformer."): tensors.pop(name) for name in list(tensors)}
    tensors.update(named, **{"h.0.attn.bias": torch.ones(1, 1, 64, 64)})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-tied", lambda tensors: tensors.update({OF_OLD: torch.ones(6)})),
        ("llama-tied", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)})),
        ("gpt2", without_prefix),
    ],
)
@torch.no_grad()
def test_checkpoints_of_other_forms_load(tmp_path, name, change):
    theirs = save(name, tmp_path)
    edit_tensors(tmp_path, change)
    ours = load_model(tmp_path)
    assert (ours.logits(ours(tokens())) - theirs(tokens()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("release", [4, 5])
@torch.no_grad()
def test_the_text_model_of_one_with_pictures_loads_and_is_saved_alone(tmp_path, release):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma3TextConfig(**SMALL, **FAMILIES["gemma3"][1])
    vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96)
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")

    def as_written_by_4(tensors):
        for name in list(tensors):
            old = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
            tensors[old] = tensors.pop(name)

    if release == 4:
        edit_tensors(tmp_path / "theirs", as_written_by_4)
    ours, expected = load_model(tmp_path / "theirs"), theirs(tokens()).logits
    assert (ours.logits(ours(tokens())) - expected).abs().max() < 1e-4
    save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__name__ == "Gemma3ForCausalLM" and (again(tokens()).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "missing tensor model.norm.weight$"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "unexpected tensor model.extra for model_type llama"),
        (
            lambda t: t.update({UP: torch.ones(80, 47)}),
            r"up_proj.weight: expected shape \[80, 48\], found \[80, 47\]; are",
        ),
        (lambda t: t.update({UP.replace("w", "qw"): t.pop(UP)}), "found the quantized tensor .*up_proj.qweight; use"),
        (lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)}), "norm.weight: expected dtype .*, found I8"),
        (lambda t: t.update({HEAD: t[EMBEDDING] + 1}), "differ, but config.json has tie_word_embeddings true"),
    ],
)
def test_a_folder_with_a_wrong_tensor_is_refused_by_name(folder, change, message):
    edit_tensors(folder, change)
    edit_config(folder, tie_word_embeddings="tie" in message)
    with pytest.raises(UserError, match=message) as raised:
        load_model(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "expected model_type to be one of llama, mistral, qwen2, .*, found 'bloom'"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu' for .*, found 'gelu'"),
        ({"mlp_bias": 1}, "expected true or false for mlp_bias, found 1"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope scaling .*, found 'axial'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "expected 6 numbers for short_factor, found None"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "expected a number above 0 for factor, found '4'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope scaling yarn needs factor, or original_max"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 1}},
            "above 1 for rope_theta with yarn, found 1",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1e-320}}, "above 1e-06 for beta_fast, found"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "expected true or false for truncate"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "found quantization 'gptq'; use the model's unquantized",
        ),
        ({"model_type": "x", "auto_map": {"AutoModelForCausalLM": "x.X"}}, "found 'x', whose code .* is never run"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads=3, found 4"),
        ({"hidden_size": None}, "expected integers for hidden_size"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, change, message):
    edit_config(folder, **change)
    with pytest.raises(UserError, match=message) as raised:
        load_model(folder)
    assert str(folder / "config.json") in str(raised.value)


def test_broken_files_are_named(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) - 100, 50, 0):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or truncated safetensors file"):
            load_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: a pickle can run code.*save_pretrained"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json:1: expected JSON, found "):
        load_config(folder)
    with pytest.raises(UserError, match="expected a model folder, found nothing"):
        load_config(tmp_path / "nowhere")


def test_a_missing_shard_and_a_wrong_index_are_named(tmp_path):
    theirs = save("qwen3", tmp_path / "one")
    folder = tmp_path / "many"
    theirs.save_pretrained(folder, max_shard_size="40KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.ghost": first}}))
    with pytest.raises(UserError, match=r"expected tensor model\.ghost, which .*index\.json lists"):
        load_model(folder)
    index_path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.ghost": "../one/model.safetensors"}}))
    with pytest.raises(UserError, match="expected a file of this folder"):
        load_model(folder)
    index_path.write_text(json.dumps(index))
    (folder / first).unlink()
    with pytest.raises(UserError, match=f"{first}: not found"):
        load_model(folder)


def small(**options):
    return ModelConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip


GEMMA = {"rope_parameters": None, "layer_types": None, "sliding_window_pattern": 2, "sliding_window": 8}
OLD_OLMO = {"rope_parameters": None, "rope_theta": 5e5, "layer_types": ["full_attention", "sliding_attention"]}
OLD_PHI = {
    "rope_parameters": None, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {"short_factor": [1.0, 1.1, 1.5], "long_factor": [1.0, 2.0, 4.0]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXTRAS = dict(normalize_embedding=True, residual_scales=True, norm_gains=False, qk_gain=1.3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("extras", [{}, EXTRAS, EXTRAS | {"norm_gains": True}])
@torch.no_grad()
def test_our_models_become_a_stock_qwen3_with_the_same_logits(tmp_path, tied, extras):
    model = Transformer(small(tie_word_embeddings=tied, **extras), seed=0)
    for name, parameter in model.named_parameters():
        scale = 0.5 if name == "embed_tokens" else 0.1
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * scale)
    expected = model.logits(model(tokens()))
    save_model(model, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock).__name__ == "Qwen3ForCausalLM"
    assert stock.generation_config.eos_token_id == 2
    assert (stock(tokens()).logits - expected).abs().max() < 1e-5
    loaded = load_model(tmp_path)
    assert (loaded.logits(loaded(tokens())) - expected).abs().max() < 1e-5
    assert sum(p.numel() for p in loaded.parameters()) == model.config.parameter_count


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("Qwen2", {"num_key_value_heads": None}),
        ("Llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}}),
        (
            "Llama",
            {"rope_scaling": {"type": "llama3", "factor": 8.0, **LLAMA3}, "original_max_position_embeddings": 16},
        ),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("Qwen2", {"rope_scaling": {"type": "yarn", **YARN}}),
        ("Qwen3", {"rope_scaling": {"rope_type": "yarn", **YARN}}),
        ("Llama", {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 16}}),
        ("Llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("Mistral", {"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 0.8, "truncate": False}}),
        ("Llama", {"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 4, "beta_slow": 0.5}}),
        ("Llama", {"rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("Gemma3Text", {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("Gemma3Text", {**GEMMA, "rope_theta": 2e4, "rope_local_base_freq": 500.0, "query_pre_attn_scalar": 24}),
        ("GPT2", {"n_inner": None}),
        ("Granite", {"rope_parameters": None, "rope_theta": 1e7}),
        ("Olmo2", {"rope_parameters": None, "rope_theta": 5e5}),
        ("Olmo3", {**OLD_OLMO, "rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": 4}}),
        ("Olmo3", {"rope_parameters": None, "layer_types": None, "sliding_window": 8}),
        ("Phi3", {**OLD_PHI, "rope_scaling": {"type": "longrope", **LONGROPE}}),
        ("Phi3", {**OLD_PHI, "partial_rotary_factor": 1.0, "rope_scaling": None, "sliding_window": 8}),
        ("SmolLM3", {"rope_parameters": None, "rope_theta": 5e6, "no_rope_layers": None, "no_rope_layer_interval": 2}),
    ],
)
@torch.no_grad()
def test_defaults_of_a_config_are_those_of_transformers(tmp_path, family, edit):
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    sizes |= {"num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    expected = stock(tokens()).logits
    assert (loaded.logits(loaded(tokens())) - expected).abs().max() < 1e-3
    row = tokens()[0].tolist()
    (_, logits), *_ = Decoder(loaded, 1).logits_in_pieces(row, len(row))
    assert (logits - expected[0]).abs().max() < 1e-3
    save_model(loaded, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again(tokens()).logits - expected).abs().max() < 1e-3


def test_a_save_that_is_killed_leaves_the_old_model_whole(tmp_path):
    save_model(Transformer(small(), seed=0), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code = f"""
import os, safetensors.torch
from llmkit.model import folder
original = folder.save_file
def save_half(tensors, path, metadata):
    original(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), 9)
folder.save_file = save_half
folder.save_model(folder.load_model({str(tmp_path)!r}), {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert (tmp_path / "model.safetensors").read_bytes() == before
    load_model(tmp_path)


def test_the_story_model_reproduces_its_expected_ids(shared_data):
    expected = json.loads((shared_data / "ckpt" / "story-llama.greedy-expected.json").read_text())["greedy_ids"]
    model = load_model(shared_data / "ckpt" / "story-llama")
    with torch.no_grad():
        greedy = model.logits(model(torch.tensor([expected])))[0].argmax(-1).tolist()
    prompt = next(length for length in range(5, 12) if greedy[length - 1 : -1] == expected[length:])
    ids = expected[:prompt]
    while len(ids) < len(expected):
        with torch.no_grad():
            ids = [*ids, model.logits(model(torch.tensor([ids]))[0, -1]).argmax().item()]
    assert ids == expected
