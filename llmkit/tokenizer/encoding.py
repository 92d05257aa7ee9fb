"""Encode text with a tokenizer.json, and decode ids.

    tokenizer = load_tokenizer("tok/")
    ids, lengths = tokenizer.encode_batch(["Hello", "a literal <|im_start|> stays text"])
    tokenizer.decode(ids)

Raw text never becomes a special token: only code can insert one, by its id in `tokenizer.specials`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from llmkit.errors import UserError
from llmkit.io.files import atomic_file, check_file, read_file
from llmkit.io.foreign import LARGEST_TOKENIZER, check_no_adapter, check_tokenizer, shown, switch
from llmkit.io.hub import local_folder
from llmkit.io.jsonl import read_object
from llmkit.tokenizer.backends import TokenizersBackend, fastest_proven, proof_texts
from llmkit.tokenizer.patterns import byte_alphabet

END_OF_TEXT = "<|endoftext|>"  # begins and ends every document in our own tokenizers
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # if tokenizer_config.json names none
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
MORE_TEMPLATES = "additional_chat_templates"  # a folder name of transformers
_TERMS = re.compile(
    r"(licen[cs]e|notice|copying|copyright|(acceptable[-_ ])?use[-_ ]policy|usage[-_ ]policy|terms)([-_. ].*)?",
    re.IGNORECASE,
)
THOUGHTS = ("<think>", "</think>")  # special tokens in some tokenizers, but always decoded
RESERVED = "\ufde4\ufde5"  # noncharacters that enclose the number of a stand-in
_RESERVED = re.compile(f"[{RESERVED}]")

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# (special token, text, special token); "" for no token
EnclosedText = tuple[str, str, str]
OTHER_FORMS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "vocab.txt", "tiktoken.model")


class Tokenizer:
    """A tokenizer.json with the settings of its tokenizer_config.json.

    path             the tokenizer.json
    vocab_size       one more than the largest id, specials included
    specials         text of each special token -> id
    bos_id, add_bos  the beginning-of-sequence token, and whether prompts start with it
    unk_id           the token for characters outside the vocabulary, or None
    eos_id, pad_id   the configured end of a text or turn, and padding
    end_of_text_id   the end of a document
    chat_template    Jinja source, or None
    template_values  variables of the template other than messages, such as enable_thinking
    sha256           of the bytes of tokenizer.json
    backend          the library that encodes batches: `tokenizers` until a faster one has given the same ids
    """

    def __init__(self, path: Path, data: bytes, config: dict[str, Any], chat_template: str | None) -> None:
        try:
            spec = orjson.loads(data)
            check_tokenizer(spec, str(path))
            self._reference = TokenizersBackend(data)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json that tokenizers can read: {str(error)[:200]}") from None
        self.path, self.config, self.chat_template = path, config, chat_template
        self.template_values: dict[str, Any] = {}
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._data, self._encode_batch, self.backend = data, None, "tokenizers"
        added = spec.get("added_tokens") or []
        self._added: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._stripping = {token["content"] for token in added if any(token.get(flag) for flag in _FLAGS[:3])}
        vocab = spec["model"]["vocab"]
        last = len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1)
        self.vocab_size: int = 1 + max(last, *self._added.values(), -1)
        self.specials = {token["content"]: token["id"] for token in added if token["special"]}
        unknown = spec["model"].get("unk_token" if isinstance(vocab, dict) else "unk_id")
        self.unk_id: int | None = vocab.get(unknown) if isinstance(vocab, dict) else unknown
        steps = spec.get("pre_tokenizer") or {}
        kinds = {step.get("type") for step in steps.get("pretokenizers", [steps])}
        normal = (spec.get("normalizer") or {}).get("type")
        self._bytewise = kinds <= {"ByteLevel", "Split", "Digits"} and normal in (None, "NFC", "NFKC", "NFD", "NFKD")
        decoder = spec.get("decoder") or {}
        self._decoders: list[dict[str, Any]] = decoder.get("decoders", [decoder])
        self._strips_first_space = any(
            (step.get("type") == "Strip" and step.get("start"))
            or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in self._decoders
        )
        written, where = _template_bos(spec.get("post_processor"), path), f"{path.parent}/tokenizer_config.json"
        bos = self._configured("bos_token", where)
        if config.get("add_bos_token") is not None:  # otherwise tokenizer.json decides
            self.add_bos = switch(config, "add_bos_token", where)
        else:
            self.add_bos = written is not None
        self.bos_id = written if bos is None and self.add_bos else bos
        self.add_bos = self.add_bos and self.bos_id is not None
        self._begins_as_config = written == (self.bos_id if self.add_bos else None)
        self.eos_id, self.pad_id = self._configured("eos_token", where), self._configured("pad_token", where)
        named = next((self.specials[name] for name in END_NAMES if name in self.specials), None)
        self.end_of_text_id = self.specials.get(END_OF_TEXT, named if self.eos_id is None else self.eos_id)

    def _configured(self, key: str, where: str) -> int | None:
        token = self.config.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: expected a token's text for {key}, found {shown(token)}")
        return None if text is None else self._reference.tokenizer.token_to_id(text)

    @property
    def content(self) -> dict[str, Any]:
        """The tokenizer.json, parsed."""
        return orjson.loads(self._data)

    # ---- text to ids

    def check_fits(self, vocab_size: int) -> None:
        """Raise UserError if the tokenizer has more tokens than a model's `vocab_size`."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.path}: the tokenizer has {self.vocab_size} tokens and the model {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """Return True if both have the same tokens with the same ids."""
        vocabularies = [tokenizer._reference.tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (self, other)]
        return self.sha256 == other.sha256 or vocabularies[0] == vocabularies[1]

    def choose_backend(self, documents: Sequence[str], only: str | None = None) -> None:
        """Choose the fastest library, or only the one named, that encodes these documents correctly."""
        texts = proof_texts(documents, list(self._added)[:64])
        self.backend, self._encode_batch = fastest_proven(self._data, self._reference, texts, only)

    def encode(self, text: str) -> list[int]:
        """Encode one text as plain text, without adding special tokens."""
        return self._reference.encode(check_text(text)).ids

    def encodes_alone(self, specials: Iterable[str]) -> bool:
        """Return True if a text between these special tokens has the same ids as on its own."""
        return self._bytewise and self._stripping.isdisjoint(specials)

    def with_stand_ins(self, specials: Iterable[str]) -> StandIns:
        """Return a tokenizer for rendered texts, in which stand-ins replace the special tokens.

        For the class LlamaTokenizer it has the steps that transformers 5 uses instead of those in tokenizer.json.
        """
        spec, beside = self.content, self.path.with_name("config.json")
        family = read_object(beside).get("model_type") if beside.is_file() else None
        steps = orjson.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
        named = str(self.config.get("tokenizer_class")).removesuffix("Fast")
        if named != "LlamaTokenizer" or family == "mistral" or b'"ByteLevel"' in steps:
            return StandIns(self._data, specials)
        scheme = "always" if self.config.get("legacy") else "first"
        scheme = "never" if self.config.get("add_prefix_space") is False else scheme
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        return StandIns(orjson.dumps({**spec, "normalizer": None, "pre_tokenizer": metaspace}), specials)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts to their concatenated ids (uint32) and the number of ids of each text (int64).

        The first call chooses the backend. Raise UserError for a lone surrogate.
        """
        try:
            if self._encode_batch is None:
                self.choose_backend(texts)
            return (self._encode_batch or self._reference.encode_batch)(texts)
        except (UnicodeEncodeError, TypeError):  # raised by the libraries for a lone surrogate
            for text in texts:
                check_text(text)
            raise

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text to continue, preceded once by the beginning-of-sequence token if the config says so."""
        ids = self.encode(text)
        if not self.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def document_bounds(self) -> tuple[int, int]:
        """Return the id that starts every training document, and the id that its last token must predict.

        In our own tokenizers both are `<|endoftext|>`. Raise UserError if there is no such token.
        """
        end = self.end_of_text_id
        start = self.bos_id if self.add_bos else end
        if end is None or start is None:
            raise UserError(
                f"{self.path}: no end-of-text token: expected {END_OF_TEXT} among the special tokens "
                f"or 'eos_token' in tokenizer_config.json, found {list(self.specials)[:8]}"
            )
        return start, end

    # ---- ids to text

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """Bytes of each id, or None if the decoder does not simply concatenate bytes."""
        kinds = {step.get("type") for step in self._decoders}
        byte_level = kinds == {"ByteLevel"}
        if not byte_level and not (kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}):
            return None
        byte_of, table = dict(byte_alphabet()), []
        for index in range(self.vocab_size):
            piece = self._reference.tokenizer.id_to_token(index) or ""
            if byte_level:
                known = all(character in byte_of for character in piece)
                table.append(bytes(map(byte_of.__getitem__, piece)) if known else piece.encode())
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace("▁", " ").encode())
        return table

    def decode(self, ids: Iterable[int], skip_specials: bool = False) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD, and unknown ids are ignored."""
        stream = self.stream(skip_specials=skip_specials)
        return stream.push(ids) + stream.finish()

    def stream(self, after: Sequence[int] = (), skip_specials: bool = False) -> DecodeStream:
        """Return a stream that decodes ids incrementally after a prompt `after`."""
        return DecodeStream(self, after, skip_specials)

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files and the license files of its folder into a run folder.

        The copied tokenizer.json adds the beginning token as in training: transformers 5 ignores `add_bos_token`.
        """
        copy_companions(self.path.parent, folder)
        if self.path.resolve() != (folder / "tokenizer.json").resolve():
            shutil.copyfile(self.path, folder / "tokenizer.json")
        spec = self.content
        step = spec.get("post_processor")
        names = [name for name, number in self._added.items() if number == self.bos_id]
        if self.add_bos and not self._begins_as_config and names and (step is None or step.get("type") == "ByteLevel"):
            begins = bos_post_processor(names[0], self._added[names[0]])
            spec["post_processor"] = begins if step is None else {"type": "Sequence", "processors": [step, begins]}
            with atomic_file(folder / "tokenizer.json", "w") as handle:
                json.dump(spec, handle, indent=2, ensure_ascii=False)


class StandIns:
    """Encodes text in which special tokens are written as their `stand_ins`.

    Text that spells a special token stays text. The effects of special tokens on their neighbours, such as stripped
    white space or the space before a first word, are kept.
    """

    def __init__(self, data: bytes, specials: Iterable[str]) -> None:
        from tokenizers import AddedToken

        begin, end = RESERVED
        self._backend = TokenizersBackend(data)
        self.stand_ins = {name: f"{begin}{number}{end}" for number, name in enumerate(specials)}
        tokenizer, self.special_ids = self._backend.tokenizer, dict[int, int]()  # id of a stand-in -> id of its token
        for token in orjson.loads(data).get("added_tokens") or []:
            if stand_in := self.stand_ins.get(token["content"]):
                tokenizer.add_tokens([AddedToken(stand_in, **{flag: bool(token.get(flag)) for flag in _FLAGS})])
                number = tokenizer.token_to_id(stand_in)
                assert number is not None
                self.special_ids[number] = token["id"]

    def encode_enclosed(self, texts: Sequence[EnclosedText]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts between special tokens, without the ids of these; returns like `Tokenizer.encode_batch`."""
        wholes = [
            f"{self.stand_ins.get(before, '')}{_RESERVED.sub('', check_text(text))}{self.stand_ins.get(after, '')}"
            for before, text, after in texts
        ]
        ids, lengths = self._backend.encode_batch(wholes)
        keep, ends = ~np.isin(ids, list(self.special_ids)), np.cumsum(lengths)
        kept_before = np.concatenate([[0], np.cumsum(keep)])
        return ids[keep], kept_before[ends] - kept_before[ends - lengths]

    def placed_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Encode a text to (start, end, id), with offsets in characters; tokens of one character share theirs."""
        encoding = self._backend.encode(check_text(text))
        return [(start, stop, token) for (start, stop), token in zip(encoding.offsets, encoding.ids, strict=True)]


class DecodeStream:
    """Incremental decoder: returns text once its bytes are complete, as a character may span several tokens."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], skip_specials: bool) -> None:
        self._tokenizer, self._table = tokenizer, tokenizer.token_bytes
        skipped = (number for name, number in tokenizer.specials.items() if name not in THOUGHTS)
        self._skipped = frozenset(skipped) if skip_specials else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids, self._given = list(after), ""
        self._at_start = True
        if self._table is None:
            self._given = tokenizer._reference.decode(self._ids, skip_specials)
        else:
            self.push(after)
            self._utf8.decode(b"", final=True)

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; return the text that is now complete, possibly empty."""
        if self._table is None:
            # Decoders that do not concatenate, such as WordPiece: decode everything and return what is new.
            self._ids.extend(map(int, ids))  # also numpy's integers
            before, self._given = self._given, self._tokenizer._reference.decode(self._ids, bool(self._skipped))
            return self._given[len(before) :]
        table, size = self._table, len(self._table)
        data = b"".join(table[i] for i in ids if 0 <= i < size and i not in self._skipped)
        return self._trimmed(self._utf8.decode(data))

    def finish(self) -> str:
        """Return the rest: U+FFFD for incomplete characters."""
        return "" if self._table is None else self._trimmed(self._utf8.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        strips = self._at_start and self._tokenizer._strips_first_space and text[:1] == " "
        self._at_start = self._at_start and not text
        return text[1:] if strips else text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json with its tokenizer_config.json, from a file, folder or address.

    Raise UserError if there is none, or if tokenizers cannot read it.
    """
    path = local_folder(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if file.exists():
            check_file(file)
        check_no_adapter(path)
        names = sorted(os.listdir(path)) if path.is_dir() else []
        instead = ", ".join(names[:8]) or "nothing"
        if any(name in OTHER_FORMS or name.endswith(".gguf") for name in names):
            convert = f"AutoTokenizer as T; T.from_pretrained({str(path)!r}).save_pretrained('NEW')"
            makes = f'convert it with transformers: python -c "from transformers import {convert}"'
            raise UserError(f"{path}: expected tokenizer.json, found {instead}; {makes}")
        raise UserError(f"{path}: expected a folder with tokenizer.json, found {instead}")
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if file.with_name(name).exists():
            config |= read_object(file.with_name(name))
    template, jinja = config.get("chat_template"), file.with_name("chat_template.jinja")
    if jinja.exists():
        try:
            template = read_file(jinja).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{jinja}: expected UTF-8, found another encoding at byte {error.start}") from None
    elif isinstance(template, list):  # named templates
        entries = [entry if isinstance(entry, dict) else {} for entry in template]
        if all(isinstance(entry.get(key), str) for entry in entries for key in ("name", "template")):
            template = {entry["name"]: entry["template"] for entry in entries}.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"{file.parent}/tokenizer_config.json: expected a string or a list of named strings for chat_template, "
            f"found {shown(template)}"
        )
    return Tokenizer(file, read_file(file, LARGEST_TOKENIZER), config, template)


def check_text(text: str) -> str:
    """Return `text`. Raise UserError if it is not valid Unicode (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"text is not valid Unicode: lone surrogate {code} at character {error.start}") from None
    return text


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that belong to a tokenizer.json: configuration, chat templates and license files."""
    terms = [path.name for path in source.iterdir() if _TERMS.fullmatch(path.name)]
    templates = [str(path.relative_to(source)) for path in source.glob(f"{MORE_TEMPLATES}/*.jinja")]
    for name in (*COMPANIONS, *sorted(templates), *sorted(terms)):
        if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def bos_post_processor(token: str, number: int) -> dict[str, Any]:
    """Make the post_processor of a tokenizer.json that prepends a special token to each text."""

    def text(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _template_bos(post_processor: dict[str, Any] | None, where: Path) -> int | None:
    """Return the id of the special token that tokenizer.json itself prepends to a text, or None."""
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        first = step["single"][0] if step.get("type") == "TemplateProcessing" and step["single"] else {}
        if "SpecialToken" in first:
            name, known = first["SpecialToken"]["id"], step["special_tokens"]
            if name not in known:
                raise UserError(f"{where}: expected special_tokens of post_processor to contain {shown(name)}")
            return next(iter(known[name]["ids"]), None)
    return None


# ---- constrained decoding by a JSON schema, with llguidance: an Earley parser over a trie of tokens


class JsonConstraint:
    """The state of one text that is constrained to JSON of a schema."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size

    def copy(self) -> JsonConstraint:
        return JsonConstraint(self._matcher.deep_copy(), self._size)

    def allowed(self) -> np.ndarray:
        """Return a mask of the tokens that may come next, bool (V,); end tokens once the JSON is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)

    def take(self, token: int) -> bool:
        """Append an allowed token; return False beyond the parser's limits, when only an end token is allowed."""
        return self._matcher.consume_token(token) and not self._matcher.is_error()


class JsonSchemas:
    """Compiles schemas for a tokenizer whose texts end with one of `end_ids`.

    Raise UserError without llguidance, and for a tokenizer that it cannot read (WordPiece, Unigram with Metaspace).
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._size = tokenizer.vocab_size
        try:
            from llguidance import LLTokenizer

            self._tokens = LLTokenizer(tokenizer.path.read_text("utf-8"), n_vocab=self._size, eos_token=sorted(end_ids))
        except ImportError:
            raise UserError("JSON schemas need the package llguidance; pip install 'llmkit[serve]'") from None
        except ValueError as error:
            raise UserError(f"{tokenizer.path}: llguidance cannot read it: {str(error)[:200]}") from None

    def compile(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """Compile a schema; the JSON has at most one space between its tokens. Raise UserError if it is invalid."""
        from llguidance import LLMatcher

        # with unbounded white space a model may write spaces until max_tokens
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": " ?"})
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"invalid JSON schema: {matcher.get_error()}")
        return JsonConstraint(matcher, self._size)
