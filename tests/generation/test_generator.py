"""The generation engine: the model's logits, the same text in any batch, and the end of texts."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END, certain, make_model

from llmkit.errors import UserError
from llmkit.generation import decode
from llmkit.generation.decode import Decoder
from llmkit.generation.generator import Generator, continue_text, prompt_ids
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request, StopMatcher
from llmkit.model.config import Rope, RopeScaling
from llmkit.tokenizer.encoding import load_tokenizer

SHAPES = {
    "grouped heads": {},
    "one head each, no norm": {"num_key_value_heads": 4, "model_type": "llama", "qk_norm": False},
    "biases, tied": {
        "model_type": "qwen2", "qk_norm": False, "attention_bias": True, "tie_word_embeddings": True,
    },
    "windows": {"layer_windows": (None, 24)},
    "in training": {"normalize_embedding": True, "residual_scales": True, "norm_gains": False, "qk_gain": 1.3},
    "gpt2": {
        "model_type": "gpt2", "qk_norm": False, "num_key_value_heads": 4, "learned_positions": True,
        "layer_norm": True, "gated_mlp": False, "activation": "gelu_tanh", "attention_bias": True,
        "attention_out_bias": True, "mlp_bias": True,
    },
    "gemma2": {
        "model_type": "gemma2", "qk_norm": False, "post_norms": True, "activation": "gelu_tanh",
        "scale_embedding": True, "query_pre_attn_scalar": 24.0, "layer_windows": (24, None),
        "attention_softcap": 2.0, "logits_softcap": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text", "post_norms": True, "activation": "gelu_tanh", "scale_embedding": True,
        "query_pre_attn_scalar": 24.0, "layer_windows": (None, 24), "sliding_rope": Rope(1e3),
    },
    "olmo2": {"model_type": "olmo2", "qk_norm_whole": True, "pre_norms": False, "post_norms": True},
    "phi3 and granite": {
        "model_type": "granite", "qk_norm": False, "rotary_dim": 8, "residual_multiplier": 0.5,
        "logits_scaling": 2.0, "embedding_multiplier": 3.0,
    },
    "wide feed-forward": {"intermediate_size": 1376, "head_dim": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model(spread=1.5)


def complete(model, tokenizer, requests, sampling=None, **details):
    """Complete all requests; return {(number, sample): completion}."""
    generator = Generator(model, tokenizer, sampling or Sampling(0.9), **details)
    given = list(generator.complete(iter(requests)))
    assert len(given) == len(requests)
    return {
        (request.number, sample): completion
        for request, samples in zip(requests, given, strict=True)
        for sample, completion in enumerate(samples)
    }


# ---- the decode step


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dtype", "weights", "tolerance"),
    [
        (torch.float32, "dense", 1e-4),
        (torch.bfloat16, "dense", 0.5),
        (torch.float32, "half", 0.02),
        (torch.float32, "int8", 0.5),
    ],
)
def test_decoding_gives_the_logits_of_the_whole_forward(shape, dtype, weights, tolerance):
    model = make_model(**shape).to(dtype)
    lengths, steps = [1, 40, 61, 250], 14  # across the growth of the cache by 64 and by a block
    texts = [[random.Random(n).randrange(257) for _ in range(n + steps)] for n in lengths]
    decoder = Decoder(model, len(lengths), weights)
    for slot, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        decoder.load(slot, decoder.prefill(text[:length]))
    for step in range(steps):
        at = [length + step for length in lengths]
        logits = decoder.step([text[i] for text, i in zip(texts, at, strict=True)], at)
        for row, (text, i) in enumerate(zip(texts, at, strict=True)):
            with torch.no_grad():
                whole = model.logits(model(torch.tensor([text[: i + 1]])))[0, -1]
            torch.testing.assert_close(logits[row], whole, rtol=0, atol=tolerance)


def test_longrope_rotates_all_positions_again_beyond_its_first_context(tokenizer):
    factors = {"short_factor": (1.0,) * 8, "long_factor": (1.0, 1.5, *(4.0,) * 6), "attention_factor": 1.2}
    scaling = RopeScaling("longrope", 4.0, original_max_position_embeddings=20, **factors)
    model = make_model(model_type="phi3", qk_norm=False, rope_scaling=scaling, spread=1.5)
    prompts = [[65, 66, 67], [70 + i % 9 for i in range(19)], [80 + i % 9 for i in range(26)]]
    requests = [Request(prompt, max_tokens=12, number=number) for number, prompt in enumerate(prompts)]
    given = complete(model, tokenizer, requests, Sampling(0.0), slots=2)
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + len(given[number, 0].token_ids):
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()))
        assert given[number, 0].token_ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    ("shape", "packs", "threads", "weights"),
    [
        *((shape, packs, 1, "dense") for shape in SHAPES.values() for packs in (True, False)),
        (SHAPES["one head each, no norm"], True, 2, "dense"),
        (SHAPES["gpt2"] | {"intermediate_size": 108}, True, 1, "dense"),  # rows end inside a SIMD vector
        *((shape, True, 1, "int8") for shape in SHAPES.values()),
        ({"num_key_value_heads": 1}, True, 2, "int8"),
    ],
)
def test_a_rows_logits_do_not_depend_on_its_neighbours(shape, packs, threads, weights, monkeypatch):
    torch.set_num_threads(threads)
    if not packs:
        monkeypatch.setattr("llmkit.kernels.linear.can_pack", lambda dtype, device: False)
        monkeypatch.setattr(decode, "can_pack", lambda dtype, device: False)
    model = make_model(context=2048, **shape)
    lengths, steps = [3, 70, 250, 300, 600], 8
    texts = [[random.Random(n).randrange(257) for _ in range(n + steps)] for n in lengths]

    def logits(order):
        decoder = Decoder(model, len(order), weights)
        for slot, i in enumerate(order):
            decoder.load(slot, decoder.prefill(texts[i][: lengths[i]]))
        given = []
        for step in range(steps):
            given.append(decoder.step([texts[i][lengths[i] + step] for i in order], [lengths[i] + step for i in order]))
        return {i: torch.stack([rows[slot] for rows in given]) for slot, i in enumerate(order)}

    alone = {i: logits([i])[i] for i in range(len(texts))}
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 0], [2, 4, 3]):
        for i, rows in logits(order).items():
            assert torch.equal(rows, alone[i]), (order, i)


# ---- the same text in any batch


def requests_of(tokenizer, count=64):
    words = ["It was", "a dark", "and stormy", "night, the", "rain fell", "in torrents"]
    for number in range(count):
        chooser = random.Random(number)
        text = " ".join(chooser.choices(words, k=chooser.randrange(8)))
        yield Request(prompt_ids(tokenizer, text), chooser.randint(1, 2), chooser.randint(1, 60), 7, number)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, 50, 0.9, 0.02), Sampling(0.0)], ids=str)
def test_a_text_is_the_same_alone_together_shuffled_and_at_any_number_of_slots(model, tokenizer, sampling):
    requests = list(requests_of(tokenizer))
    together = complete(model, tokenizer, requests, sampling, slots=16)
    assert len({completion.text for completion in together.values()}) > 40  # they differ
    alone = Generator(model, tokenizer, sampling, slots=1)
    for request in requests[:24]:
        for sample, completion in enumerate(next(alone.complete([request]))):
            assert completion == together[request.number, sample]
    for slots in (3, 40):
        random.Random(slots).shuffle(requests)
        assert complete(model, tokenizer, requests, sampling, slots=slots) == together


def test_a_text_is_the_same_across_blocks_of_positions_and_of_draws(tokenizer):
    model = make_model(context=700, head_dim=64, num_attention_heads=2, num_key_value_heads=1)
    model.head_weight.data[END] = -1.0  # it never ends
    requests = [Request([END, *range(n)], max_tokens=600 // (n + 1) + 140, number=n) for n in range(5)]
    together = complete(model, tokenizer, requests, end_ids=())
    assert max(len(completion.token_ids) for completion in together.values()) > 512
    for request in requests:
        assert (
            complete(model, tokenizer, [request], end_ids=(), slots=3)[request.number, 0] == together[request.number, 0]
        )


def test_log_probabilities_are_those_of_the_whole_forward(model, tokenizer):
    sampling = Sampling(0.7, top_k=20)
    for request in list(requests_of(tokenizer, 6)):
        (completion, *_) = next(Generator(model, tokenizer, sampling, slots=3).complete([request]))
        ids = [*request.prompt, *completion.token_ids]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([ids[:-1]])))[0, len(request.prompt) - 1 :]
        whole = torch.log_softmax(logits / 0.7, -1)
        made = torch.tensor(completion.token_ids)
        rows = torch.arange(len(made))
        assert (torch.tensor(completion.logprobs) - whole[rows, made]).abs().max() < 1e-4
        kept = whole.topk(20).values.logsumexp(-1)
        assert (torch.tensor(completion.truncated_logprobs) - (whole[rows, made] - kept)).abs().max() < 1e-4
        assert completion.sampled == [True] * len(made)


def test_seed_number_and_sample_each_change_the_text(model, tokenizer):
    ids = prompt_ids(tokenizer, "It was")
    requests = [Request(ids, 2, 40, seed, number) for seed in (0, 1) for number in (0, 1)]
    generator = Generator(model, tokenizer, Sampling(1.0), end_ids=())
    texts = [completion.text for samples in generator.complete(requests) for completion in samples]
    assert len(set(texts)) == 8


def test_a_prompt_is_prefilled_once(model, tokenizer, monkeypatch):
    calls = []

    def watched(self, pieces, ids, real=Decoder.prefill_after):
        calls.extend([] if pieces else [1])
        return real(self, pieces, ids)

    monkeypatch.setattr(Decoder, "prefill_after", watched)
    requests = [Request([END, n], 9, 4, number=n) for n in (1, 2, 1, 1)]  # also for an equal prompt shortly after
    complete(model, tokenizer, requests, slots=2)
    assert len(calls) == 2


def test_results_come_in_order_and_reading_does_not_run_ahead(model, tokenizer, monkeypatch):
    monkeypatch.setattr("llmkit.generation.generator.OPEN_REQUESTS", 4)
    read = []

    def source():
        for number in range(60):
            read.append(number)
            # the first is long: the others must wait for it, but not forever
            yield Request([END, number], max_tokens=200 if number == 0 else 2, number=number)

    generator = Generator(model, tokenizer, Sampling(1.0), slots=2, end_ids=())
    results = generator.complete(source())
    first = next(results)
    assert len(first[0].token_ids) == 200 and len(read) == 8
    assert [len(samples[0].token_ids) for samples in results] == [2] * 59


def test_a_finished_request_is_reported_at_once_not_in_its_turn(model, tokenizer):
    generator, told = Generator(model, tokenizer, Sampling(1.0), slots=2, end_ids=()), []
    requests = [Request([END, n], max_tokens=length, number=n) for n, length in enumerate((20, 2, 3))]
    results = list(generator.complete(requests, on_done=lambda index, samples: told.append((index, samples))))
    assert [index for index, _ in told] == [1, 2, 0]
    assert [samples for _, samples in sorted(told, key=lambda one: one[0])] == results


def test_slots_are_filled_again_at_once(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(1.0), slots=4, end_ids=())
    lengths = [41, 11, 11, 11, 11, 31, 21, 21]  # 158 tokens, of which the decoder makes 150
    list(generator.complete(Request([END], max_tokens=n, number=n) for n in lengths))
    assert generator.usage.completion_tokens == 158 and generator.steps <= 50  # padded batches of 4 would take 40 + 30


def test_our_own_greedy_text_is_that_of_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    from llmkit.model.folder import save_model

    model = make_model()
    save_model(model, tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt_ids(tokenizer, "It was a dark and")
    expected = stock.generate(torch.tensor([ids]), max_new_tokens=100, do_sample=False, pad_token_id=0)[0].tolist()
    ours = complete(model, tokenizer, [Request(ids, max_tokens=100)], Sampling(0.0))
    assert ours[0, 0].token_ids == expected[len(ids) :]


def test_story_llama_says_what_is_expected_of_it(shared_data):
    from llmkit.model.folder import load_model

    folder = shared_data / "ckpt" / "story-llama"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    expected = json.loads(folder.with_name("story-llama.greedy-expected.json").read_text())
    ids = prompt_ids(tokenizer, expected["prompt"])
    assert ids == expected["greedy_ids"][: len(ids)]
    request = Request(ids, max_tokens=len(expected["greedy_ids"]) - len(ids))
    (completion,) = next(Generator(model, tokenizer, Sampling(0.0)).complete([request]))
    assert ids + completion.token_ids == expected["greedy_ids"]
    assert expected["text"].endswith(expected["prompt"] + completion.text)


# ---- ends of texts


@pytest.fixture
def speller(tokenizer):
    """A function that makes a model which completes END with a given text and the end token."""

    def complete_with(text, stop=(), end=True, max_tokens=100):
        ids = tokenizer.encode(text)
        assert len(set(ids)) == len(ids), "each byte once: the chain follows the last token alone"
        model = certain(make_model(), END, *ids, *([END] if end else []))
        pieces = []
        generator = Generator(model, tokenizer, Sampling(0.0), stop=stop)
        asked = [Request([END], max_tokens=max_tokens)]
        ((completion,),) = generator.complete(asked, on_text=lambda request, sample, piece: pieces.append(piece))
        assert "".join(pieces) == completion.text
        return completion, pieces, ids

    return complete_with


@pytest.mark.parametrize(
    ("says", "options", "pieces", "tokens", "reason"),
    [
        ("wax, the", {}, list("wax, the"), None, "stop"),  # emitted as soon as it is certain, with the end token
        ("wax, the", {"max_tokens": 3}, ["w", "a", "x"], 3, "length"),
        (
            "one, twi",
            {"stop": ["zz", ", t"]},
            ["o", "n", "e"],
            6,
            "stop",
        ),  # a stop string of several tokens is removed
        ("one, twi", {"stop": [", x", "i!"]}, ["o", "n", "e", ",", " ", "t", "w", "i"], None, "stop"),
        ("aé√z", {}, ["a", "é", "√", "z"], None, "stop"),  # characters of several tokens are emitted complete
        ("aé", {"max_tokens": 2}, ["a", "\ufffd"], 2, "length"),
    ],
)
def test_ends_and_streamed_pieces_of_texts(speller, says, options, pieces, tokens, reason):
    completion, given, ids = speller(says, **options)
    assert (completion.text, completion.finish_reason) == ("".join(pieces), reason)
    assert completion.token_ids == ([*ids, END] if tokens is None else ids[:tokens])
    assert "".join(given) == "".join(pieces) and len(given) <= len(pieces)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stops_do_not_depend_on_where_the_pieces_end(text, stops, cuts):
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)
    if first is not None:  # cut before the longest stop string that ends there
        first -= max(len(stop) for stop in stops if text[:first].endswith(stop))
    expected = text[:first]
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    matcher, given_out = StopMatcher(stops), ""
    for start, end in itertools.pairwise(borders):
        given_out += matcher.push(text[start:end])
        assert expected.startswith(given_out)
    given_out += matcher.finish()
    assert given_out == expected and matcher.stopped == (first is not None)


def test_the_context_ends_a_text(tokenizer):
    model = make_model(context=40)
    for length in (1, 38, 39):
        request = Request([END] * length, max_tokens=None)
        (completion,) = next(Generator(model, tokenizer, Sampling(1.0), end_ids=()).complete([request]))
        assert len(completion.token_ids) == 40 - length and completion.finish_reason == "length"


@pytest.mark.parametrize("length", [0, 40, 100])
def test_a_prompt_without_room_has_no_samples(tokenizer, length):
    generator = Generator(make_model(context=40), tokenizer, Sampling(1.0))
    asked = [Request([END] * size, max_tokens=1) for size in (1, length, 2)]
    assert [len(samples) for samples in generator.complete(asked)] == [1, 0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_are_refused(tokenizer, temperature):
    model = make_model()
    model.layers[1].down.data[3, 4] = float("nan")
    generator = Generator(model, tokenizer, Sampling(temperature), name="base/")
    with pytest.raises(UserError, match=r"^base/: its logits are not finite.*NaN"):
        list(generator.complete([Request([END])]))


def test_rows_that_the_tokenizer_does_not_know_are_never_chosen(tokenizer):
    model = make_model(vocab_size=320)
    model.head_weight.data[257:] *= 50
    completions = complete(model, tokenizer, [Request([END], 8, 30)])
    assert all(max(completion.token_ids) < 257 for completion in completions.values())


# ---- prompts and the trainer's samples


def test_a_prompt_begins_once_and_an_empty_one_is_the_beginning(tokenizer):
    assert prompt_ids(tokenizer, "a") == [END, *tokenizer.encode("a")]
    assert prompt_ids(tokenizer, "") == [END]
    assert END not in prompt_ids(tokenizer, "<|endoftext|>")[1:]


def test_the_trainers_sample_leaves_a_model_that_trains_on(tokenizer):
    model = make_model(context=64).train()
    before = continue_text(model, tokenizer, "It was", 20, seed=3)
    assert before == continue_text(model, tokenizer, "It was", 20, seed=3)
    assert before != continue_text(model, tokenizer, "It was", 20, seed=4)
    assert model.training
    ids = torch.randint(0, 257, (2, 48))
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.5 * parameter.grad
    assert continue_text(model, tokenizer, "It was", 20, seed=3) != before


def test_the_last_line_counts_tokens_and_slots(model, tokenizer):
    generator = Generator(model, tokenizer, Sampling(1.0), slots=4, end_ids=())
    list(generator.complete(Request([END], max_tokens=n, number=n) for n in (21, 11)))
    generator.seconds = 2.0
    (line,) = generator.describe()
    assert line.startswith("32 tokens at 16 tok/s, 38% of the slots in use, after")  # 30 rows in 20 steps of 4
