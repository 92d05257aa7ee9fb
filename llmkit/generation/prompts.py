"""Requests from the records of a run, and records from their completions.

A request's number comes from its tokens, not from its position: other records do not change its text. Prompt or
messages and the seed identify a record; a resumed run finds by these which records an unfinished output already holds.

A base model continues the document that it sees. Given a document of questions and answers (`with_shots`), it continues
with an answer.
"""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from llmkit.errors import Interrupted, UserError, naming
from llmkit.formats.conversations import Conversation, find_prompt, read_conversation, read_messages
from llmkit.generation.next_token import request_number, seed_of_repeat
from llmkit.generation.requests import Completion, Prompt, Request
from llmkit.generation.sampler import Sampler
from llmkit.io.files import PARTIAL, check_file, create, cut_torn_line, errors_name, replace_file
from llmkit.io.jsonl import PACKED, dump_json, json_row, open_bytes, read_jsonl
from llmkit.io.progress import counted, say
from llmkit.io.records import (
    CHOICES,
    OUTSIDE,
    PROMPT_FIELDS,
    PROMPT_FIRST,
    SAMPLING,
    BadRecords,
    Row,
    fields_of,
    not_used,
    with_made,
)
from llmkit.io.resume import Kept

ASKED, ANSWERED = "Question: ", "Answer: "
STOP = "\n" + ASKED.rstrip()  # where the model would ask the next question itself

# Lin et al. 2023 (arXiv 2312.01552): a few answers in the style of an assistant align a base model about as well as
# tuning does; what they teach is the form.
AS_ASSISTANT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How do I keep bread fresh?", "Wrap it in a cloth or paper bag, and freeze what you will not eat in two days."),
    ("What is 12 times 3?", "12 times 3 is 36."),
    ("Who will win the next election?", "I do not know. Nobody can say that before the votes are counted."),
    ("Say thank you in Spanish.", "Gracias."),
)
IDENTITY = (*PROMPT_FIELDS, "seed")  # what a record that is kept has in common with its input


def load_shots(path: str | None, as_assistant: bool, sampler: Sampler, quiet: bool) -> list[tuple[str, str]]:
    """The examples in a file; or the built-in ones, as many as fit three quarters of the context; or none.

    Raises UserError where not one fits.
    """
    if path is not None:
        conversations = read_jsonl([path], None, read_conversation)
        return shots_of([conversation for conversation in conversations if not conversation.rejected], path)
    shots = list(AS_ASSISTANT) if as_assistant else []
    if not shots or sampler.context is None:
        return shots
    while shots and len(sampler.encode(with_shots(shots, ""))) > 0.75 * sampler.context:
        shots.remove(max(shots, key=lambda shot: len("".join(shot))))
    note = (
        f"{len(shots)} of the {len(AS_ASSISTANT)} built-in examples fit the model's context of {sampler.context} tokens"
    )
    if not shots:
        raise UserError(f"--as-assistant: {note}; give shorter ones by --shots, or take a model with a longer context")
    if len(shots) < len(AS_ASSISTANT):
        say(f"--as-assistant: {note}; --shots takes shorter ones", quiet)
    return shots


def shots_of(conversations: Sequence[Conversation], path: str) -> list[tuple[str, str]]:
    """The first question and its answer of each conversation. Raises UserError for one that has none."""
    shots = []
    for conversation in conversations:
        roles = [turn.role for turn in conversation.messages]
        if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
            raise UserError(f"{conversation.where}: expected a question and an answer")
        start = roles.index("user")
        shots.append((conversation.messages[start].text, conversation.messages[roles.index("assistant", start)].text))
    if not shots:
        raise UserError(f"{path}: expected examples, found none")
    return shots


def with_shots(shots: Sequence[tuple[str, str]], question: str) -> str:
    """A document of questions and answers that ends where the answer to `question` begins."""
    pairs = "".join(f"{ASKED}{query}\n{ANSWERED}{answered}\n\n" for query, answered in shots)
    return f"{pairs}{ASKED}{question}\n{ANSWERED.rstrip()}"


class Prompts:
    """The requests of a run, made as they are asked for; `waiting` has the records of those not completed.

    rows        with `prompt` or `messages`; their own `seed` is used where `own_seeds` says so
    sampler     encodes them; a prompt, with the `shots` before it, that is longer than its context is a bad record
    samples, max_tokens, seed  of each request
    shots       examples before the text of a prompt; without them an assistant is asked the text of other fields than
                `prompt`, such as `question`
    bad         skips bad records; without it, the first raises UserError
    """

    def __init__(
        self,
        rows: Iterable[Row],
        sampler: Sampler,
        *,
        samples: int,
        max_tokens: int | None,
        seed: int,
        own_seeds: bool,
        shots: Sequence[tuple[str, str]] = (),
        bad: BadRecords | None = None,
    ) -> None:
        self._given, self._sampler, self._shots = rows, sampler, shots
        self._samples, self._max_tokens, self._seed, self._own_seeds = samples, max_tokens, seed, own_seeds
        self._bad = BadRecords() if bad is None else bad
        self.kept: _Former | None = None  # what is made already
        self.waiting: deque[tuple[Row, int]] = deque()  # the record and the seed of each request not completed
        self._seen: Counter[int] = Counter()
        self.count = self.passed = self.kept_tokens = 0  # prompts made, prompts kept, and tokens of these

    def __iter__(self) -> Iterator[Request]:
        for row in self._given:
            where = row.where
            try:
                with naming(where):
                    ids, losses = self._ids(row)
                    number = request_number(ids)
                    seed = self._seed_of(row, number, where)
            except UserError as error:
                self._bad.skip(error, row.path, was_good=True)
                continue
            self._bad.count_unused(row.path, losses)
            if self.kept is not None and self.kept.has({**row.value, "seed": seed}, where):
                self.passed += 1
                continue
            self.waiting.append((row, seed))
            self.count += 1
            yield Request(ids, self._samples, self._max_tokens, seed, number, where)
        for name in {tally.name: None for tally in self._bad.tallies}:
            self._bad.report(name)
        if self.kept is not None:
            self.kept.check_all_found()

    @property
    def left_out(self) -> dict[str, Any]:
        """Count the records that were skipped, and the fields of others that are not used."""
        return self._bad.results

    def _seed_of(self, row: Row, number: int, where: str) -> int:
        seed = row.value.get("seed") if self._own_seeds else None
        if seed is None:
            seed = seed_of_repeat(self._seed, self._seen[number])
            self._seen[number] += 1
        elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"{where}: expected 'seed' to be a whole number from 0 to 2^63-1, found {seed!r}")
        return seed

    def _ids(self, row: Row) -> tuple[Prompt, tuple[str, ...]]:
        """Encode the prompt of a record; the second value names the fields that are not used."""
        prompt = find_prompt(row, PROMPT_FIRST)
        if prompt is None:
            raise UserError(
                f"{row.where}: expected field 'prompt' or 'messages' (a prompt), found {fields_of(row.value)}"
            )
        lost: list[str] = []
        alone = len(prompt.entries) == 1 and not isinstance(row.value[prompt.name], list)
        asks = prompt.name != "prompt" and not self._shots and self._sampler.is_assistant
        if alone and not asks:
            text = prompt.entries[0]["content"]
            ids = self._sampler.encode(with_shots(self._shots, text) if self._shots else text)
        else:
            messages = read_messages(row, prompt.entries, lost)
            if messages[-1].role != "user":
                raise UserError(
                    f"{row.where}: expected messages that end with the user's, found the {messages[-1].role}'s last"
                )
            ids = self._sampler.encode(messages)
        context, tokenizer = self._sampler.context, self._sampler.tokenizer
        if context is not None and len(ids) >= context:
            of = f" with its {counted(len(self._shots), 'example')}" if self._shots else ""
            raise UserError(
                f"{row.where}: the prompt{of} is {counted(len(ids), 'token')} long and the model's context is "
                f"{context}, a new token included; {'give shorter --shots, or ' if of else ''}shorten the prompt"
            )
        if tokenizer is not None and tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            lost.append(OUTSIDE)
        return ids, (*lost, *not_used(row.value, prompt.used, (*PROMPT_FIELDS, *CHOICES, *SAMPLING)))


def completion_record(
    row: Row, completion: Completion, seed: int, sample: int | None, logprobs: bool, tools: bool
) -> dict[str, Any]:
    """Join the record of a prompt with one completion (`with_made`)."""
    fields: dict[str, Any] = {"completion": completion.text}
    known = {"token_ids": completion.token_ids}
    if logprobs:
        known |= {"logprobs": completion.logprobs, "truncated_logprobs": completion.truncated_logprobs}
    fields |= {name: values for name, values in known.items() if values}  # a server need not tell
    if tools:
        fields |= {"sampled": completion.sampled, "tool_calls": completion.tool_calls}
    fields |= {"finish_reason": completion.finish_reason, "seed": seed}
    return with_made(row.value, fields if sample is None else {**fields, "sample": sample})


# ---- an output that outlives a kill


class _Former:
    """Records of an unfinished file, in the order of its input."""

    def __init__(self, records: Iterator[dict[str, Any]], partial: Path) -> None:
        self._records, self._partial = records, partial

    def has(self, record: dict[str, Any], where: str) -> bool:
        """True if a record has been made; `record` names its seed. Raises UserError where another one stands."""
        existing = next(self._records, None)
        if existing is not None and _identity(existing) != _identity(record):
            raise UserError(f"{where}: {self._partial} was made of another prompt or --seed; start again with --force")
        return existing is not None

    def check_all_found(self) -> None:
        """Raises UserError where the file holds what was not asked for."""
        if next(self._records, None) is not None:
            raise UserError(
                f"{self._partial}: holds completions of prompts that the input does not have; start again with --force"
            )


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in IDENTITY if name in record}


@contextmanager
def lasting_output(
    out: str, prompts: Prompts, samples: int, resume: bool, identity: Mapping[str, Any]
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Write a file `out` + ".partial" that becomes `out` at the end; its whole lines stay if this run ends early.

    With `resume` the whole prompts of a former one are kept. `identity` decides the text beside the prompts,
    JSON values by the names that a user knows: noted beside the file, with a checksum of its lines, and compared
    on resuming. Raises UserError where one of them differs, Interrupted where Ctrl-C ends the run.
    """
    partial, notes = Path(out + PARTIAL), Path(out + PARTIAL + ".state")
    if resume and partial.exists():
        check_file(partial)
        if partial.stat().st_size and not (notes.exists() and notes.stat().st_size):
            raise UserError(f"{partial}: no notes of this unfinished run stand at {notes}; start again with --force")
        resume = notes.exists()
    else:
        if resume:
            say(f"--resume: nothing stands at {partial} yet, so the run starts")
        resume = False
        create(partial).close()
        Path(out + PARTIAL + ".json").unlink(missing_ok=True)  # the notes of an older version
    state = Kept(notes, identity, resume=resume)
    try:
        with errors_name(out, partial), _whole_prompts(partial, state, prompts, samples) as write:
            yield write
    except BaseException as error:
        if not partial.stat().st_size:
            partial.unlink()
            state.remove()
        elif isinstance(error, (KeyboardInterrupt, UserError)) and "start again with --force" not in str(error):
            interrupted = isinstance(error, KeyboardInterrupt)
            text = f"{'interrupted' if interrupted else error}; the same command with --resume goes on ({partial})"
            raise (Interrupted if interrupted else UserError)(text) from None
        raise
    if out.lower().endswith(PACKED):
        packed = f"{out}.packed{Path(out).suffix}"
        with errors_name(out, packed), open_bytes(packed) as handle, partial.open("rb") as plain:
            shutil.copyfileobj(plain, handle)
        replace_file(packed, out)
        partial.unlink()
    else:
        replace_file(partial, out)
    state.remove()


@contextmanager
def _whole_prompts(
    partial: Path, state: Kept, prompts: Prompts, samples: int
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Write behind the prompts all of whose samples are in the file, each line before its checksum is noted.

    Lines without one are kept where nothing is noted, else not: a kill came between.
    """
    checksums: dict[int, str] = {}  # of the first lines, by their number
    for lines, noted in state.items():
        while checksums and next(reversed(checksums)) >= int(lines):  # a resumed run has cut the file there
            checksums.popitem()
        checksums[int(lines)] = noted.decode()
    most = max(checksums, default=0)
    with partial.open("r+b") as handle:
        cut_torn_line(handle)
        handle.seek(0)
        end = whole = count = tokens = 0
        checksum = digest = ""
        for number, line in enumerate(handle, 1):
            if state and number > most:
                break
            digest = _checksum(digest, line)
            if checksums.get(number, digest) != digest:
                raise UserError(
                    f"{partial}:{number}: damaged or edited; keep the lines before it alone, "
                    "or start again with --force"
                )
            end += len(line)
            tokens += len(orjson.loads(line).get("token_ids", ()))
            if number % samples == 0:
                whole, count, checksum, prompts.kept_tokens = end, number, digest, tokens
        handle.truncate(whole)
        handle.seek(whole)
        state.add(str(count), checksum.encode())

        def write(record: dict[str, Any]) -> None:
            nonlocal count, checksum
            line = dump_json(record) + b"\n"
            handle.write(line)
            handle.flush()
            count, checksum = count + 1, _checksum(checksum, line)
            state.add(str(count), checksum.encode())

        with partial.open("rb") as former:
            firsts = islice(former, 0, None, samples)
            records = (row.value for line in firsts if (row := json_row(line, str(partial), 2)) is not None)
            prompts.kept = _Former(records, partial)
            yield write


def _checksum(before: str, line: bytes) -> str:
    """Return the checksum of a line chained to the one before it."""
    return blake2b(before.encode() + line, digest_size=8).hexdigest()
