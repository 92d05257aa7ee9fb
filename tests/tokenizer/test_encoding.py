"""Text to ids and back: raw text never becomes special tokens, and every backend gives the ids of tokenizers."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from llmkit.errors import UserError
from llmkit.tokenizer import backends
from llmkit.tokenizer.encoding import Tokenizer, load_tokenizer
from llmkit.tokenizer.patterns import PATTERNS

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The cat sat on the mat. The dog didn't.",
    "Once upon a time there was a cat and a dog.",
    "12 + 30 = 42\n",
]
text_of_any_kind = st.text(st.characters(codec="utf-8"), max_size=60) | st.lists(
    st.sampled_from([*SPECIALS, "<s>", "▁", " ", "\n", "é", "👍", "\u0301", "the cat", "'s", "7"]),
    max_size=12,
).map("".join)


def byte_level() -> HFTokenizer:
    tokenizer = HFTokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERNS["qwen2"].regex), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return tokenizer


def llama_like() -> HFTokenizer:
    """Return a tokenizer like Llama 2's SentencePiece: byte fallback, a leading space, <s> from the post-processor."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, "▁", *"abcdehnot", "▁a", "th", "he", "▁t"]
    merges = [("▁", "a"), ("t", "h"), ("h", "e"), ("▁", "t")]
    vocab = {piece: k for k, piece in enumerate(pieces)}
    tokenizer = HFTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def saved(folder: Path, tokenizer: HFTokenizer, config: dict | None) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    config = {"bos_token": None, "eos_token": "<|endoftext|>", "chat_template": "{{ messages }}"}
    return saved(tmp_path_factory.mktemp("ours"), byte_level(), config)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    return saved(tmp_path_factory.mktemp("llama"), llama_like(), config)


@pytest.fixture(scope="module", params=["ours", "llama"])
def either(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


# ---- text to ids


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(text_of_any_kind, max_size=5))
def test_raw_text_gives_no_special_token_and_comes_back(either, texts):
    ids, lengths = either.encode_batch(texts)
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64
    assert not set(ids.tolist()) & set(either.specials.values())
    parts = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    for text, part in zip(texts, parts, strict=True):
        assert part.tolist() == either.encode(text)
        # SentencePiece writes spaces as U+2581 and cannot distinguish the two
        assert either.decode(part) == (text.replace("▁", " ") if either.add_bos else text)


@cache
def encode_batch(name: str, path: Path) -> backends.EncodeBatch:
    pytest.importorskip(name)
    return getattr(backends, name)(path.read_bytes())


@pytest.mark.parametrize("name", ["gigatoken", "fastokens"])
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(text_of_any_kind, min_size=1, max_size=5))
def test_each_backend_gives_the_ids_of_tokenizers(ours, name, texts):
    assert backends.same_ids(encode_batch(name, ours.path), ours._reference, texts)


def test_gigatokens_own_threads_give_the_same_ids(ours, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(backends, "GIGATOKEN_THREADS_FROM_BYTES", -1)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    texts = backends.proof_texts(TEXTS * 20, SPECIALS)
    assert backends.same_ids(backends.gigatoken(ours.path.read_bytes()), ours._reference, texts)
    assert "awkward" in sys.modules


def wrong(tokenizer_json: bytes) -> backends.EncodeBatch:
    """Make a backend like an old tokie: fast, and rarely wrong."""
    right = backends.TokenizersBackend(tokenizer_json)

    def encode_batch(texts):
        ids, lengths = right.encode_batch(texts)
        return np.where(ids == ids.max(initial=0), 0, ids), lengths

    return encode_batch


def panics(tokenizer_json: bytes) -> backends.EncodeBatch:
    raise type("PanicException", (BaseException,), {})("pattern not supported\nat src/lib.rs:1")


def absent(tokenizer_json: bytes) -> backends.EncodeBatch:
    raise ImportError


def test_a_backend_that_is_wrong_absent_or_refuses_is_passed_over(ours, monkeypatch):
    monkeypatch.setattr(backends, "FASTEST_FIRST", (wrong, panics, absent))
    tokenizer = load_tokenizer(ours.path)
    ids, _ = tokenizer.encode_batch(["the cat", "sat"])
    assert tokenizer.backend == "tokenizers"
    assert ids.tolist() == [*ours.encode("the cat"), *ours.encode("sat")]


def test_a_lone_surrogate_is_a_user_error(ours):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        ours.encode("ab\ud800")
    for only in ("gigatoken", "fastokens", "tokenizers"):
        tokenizer = load_tokenizer(ours.path)
        tokenizer.choose_backend([], only=only)
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizer.encode_batch(["ab", "\udfff"])
    with pytest.raises(UserError, match="lone surrogate"):
        load_tokenizer(ours.path).encode_batch(["ab", "\udfff"])


# ---- ids to text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decoding_any_ids_is_decoding_by_tokenizers(ours, data):
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30))
    assert ours.decode(ids) == ours._reference.tokenizer.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, skip_specials=True) == ours._reference.tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(text_of_any_kind, max_size=4), ids=st.lists(st.integers(0, 300), max_size=20))
def test_a_stream_says_the_same_as_decoding_at_once(either, texts, ids):
    tokens = [token for text in texts for token in [*either.encode(text), *either.specials.values()]] + ids
    stream = either.stream()
    assert "".join(stream.push([token]) for token in tokens) + stream.finish() == either.decode(tokens)


def test_a_stream_holds_back_a_character_until_it_is_whole(ours):
    ids = ours.encode("👍")
    assert len(ids) == 4
    stream = ours.stream()
    assert [stream.push([token]) for token in ids] == ["", "", "", "👍"]
    stream.push(ids[:2])
    assert stream.finish() == "\ufffd"


def test_a_stream_after_a_prompt_keeps_the_space_between(llama):
    prompt, more = llama.encode_prompt("a then"), llama.encode("the")
    assert llama.decode(more) == "the"
    assert llama.stream(after=prompt).push(more) == " the"


def test_ids_without_a_token_decode_to_nothing(ours):
    # a model's vocabulary is padded to a multiple of 64
    assert ours.decode([*ours.encode("cat"), ours.vocab_size + 5]) == "cat"


# ---- tokenizer folders


def test_vocabulary_and_specials(ours):
    text_ids = ours.vocab_size - 3
    assert text_ids == byte_level().get_vocab_size() - 3 > 256
    assert ours.specials == {name: text_ids + k for k, name in enumerate(SPECIALS)}
    assert ours.end_of_text_id == ours.eos_id == text_ids
    assert ours.document_bounds() == (text_ids, text_ids)
    assert ours.chat_template == "{{ messages }}"
    assert len(ours.sha256) == 64


def test_the_beginning_token_is_set_once(llama):
    assert (llama.bos_id, llama.eos_id, llama.add_bos) == (1, 2, True)
    ids = llama.encode("a")
    assert 1 not in ids
    assert llama.encode_prompt("a") == [1, *ids]
    assert llama.encode_prompt("<s>a").count(1) == 1
    assert llama.document_bounds() == (1, 2)


@pytest.mark.parametrize(
    ("config", "bos"),
    [
        (None, 1),  # set by the post-processor of tokenizer.json
        ({"bos_token": "<s>"}, 1),
        ({"bos_token": "<s>", "add_bos_token": True}, 1),
        ({"bos_token": "<s>", "add_bos_token": False}, None),
        ({"add_bos_token": False}, None),
    ],
)
def test_the_config_decides_about_the_beginning_token(tmp_path, config, bos):
    tokenizer = saved(tmp_path, llama_like(), config)
    assert tokenizer.encode_prompt("a")[0] == (bos if bos is not None else tokenizer.encode("a")[0])
    assert tokenizer.end_of_text_id == 2


def test_a_tokenizer_without_an_end_cannot_pretrain(tmp_path):
    tokenizer = byte_level()
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"no end-of-text token: expected <\|endoftext\|>"):
        load_tokenizer(tmp_path).document_bounds()


def test_non_special_added_tokens_are_part_of_the_text(tmp_path):
    # GPT-NeoX has runs of spaces as added tokens
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    loaded = saved(tmp_path, tokenizer, None)
    ids, _ = loaded.encode_batch(["a    b <|endoftext|>"])
    assert loaded.vocab_size - 1 in ids and loaded.end_of_text_id not in ids
    assert "    " not in loaded.specials


def test_an_invalid_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with tokenizer\.json, found nothing"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.json: expected a folder with tokenizer\.json, found nothing"):
        load_tokenizer(tmp_path / "nowhere.json")
    for content in ("", "{}", "[1]", '{"model": {"type": "BPE", "vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json that tokenizers can read"):
            load_tokenizer(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:1: expected JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["gpt-neox-20b", "minimind"])
def test_foreign_tokenizers_are_encoded_by_a_fast_backend(shared_data, name):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / f"{name}.tokenizer.json")
    texts = [*backends.HOSTILE, "<|endoftext|> plain <|padding|>"]
    ids, lengths = tokenizer.encode_batch(texts)
    assert not set(ids.tolist()) & set(tokenizer.specials.values())
    assert lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]


# ---- files saved with a model


@pytest.mark.parametrize("step", [None, processors.ByteLevel(trim_offsets=False)])
def test_a_copy_begins_a_text_in_transformers_as_its_config_says(tmp_path, step):
    from transformers import AutoTokenizer

    tokenizer = byte_level()
    if step is not None:
        tokenizer.post_processor = step
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[0]}
    asked, unasked, out = tmp_path / "asked", tmp_path / "unasked", tmp_path / "out"
    for folder in (asked, unasked, out):
        folder.mkdir()
    ours = saved(asked, tokenizer, {**config, "add_bos_token": True})
    ours.copy_to(out)
    copied, theirs = load_tokenizer(out), AutoTokenizer.from_pretrained(out)
    assert theirs("the cat").input_ids == ours.encode_prompt("the cat") == copied.encode_prompt("the cat")
    assert theirs("the cat", "a dog").input_ids == ours.encode_prompt("the cat") + ours.encode_prompt("a dog")
    assert copied.encode("the cat") == ours.encode("the cat") and copied.same_vocabulary(ours)
    copied.copy_to(out)
    assert load_tokenizer(out).sha256 == copied.sha256
    saved(unasked, tokenizer, config).copy_to(out)
    assert (out / "tokenizer.json").read_bytes() == (unasked / "tokenizer.json").read_bytes()
