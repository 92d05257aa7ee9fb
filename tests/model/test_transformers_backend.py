"""Models that run through transformers: hidden states, packed documents, gradients, generation with cache, errors."""

import families
import pytest
import tiny
import torch
import transformers
from foreign_models import COMMON, GROUPED, MODELS, edit_config, save
from llmkit.kernels.attention import Branching
from safetensors.torch import load_file, save_file

from llmkit.errors import UserError
from llmkit.evaluation.likelihood import Scorer
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.generation.sampler import open_sampler
from llmkit.generation.transformers_decoder import TransformersDecoder
from llmkit.model.folder import SavedTensors, load_config, load_model
from llmkit.model.lora import LinearAdapter
from llmkit.model.transformers_backend import TransformersModel
from llmkit.tokenizer.encoding import load_tokenizer

PROMPTS = ["Once", "It was a dark and stormy night", "x", "The sea is", "a"]


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A folder of each family, and transformers' model."""
    path = tmp_path_factory.mktemp(request.param)
    return path, save(request.param, path)


def numbers(batch, length):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def test_loss_and_gradients_are_those_of_transformers(folder):
    path, theirs = folder
    ours = load_model(path, backend="auto").train()
    ids = numbers(2, 40)
    assert torch.equal(ours.logits(ours(ids)), ours.logits(ours(ids)))  # no dropout
    expected = theirs(ids, labels=ids).loss
    theirs.zero_grad()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    for checkpointing in (False, True):
        ours.checkpoint_layers = checkpointing
        ours.zero_grad()
        loss = ours.loss(ids[:, :-1], ids[:, 1:])
        assert abs(loss - expected) < 1e-5
        loss.backward()
        for name, parameter in ours.module.named_parameters():
            error = (parameter.grad - wanted[name].grad).norm()
            assert error < 1e-4 * wanted[name].grad.norm() + 1e-6, (name, checkpointing)


def test_documents_of_a_row_do_not_see_each_other(folder):
    lengths = [5, 17, 1, 41]
    model = load_model(folder[0], backend="auto").train()
    ids = numbers(2, sum(lengths))
    targets = ids.roll(-1, 1)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).repeat(2, 1)
    packed = model.loss(ids, targets, documents, reduction="sum")
    packed.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    pairs = zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)
    alone = sum(model.loss(part, target, reduction="sum") for part, target in pairs)
    alone.backward()
    assert abs(packed - alone) < 1e-5 * alone
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-5, name


@torch.no_grad()
def test_answers_that_share_a_prompt_do_not_see_each_other(folder):
    model = load_model(folder[0], backend="auto")
    ids = numbers(1, 20)  # a prompt of 8, answers of 5 and 4, and another document of 3
    branches = torch.tensor([[0] * 8 + [1] * 5 + [2] * 4 + [1] * 3])
    positions = torch.tensor([[*range(8), *range(8, 13), *range(8, 12), *range(3)]])
    documents = torch.tensor([[0] * 17 + [1] * 3])
    hidden = model(ids, doc_ids=Branching(documents, branches, positions))
    first, second, other = model(ids[:, :13]), model(torch.cat([ids[:, :8], ids[:, 13:17]], 1)), model(ids[:, 17:])
    expected = torch.cat([first, second[:, 8:], other], 1)
    assert (hidden - expected).abs().max() < 1e-4


def test_greedy_answers_are_those_of_generate_and_logprobs_those_of_the_model(folder):
    path, theirs = folder
    with open_sampler(str(path), Sampling(temperature=0.0), slots=3) as sampler:
        encoded = [sampler.encode(prompt) for prompt in PROMPTS]
        requests = [Request(ids, max_tokens=20 + 3 * i) for i, ids in enumerate(encoded)]
        answers = list(sampler.complete(requests))
    model = load_model(path, backend="auto")
    for ids, request, (answer,) in zip(encoded, requests, answers, strict=True):
        length = request.max_tokens
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=length, do_sample=False, pad_token_id=0)[0]
        assert ids + answer.token_ids == expected.tolist()
        with torch.no_grad():
            whole = torch.tensor([ids + answer.token_ids])
            logprobs = model.logits(model(whole)).float().log_softmax(-1)[0, len(ids) - 1 : -1]
        picked = logprobs.gather(1, whole[0, len(ids) :, None]).squeeze(1)
        assert (picked - torch.tensor(answer.logprobs)).abs().max() < 1e-3


def test_samples_and_likelihoods(folder):
    path, theirs = folder
    with open_sampler(str(path), Sampling(temperature=1.0), slots=4) as sampler:
        request = Request(sampler.encode("The sea"), samples=6, max_tokens=12, seed=3)
        first, again = (next(iter(sampler.complete([request]))) for _ in range(2))
    assert [one.token_ids for one in first] == [one.token_ids for one in again]
    assert len({tuple(one.token_ids) for one in first}) > 1
    shared, rest = numbers(1, 12)[0].tolist(), numbers(4, 6)[1:].tolist()
    pairs = [(shared + ids, 12) for ids in rest] + [(rest[0], 1)]
    for (ids, start), likelihood in zip(pairs, Scorer(load_model(path, backend="auto")).score(pairs), strict=True):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logprobs[range(start - 1, len(ids) - 1), ids[start:]].sum()
        assert abs(likelihood.logprob - expected) < 1e-3


@torch.no_grad()
def test_a_sequence_continues_after_the_result_of_a_tool(folder):
    """Suspended in the middle of a batch, extended by several tokens, and loaded next to others."""
    model = load_model(folder[0], backend="auto")
    decoder = TransformersDecoder(model)
    one, other, result = numbers(3, 9).tolist()
    for slot, ids in enumerate((one, other[:4])):
        decoder.load(slot, decoder.prefill(ids))
    decoder.step([7, 8], [9, 4])
    held = decoder.hold(0, 10)
    decoder.move(1, 0, 5)
    decoder.step([9], [5])
    for _ in range(2):  # the suspended state does not change
        prefix = decoder.extend(held, [11, *result])
    assert (prefix.logits_1V - model.logits(model(torch.tensor([[*one, 7, 11, *result]])))[:, -1]).abs().max() < 1e-4
    decoder.load(1, prefix)
    logits = decoder.step([12, 13], [6, 20])
    for row, ids in enumerate(([*other[:4], 8, 9, 12], [*one, 7, 11, *result, 13])):
        expected = model.logits(model(torch.tensor([ids])))[0]
        assert (logits[row] - expected[-1]).abs().max() < 1e-4
        for start, piece in decoder.logits_in_pieces(ids, 3):  # for `echo` of serve
            assert (piece - expected[start : start + 3]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_merged_once_for_a_decoder_and_trained_on(tied, tmp_path, monkeypatch):
    save("gpt_neox", tmp_path, tie_word_embeddings=tied)
    model = load_model(tmp_path, backend="auto")
    adapter = LinearAdapter(model, rank=4, alpha=8, token_ids=(3, 5))
    for name, parameter in adapter.parameters():
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = numbers(1, 12)[0].tolist()
    expected = model.logits(model(torch.tensor([[*ids, 7]])))[0, -2:]
    decoder = TransformersDecoder(model)
    with monkeypatch.context() as patched:
        patched.setattr("torch.nn.utils.parametrize.ParametrizationList.forward", None)
        prefix = decoder.prefill(ids)
        decoder.load(0, prefix)
        logits = torch.cat([prefix.logits_1V, decoder.step([7], [12])])
    assert (logits - expected).abs().max() < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for _, parameter in adapter.parameters())
    assert model.merged().module.get_input_embeddings().weight[3].equal(model.embed_tokens[3])
    unadapted = [name for name, _ in decoder.model.named_parameters() if "norm" in name]
    shared = {tensor.data_ptr() for tensor in model.parameters()}
    assert unadapted and all(decoder.model.get_parameter(name).data_ptr() in shared for name in unadapted)
    assert TransformersDecoder(decoder.model).model is decoder.model  # nothing to merge


def test_bfloat16(folder):
    model = load_model(folder[0], dtype=torch.bfloat16, backend="auto").train()
    ids = numbers(2, 20)
    exact = load_model(folder[0], backend="auto").loss(ids, ids)
    loss = model.loss(ids, ids, torch.tensor([[0] * 8 + [1] * 12] * 2))
    loss.backward()
    assert loss.isfinite() and model.loss(ids, ids) < 1.2 * exact
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    with torch.no_grad():
        decoder = TransformersDecoder(model.eval())
        decoder.load(0, decoder.prefill([1, 2, 3]))
        assert decoder.step([4], [3]).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window", "gemma3", "granite", "gpt2", "gemma2"])
def test_native_families_are_the_same_by_either_backend(name, tmp_path):
    families.save(name, tmp_path)
    ours, theirs = (load_model(tmp_path, backend=backend).train() for backend in ("llmkit", "transformers"))
    assert isinstance(theirs, TransformersModel) and not isinstance(ours, TransformersModel)
    ids = families.tokens()
    documents = torch.arange(40).div(13, rounding_mode="floor").repeat(2, 1)
    losses = [model.loss(ids[:, :-1], ids[:, 1:], documents[:, :-1]) for model in (ours, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-5
    hidden = [model(ids)[0, :-1] for model in (ours, theirs)]
    both = [model.logprobs(h, ids[0, 1:], 0.7) for model, h in zip((ours, theirs), hidden, strict=True)]
    assert all((one - other).abs().max() < 1e-4 for one, other in zip(*both, strict=True))
    requests = [Request(ids[0, :n].tolist(), max_tokens=15) for n in (3, 9)]
    tokenizer = load_tokenizer(tiny.save_folder(tmp_path / "tokenizer"))
    answers = [
        [one.token_ids for (one,) in Generator(model, tokenizer, Sampling(0.0), end_ids=()).complete(requests)]
        for model in (ours.eval(), theirs.eval())
    ]
    assert answers[0] == answers[1]


def test_an_unsupported_model_is_refused_in_one_line(tmp_path):
    def refused(expected, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save("bloom", folder)
        edit_config(folder, **changes)
        (folder / "mine.py").write_text("raise SystemExit('ran')")
        with pytest.raises(UserError, match=expected) as raised:
            load_model(folder, backend="auto")
        assert "\n" not in str(raised.value)

    refused("or one of llama, .*, found 'axolotl9'; choose another model", model_type="axolotl9")
    refused(r"or one of llama, .*, found \['bloom'\]; choose another model", model_type=["bloom"])
    refused("found 'mine'; its own code", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"})
    refused(
        "config.json: .*'gptq'; use the model's unquantized folder",
        quantization_config={"quant_method": "gptq"},
    )
    refused(r"expected shape \[64\], found \[32\]; are config.json and weights", hidden_size=64)
    refused("missing tensor transformer.h.2", n_layer=3)
    refused("unexpected tensor transformer.h.1", n_layer=1)
    refused("1 to 4096 for num_hidden_layers, found 100000000", n_layer=10**8)
    refused("refuses this 'bloom'", hidden_size="wide")
    refused("decoder-only language model, found 't5'", model_type="t5")

    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="'bert': expected causal layers, found tokens that see later ones"):
        load_model(tmp_path / "bert", backend="auto")


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
def test_a_family_with_a_special_cache_is_trained_but_not_sampled(family, tmp_path):
    own = dict(head_dim=8, lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"])
    models = {"rwkv": COMMON | {"attention_hidden_size": 32}, "recurrent_gemma": GROUPED | own}
    config = transformers.AutoConfig.for_model(family, **models[family])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, backend="auto").train()
    ids = numbers(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    packed = model.loss(ids, ids, documents, reduction="sum")
    alone = sum(model.loss(part, part, reduction="sum") for part in ids.split([5, 7], 1))
    assert abs(packed - alone) < 1e-4
    with pytest.raises(
        UserError, match=f"'{family}': expected transformers' shared cache, .* can be trained but not sampled"
    ):
        TransformersDecoder(model).prefill([1, 2, 3])


def test_without_transformers_the_line_names_the_families_and_the_package(tmp_path, monkeypatch):
    save("bloom", tmp_path)
    with pytest.raises(UserError, match=r"'bloom'; choose .*; transformers supports others, but not"):
        load_config(tmp_path)  # like pretrain and export
    monkeypatch.setattr("llmkit.model.folder.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"one of llama, .*, found 'bloom'; .* pip install 'transformers>=5'"):
        load_config(tmp_path, "auto")


def test_weights_of_another_shape_or_kind_are_refused(tmp_path, monkeypatch):
    save("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    for tensor, message in (
        (tensors[name][1:], "are config.json and weights"),
        (tensors[name].to(torch.float8_e4m3fn), r"quantized tensor model.layers.0.*; use the model's"),
        (tensors[name].int(), r"down_proj.weight: expected dtype F64, .*, found I32; use the model's"),
    ):
        if not tensor.is_floating_point():  # according to its header
            monkeypatch.setattr(SavedTensors, "read", None)
        save_file(tensors | {name: tensor.contiguous()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message) as raised:
            load_model(tmp_path, backend="auto")
        assert "\n" not in str(raised.value)


def test_the_command_says_once_that_transformers_runs_it(tmp_path, llmkit):
    save("gpt_neox", tmp_path)
    done = llmkit("sample", tmp_path, "-p", "The sea", "--max-tokens", "5", "-n", "2", "--temperature", "0")
    assert done.stderr.count("family 'gpt_neox' is not native; running it through transformers (about 2x slower") == 1
    refused = llmkit("sample", tmp_path, "-p", "x", "--backend", "llmkit")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
