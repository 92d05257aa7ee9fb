"""Input records become requests, and completions become output records.

A request's number depends on its tokens, not on its position, so other records do not change its text. Prompt or
messages and the seed identify a record, so that a resumed run knows which ones are done.

A base model continues a document; after few-shot examples (`with_shots`), the continuation is an answer.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from llmkit.errors import UserError, naming
from llmkit.formats.conversations import (
    RESULT,
    TOOL_FIELDS,
    Conversation,
    definitions_of,
    find_prompt,
    read_conversation,
    read_messages,
)
from llmkit.generation.next_token import request_number, seed_of_repeat
from llmkit.generation.requests import OnText, Prompt, Request, split_thoughts
from llmkit.generation.sampler import Sampler
from llmkit.generation.tool_calls import Functions
from llmkit.io.jsonl import dump_json, open_bytes, read_jsonl
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
STOP = "\n" + ASKED.rstrip()  # where the model would write the next question itself

# Lin et al. 2023 (arXiv 2312.01552): a few answers in the style of an assistant align a base model about as well as
# tuning does; they teach the form.
BUILT_IN = "assistant"  # instead of a file; ./assistant is a file
AS_ASSISTANT = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How do I keep bread fresh?", "Wrap it in a cloth or paper bag, and freeze what you will not eat in two days."),
    ("What is 12 times 3?", "12 times 3 is 36."),
    ("Who will win the next election?", "I do not know. Nobody can say that before the votes are counted."),
    ("Say thank you in Spanish.", "Gracias."),
)
IDENTITY = (*PROMPT_FIELDS, "seed")  # what an output record has in common with its input


def load_shots(source: str | None, sampler: Sampler, quiet: bool) -> list[tuple[str, str]]:
    """Read the examples of --shots: a file, or `assistant`, the built-in ones that fit three quarters of the context.

    Raises UserError if none fits.
    """
    if source is None:
        return []
    if source != BUILT_IN:
        conversations = read_jsonl([source], None, read_conversation)
        return shots_of([conversation for conversation in conversations if not conversation.rejected], source)
    shots = list(AS_ASSISTANT)
    if sampler.context is None:
        return shots
    while shots and len(sampler.encode(with_shots(shots, ""))) > 0.75 * sampler.context:
        shots.remove(max(shots, key=lambda shot: len("".join(shot))))
    note = (
        f"{len(shots)} of the {len(AS_ASSISTANT)} built-in examples fit the model's context of {sampler.context} tokens"
    )
    if not shots:
        raise UserError(f"--shots {BUILT_IN}: {note}; use a file of shorter ones or a model with a longer context")
    if len(shots) < len(AS_ASSISTANT):
        say(f"--shots {BUILT_IN}: {note}; use a file of shorter ones to fit more", quiet)
    return shots


def shots_of(conversations: Sequence[Conversation], path: str) -> list[tuple[str, str]]:
    """Return the first question and its answer from each conversation. Raises UserError if one has none."""
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
    """Return a document of questions and answers that ends where the answer to `question` begins."""
    pairs = "".join(f"{ASKED}{query}\n{ANSWERED}{answered}\n\n" for query, answered in shots)
    return f"{pairs}{ASKED}{question}\n{ANSWERED.rstrip()}"


class Prompts:
    """The requests of a run, made lazily, and the records of their completions.

    rows        with `prompt` or `messages`; their own `seed` is used if `own_seeds` is set
    sampler     encodes them; a prompt that, with its `shots`, is longer than the context is a bad record
    samples, max_tokens, seed  of each request
    shots       few-shot examples before a prompt; without them an assistant is asked the text of fields other than
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
        self.kept: Iterator[tuple[str, bytes]] = iter(())  # prompts completed by an earlier run, with their lines
        self._waiting: deque[tuple[Row, int]] = deque()  # record and seed of each request in progress
        self._seen: Counter[int] = Counter()
        self.count = self.passed = self.kept_tokens = 0  # prompts requested, prompts kept, and tokens of the latter

    def __iter__(self) -> Iterator[Request]:
        for row in self._given:
            where = row.where
            try:
                with naming(where):
                    ids, losses, functions = self._ids(row)
                    number = request_number(ids)
                    seed = row.value.get("seed") if self._own_seeds else None
                    if seed is None:
                        seed = seed_of_repeat(self._seed, self._seen[number])
                        self._seen[number] += 1
                    elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                        expected = "expected 'seed' to be a whole number from 0 to 2^63-1"
                        raise UserError(f"{where}: {expected}, found {seed!r}")
            except UserError as error:
                self._bad.skip(error, row.path, was_good=True)
                continue
            self._bad.count_unused(row.path, losses)
            key, lines = next(self.kept, (None, b""))
            if key is not None:  # an earlier run has completed it
                if key != _key({**row.value, "seed": seed}):
                    raise UserError(
                        f"{where}: the unfinished run has another prompt or --seed; start over with --force"
                    )
                self.passed += 1
                self.kept_tokens += sum(len(orjson.loads(line).get("token_ids", ())) for line in lines.splitlines())
                continue
            self._waiting.append((row, seed))
            self.count += 1
            yield Request(ids, self._samples, self._max_tokens, seed, number, where, tools=functions)
        self._bad.report_all()
        if next(self.kept, None) is not None:
            raise UserError("the unfinished run has prompts that the input does not have; start over with --force")

    def completed(
        self, *, logprobs: bool = False, tools: bool = False, on_text: OnText | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield each new prompt's records, one per sample. Raises UserError if a server finds a prompt too long."""
        for samples in self._sampler.complete(self, on_text=on_text):
            row, seed = self._waiting.popleft()
            if not samples:
                raise UserError(
                    f"{row.where}: the prompt, with --max-tokens {self._max_tokens}, is longer than the context of "
                    f"{self._sampler.name}; shorten the prompt"
                )
            records = []
            for number, completion in enumerate(samples):
                thought, answer = split_thoughts(completion.text)
                thought = completion.thought or thought
                fields: dict[str, Any] = {"completion": answer} | ({"reasoning_content": thought} if thought else {})
                known = {"token_ids": completion.token_ids}
                if logprobs:
                    known |= {"logprobs": completion.logprobs, "truncated_logprobs": completion.truncated_logprobs}
                fields |= {name: values for name, values in known.items() if values}  # a server may not return them
                if tools and completion.sampled:
                    fields |= {"sampled": completion.sampled}
                if tools or completion.tool_calls:
                    fields |= {"tool_calls": completion.tool_calls}
                fields |= {"finish_reason": completion.finish_reason, "seed": seed}
                records.append(with_made(row.value, fields | ({"sample": number} if len(samples) > 1 else {})))
            yield records

    @property
    def left_out(self) -> dict[str, Any]:
        """Counts of skipped records and of unused fields."""
        return self._bad.results

    def _ids(self, row: Row) -> tuple[Prompt, tuple[str, ...], Functions | None]:
        """Encode the prompt of a record; return it with the unused fields and the functions that it offers."""
        prompt = find_prompt(row, PROMPT_FIRST)
        if prompt is None:
            raise UserError(
                f"{row.where}: expected field 'prompt' or 'messages' (a prompt), found {fields_of(row.value)}"
            )
        lost: list[str] = []
        used, functions = [*prompt.used], None
        alone = len(prompt.entries) == 1 and not isinstance(row.value[prompt.name], list)
        asks = prompt.name != "prompt" and not self._shots and self._sampler.is_assistant
        if alone and not asks:
            text = prompt.entries[0]["content"]
            ids = self._sampler.encode(with_shots(self._shots, text) if self._shots else text)
        else:
            messages = read_messages(row, prompt.entries, lost)
            last = messages[-1]
            if last.role != "user" and (not last.parts or last.parts[-1].kind != RESULT):
                raise UserError(
                    f"{row.where}: expected the last message to be the user's or a tool's, found the {last.role}'s"
                )
            if (definitions := definitions_of(row.value)) and self._sampler.tools is not None:
                functions = self._sampler.tools.offering(definitions)
                used += TOOL_FIELDS
            ids = self._sampler.encode(messages, functions)
        context, tokenizer = self._sampler.context, self._sampler.tokenizer
        if context is not None and len(ids) >= context:
            of = f" with its {counted(len(self._shots), 'example')}" if self._shots else ""
            raise UserError(
                f"{row.where}: the prompt{of} is {counted(len(ids), 'token')} long and the model's context is "
                f"{context}, including a new token; {'give shorter --shots, or ' if of else ''}shorten the prompt"
            )
        if tokenizer is not None and tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            lost.append(OUTSIDE)
        return ids, (*lost, *not_used(row.value, used, (*PROMPT_FIELDS, *CHOICES, *SAMPLING))), functions


@contextmanager
def lasting_output(
    out: str, path: Path, prompts: Prompts, resume: bool, identity: Mapping[str, Any]
) -> Iterator[Callable[[Sequence[dict[str, Any]]], object]]:
    """Write `out` at the end; until then, keep the records of each prompt in the file `path`.

    `resume` continues with the records of an earlier run. `identity` is what else decides the text, under names that
    users know. Raises UserError if it differs, Interrupted if Ctrl-C ends the run.
    """
    state = Kept(path, identity, resume=resume)
    with state.resumable():
        prompts.kept = state.items()
        yield lambda records: state.add(_key(records[0]), b"".join(dump_json(record) + b"\n" for record in records))
        with open_bytes(out) as handle:
            for _, lines in state.items():
                handle.write(lines)
    state.remove()


def _key(record: Mapping[str, Any]) -> str:
    """Hash the prompt and the seed of an input or output record."""
    identity = {name: record[name] for name in IDENTITY if name in record}
    return blake2b(dump_json(identity, orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()
