"""llama.cpp runs the files of `llmkit export --format gguf` with the same tokens, logits and greedy answers.

pip install llama-cpp-python     # builds llama.cpp
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from exportable import FAMILIES, save_assistant

from llmkit.formats.conversations import message
from llmkit.generation.generator import Generator
from llmkit.generation.next_token import Sampling
from llmkit.generation.requests import Request
from llmkit.model.config import RopeScaling
from llmkit.model.folder import load_model
from llmkit.stages import export
from llmkit.tokenizer.backends import HOSTILE
from llmkit.tokenizer.chat import ChatFormat
from llmkit.tokenizer.encoding import load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
pytestmark = pytest.mark.slow

QUESTIONS = ("What is blue?", "What is ship?", "Hello")
STARTS = ("The old ship", "stones while a birds", "green sang")
ENGLISH = (
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
    "3 33 333 3333 3.3 3..3 1,000,000 0x1F 2e-5 12:30", "ends in space ", "   leading", "\ttab\r\n\r\n  \n", "a  b   c",
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙", "<|im_start|>user<|im_sep|>x<|im_end|>",
    "<|endoftext|>", "<|reserved_0|> <|python_start|>1<|python_end|>", "don't DON'T don\u2019t", "...!!!???",
    "</s><s><unk>", "#$%&*+,-./",
    "naïve café Ångström", "ещё нещо на Български", "我想在apple工作1314151天", "កាន់តែពិសេសអាច😁 ?", "e\u0301 n\u0303",
)  # fmt: skip


def odd_texts() -> list[str]:
    """Return every character up to U+02FF alone and in context, contractions, digits, spaces, and random mixtures."""
    rng = random.Random(0)
    letters = [chr(code) for code in range(0x300)]
    parts = [*letters, *ENGLISH, " ", "  ", "\n", "\n\n", "'s", "'LL", "9", "日本", "🙂"]
    drawn = ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(600)]
    return [*letters, *(f"a{one}b" for one in letters), *(f" {one} 1" for one in letters), *ENGLISH, *HOSTILE, *drawn]


def exported(folder: Path, dtype: str = "auto"):
    out = folder.with_name(f"{folder.name}-{dtype}.gguf")
    export.run(export.ExportConfig(model=str(folder), format="gguf", dtype=dtype, out=str(out), quiet=True, force=True))
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # its cache is float16 otherwise
    return llama_cpp.Llama(str(out), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **exact)


def their_logits(llama, ids: list[int]) -> torch.Tensor:
    llama.reset()
    llama.eval(ids)
    return torch.tensor(np.array(llama.scores[: len(ids)]))


def our_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(folder)
    with torch.no_grad():
        return model.logits(model(torch.tensor([ids])))[0]


def their_greedy(llama, ids: list[int], count: int, ends: tuple[int, ...]) -> list[int]:
    said: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        said.append(token)
        if len(said) == count or token in ends:
            return said
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base/ and chat/, trained until they generate text."""
    folder = tmp_path_factory.mktemp("made")
    pipeline.make_models(folder, pretrain_steps=60, sft_steps=120)
    return folder


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    asked = [tokenizer.encode_prompt(text) for text in STARTS]
    if folder.name == "chat":
        chat = ChatFormat(tokenizer)
        asked += [chat.encode([message("user", text)], prompt=True).token_ids.tolist() for text in QUESTIONS]
    return asked


def our_greedy(folder: Path, asked: list[list[int]], count: int) -> list[list[int]]:
    generator = Generator(load_model(folder), load_tokenizer(folder), Sampling(temperature=0.0))
    return [
        list(samples[0].token_ids) for samples in generator.complete([Request(ids, max_tokens=count) for ids in asked])
    ]


# ---- generation


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_greedy_tokens_are_ours(made: Path, kind: str) -> None:
    folder = made / kind
    llama, asked = exported(folder, "float32"), prompts(folder)
    ends = load_model(folder).config.eos_token_id
    ends = ends if isinstance(ends, tuple) else (ends,)
    expected = our_greedy(folder, asked, 40)
    found = [their_greedy(llama, ids, 40, ends) for ids in asked]
    strip = [[token for token in one if token not in ends] for one in found]
    assert strip == [[token for token in one if token not in ends] for one in expected]
    assert max(map(len, found)) > 10 or kind == "chat"
    for ids in asked:
        assert (their_logits(llama, ids) - our_logits(folder, ids)).abs().max() < 1e-3


@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.05), ("float16", 0.01), ("q8_0", 0.05)])
def test_narrow_files_are_near(made: Path, dtype: str, off: float) -> None:
    folder = made / "chat"
    llama = exported(folder, dtype)
    for ids in prompts(folder):
        expected, found = our_logits(folder, ids), their_logits(llama, ids)
        assert (found - expected).abs().max() < off * expected.abs().max()
    assert llama.metadata["general.architecture"] == "qwen3"


ROPES = {
    "llama3": {**FAMILIES["llama"], "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=64, attention_factor=1.2)},
    "window": {**FAMILIES["mistral"], "layer_windows": (128, 128)},
}


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
def test_every_family_has_our_logits(tmp_path: Path, name: str) -> None:
    folder = save_assistant(tmp_path / "chat", **{**FAMILIES, **ROPES}[name])
    ids = torch.randint(0, 300, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = our_logits(folder, ids)
    assert (their_logits(exported(folder), ids) - expected).abs().max() < 1e-3 * expected.abs().max()


# ---- tokenization


@pytest.mark.parametrize("pattern", ["qwen2", "gpt2", "llama3"])
def test_every_text_has_our_tokens(tmp_path: Path, pattern: str) -> None:
    folder = save_assistant(tmp_path / "chat", pattern)
    llama, tokenizer = exported(folder), load_tokenizer(folder)
    other = [
        (text, tokenizer.encode(text), found)
        for text in odd_texts()
        if (found := llama.tokenize(text.encode(), add_bos=False, special=False)) != tokenizer.encode(text)
    ]
    assert other == []


def test_documents_begin_as_ours_and_conversations_do(made: Path) -> None:
    base, chat = exported(made / "base"), exported(made / "chat")
    tokenizer = load_tokenizer(made / "base")
    assert base.tokenize(b"The old ship", add_bos=True) == tokenizer.encode_prompt("The old ship")
    assert base.token_bos() == base.token_eos() == tokenizer.specials["<|endoftext|>"]
    asked = [message("system", "Be brief."), message("user", "2+2?")]
    expected = ChatFormat(load_tokenizer(made / "chat")).encode(asked, prompt=True).token_ids.tolist()
    text = "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>2+2?<|im_end|>"
    text += "<|im_start|>assistant<|im_sep|>"
    # like llama.cpp's programs: the beginning as the file specifies, and special tokens parsed
    assert chat.tokenize(text.encode(), add_bos=True, special=True) == expected


def test_the_chat_template_gives_our_tokens(made: Path) -> None:
    llama, folder = exported(made / "chat"), made / "chat"
    template = llama.metadata["tokenizer.chat_template"]
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(template, "<|endoftext|>", "<|endoftext|>")
    asked = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "What is blue?"}]
    ids = llama.tokenize(formatter(messages=asked).prompt.encode(), add_bos=False, special=True)
    expected = ChatFormat(load_tokenizer(folder)).encode(
        [message(**{"role": m["role"], "text": m["content"]}) for m in asked], prompt=True
    )
    assert ids == expected.token_ids.tolist()
    answer = llama.create_chat_completion(asked, temperature=0, max_tokens=40)["choices"][0]
    ours = load_tokenizer(folder).decode(our_greedy(folder, [ids], 40)[0], skip_specials=True)
    assert answer["message"]["content"] == ours and answer["finish_reason"] == "stop" and ours


def test_llama_s_own_form_of_tokenizer(shared_data: Path, tmp_path: Path, capsys) -> None:
    import json
    import shutil

    folder = tmp_path / "story-llama"
    shutil.copytree(shared_data / "ckpt" / "story-llama", folder)
    llama, tokenizer = exported(folder), load_tokenizer(folder)
    row = json.loads((shared_data / "ckpt" / "story-llama.greedy-expected.json").read_text())
    ids, expected = tokenizer.encode_prompt(row["prompt"]), row["greedy_ids"]
    assert llama.tokenize(row["prompt"].encode(), add_bos=True, special=False) == ids == expected[: len(ids)]
    assert their_greedy(llama, ids, len(expected) - len(ids), ()) == expected[len(ids) :]
    assert "the vocabulary lacks 256 of 256 bytes" in capsys.readouterr().err
    known = {text for text in tokenizer.content["model"]["vocab"] if len(text) == 1} | {" "}
    drawn = random.Random(0)
    words = [row["text"][start : start + drawn.randint(1, 40)] for start in range(0, 400, 3)]
    words += ["".join(drawn.choices(sorted(known - {"\u2581"}), k=drawn.randint(1, 20))) for _ in range(300)]
    words = [text for text in words if set(text) <= known and "<" not in text]
    assert len(words) > 300
    for text in words:
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text), text
