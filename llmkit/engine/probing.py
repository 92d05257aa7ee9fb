"""Asking a model what it knows: every question several times, each answer judged, and what that says of it.

    probe = Probe(generator, chat, MatchJudge(), context=512, samples=5, max_tokens=64, seed=0, consistent=0.8)
    for record in probe.ask(questions): ...

The procedure is that of "The Llama 3 Herd of Models" (arXiv:2407.21783), section 4.3.6. What has been asked stands in
a state file, one record a line behind a line that tells what the run is, so that a killed run goes on where it was.
"""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import IO, Any

import orjson

from llmkit.conversations import message
from llmkit.engine.generation import Completion, Generator, Request
from llmkit.engine.matching import RIGHT, WRONG
from llmkit.engine.refusals import language_of
from llmkit.errors import UserError
from llmkit.model.config import ModelConfig
from llmkit.questions import Question
from llmkit.tokenizer.chat import ChatFormat

NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}  # what people call a question
WEIGHTS_READ = 1 << 20  # bytes at the end of a file of weights that tell it from another

Judge = Callable[[str, str, Sequence[str]], str]


def decide(judgements: Sequence[str], consistent: float) -> str:
    """What the judgements of one question say, where `consistent` is the share that must agree.

    "yes"      that share is right
    "mixed"    some are right, fewer than that
    "no"       none is right, and that share is informative and wrong
    "evasive"  none is right, and fewer than that say anything
    """
    needed = consistent * len(judgements) - 1e-9
    right = sum(one == RIGHT for one in judgements)
    if right:
        return "yes" if right >= needed else "mixed"
    return "no" if sum(one == WRONG for one in judgements) >= needed else "evasive"


class Probe:
    """Asks questions, without the passages that they came from.

    chat        how a question becomes a conversation
    context     of the model, in tokens; a question that leaves no room in it is not asked
    samples, max_tokens, seed  of each question; the answers to it depend on its tokens and the seed alone
    consistent  the share of the answers to one question that must agree
    written_by  who wrote the questions: "given" or "embedded"
    """

    def __init__(
        self,
        generator: Generator,
        chat: ChatFormat,
        judge: Judge,
        *,
        context: int,
        samples: int,
        max_tokens: int | None,
        seed: int,
        consistent: float,
        written_by: str,
    ) -> None:
        self._generator, self._chat, self._judge, self._context = generator, chat, judge, context
        self._samples, self._max_tokens, self._seed = samples, max_tokens, seed
        self._consistent, self._written_by = consistent, written_by

    def ask(self, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
        """The record of each question that was asked, in order."""
        waiting: dict[int, Question] = {}
        for index, completions in self._generator.complete_each(self._requests(questions, waiting)):
            yield self._record(waiting.pop(index), completions)

    def _requests(self, questions: Iterable[Question], waiting: dict[int, Question]) -> Iterator[Request]:
        index = 0
        for question in questions:
            ids = self._chat.encode([message("user", question.question)], prompt=True).token_ids.tolist()
            if len(ids) >= self._context:
                continue
            number = int.from_bytes(blake2b(",".join(map(str, ids)).encode(), digest_size=8).digest(), "little")
            waiting[index] = question
            index += 1
            yield Request(ids, self._samples, self._max_tokens, self._seed, number, question.where)

    def _record(self, question: Question, completions: Sequence[Completion]) -> dict[str, Any]:
        answers = question.answers
        responses = [one.text.strip() for one in completions]
        judgements = [self._judge(text, question.question, answers) for text in responses]
        return {
            "question": question.question,
            "answer": answers[0] if len(answers) == 1 else list(answers),
            "passage_id": question.passage_id,
            "responses": responses,
            "judgements": judgements,
            "known": decide(judgements, self._consistent),
            "logprobs": [round(sum(one.logprobs) / len(one.logprobs), 4) for one in completions],
            "kind": question.kind,
            "language": language_of(question),
            "written_by": self._written_by,
            "where": question.where,
        }


def check_assistant(model: ModelConfig, chat: ChatFormat, name: str) -> None:
    """Raise UserError for a base model: it would go on with the question instead of answering it."""
    ends = model.eos_token_id if isinstance(model.eos_token_id, tuple) else (model.eos_token_id,)
    if chat.end_id not in ends:
        raise UserError(f"{name}: a base model, which has not learnt to answer; tune it by llmkit sft first")


# ---- what was found


def count_by_kind(records: Iterable[dict[str, Any]]) -> dict[str, Counter[str]]:
    """By kind of question, the commonest first: how many are known, unknown, mixed and evasive."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        kinds[record["kind"]][NAMES[record["known"]]] += 1
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1].total(), kind[0])))


def table(kinds: Mapping[str, Counter[str]]) -> Iterator[str]:
    """The counts by kind as lines, with their sum and its shares."""
    totals = sum(kinds.values(), Counter[str]())
    wide = max(map(len, [*kinds, "kind of question"]))
    yield f"{'kind of question':{wide}} {'asked':>7}" + "".join(f"{name:>9}" for name in NAMES.values())
    for kind, counts in [*kinds.items(), *([("all", totals)] if len(kinds) > 1 else [])]:
        yield f"{kind:{wide}} {counts.total():>7}" + "".join(f"{counts[name]:>9}" for name in NAMES.values())
    shares = (totals[name] / max(1, totals.total()) for name in NAMES.values())
    yield f"{'share':{wide}} {'':>7}" + "".join(f"{share:>9.1%}" for share in shares)


# ---- the state of a run


class ProbeState:
    """The records of a run on their way, in a file that outlives a kill; without a path, in memory.

    identity  what decides the records; a resumed run must have the same. Raises UserError for another
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], resume: bool) -> None:
        self.path = path
        begun = resume and path is not None and path.exists()
        self._file: IO[bytes] = io.BytesIO() if path is None else path.open("r+b" if begun else "w+b")
        self._start, self.kept = self._take_over(identity) if begun else (0, 0)
        if not self._start:
            self._start = self._file.write(orjson.dumps({"run": identity}) + b"\n")

    def _take_over(self, identity: dict[str, Any]) -> tuple[int, int]:
        """Where the records begin and how many are whole; what a kill cut in two is removed."""
        first = self._file.readline()
        start = end = self._file.tell()
        if not first.endswith(b"\n"):
            self._file.seek(0)
            self._file.truncate()
            return 0, 0
        former, now = orjson.loads(first)["run"], orjson.loads(orjson.dumps(identity))
        unlike = [name for name in now if former.get(name) != now[name]]
        if unlike:
            name = unlike[0]
            raise UserError(
                f"{self.path}: made with {name} {former.get(name)}, and this run has {now[name]}; "
                "leave out --resume to begin again"
            )
        count = 0
        while self._file.readline().endswith(b"\n"):
            end, count = self._file.tell(), count + 1
        self._file.truncate(end)
        self._file.seek(end)
        return start, count

    def remaining(self, questions: Sequence[Question]) -> Iterator[Question]:
        """The questions that have not been asked. Raises UserError where the file has others."""
        asked = iter(questions)
        for record in list(self.records()):
            following = (one for one in asked if (one.question, one.where) == (record["question"], record["where"]))
            if next(following, None) is None:
                raise UserError(
                    f"{self.path}: has a question that the input does not: {record['where']}; "
                    "leave out --resume to begin again"
                )
        yield from asked

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is there as soon as this returns, whatever becomes of the process."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(orjson.dumps(record) + b"\n")
        self._file.flush()

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, from the first."""
        self._file.seek(self._start)
        yield from map(orjson.loads, iter(self._file.readline, b""))

    def remove(self) -> None:
        """The work is done."""
        self._file.close()
        if self.path is not None:
            self.path.unlink()


def fingerprint(folder: str) -> str:
    """What tells a model from another one, without reading all of its weights."""
    digest = sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as handle:
                handle.seek(max(0, path.stat().st_size - WEIGHTS_READ))
                digest.update(handle.read())
    return digest.hexdigest()[:16]
