"""Ask a model what it knows: each question several times, with each answer judged.

    answering = folder_answering("chat/", "auto", "auto", Sampling(0.8), slots=16)
    with answering.start() as generator:
        probe = Probe(generator, answering.chat, MatchJudge(), context=512, samples=5, max_tokens=64, seed=0, ...)
        for record in probe.ask(questions):
            ...

`Answering` is the model under test: an assistant's folder, or a model behind a server. The procedure is that of "The
Llama 3 Herd of Models" (arXiv:2407.21783), section 4.3.6.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from llmkit.errors import naming
from llmkit.formats.conversations import as_record, message
from llmkit.formats.questions import Question
from llmkit.generation.chat_models import ChatModel
from llmkit.generation.generator import Completion, Generator, Request
from llmkit.generation.loaded_model import open_model
from llmkit.generation.next_token import Sampling, request_number
from llmkit.generation.served_models import Usage
from llmkit.generation.served_sampler import ServedSampler, open_served
from llmkit.io.progress import Progress, counted, say
from llmkit.io.resume import Kept, fingerprint
from llmkit.probing.judges import JUDGE_PROMPT
from llmkit.probing.model_questions import WRITER_PROMPT
from llmkit.probing.refusals import language_of
from llmkit.text.matching import RIGHT, UNREADABLE, WRONG, Answered, Judge
from llmkit.tokenizer.chat import ChatFormat

NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}  # what people call a question


@dataclass(frozen=True)
class Answering:
    """Model under test, which turns questions into completions.

    chat      the tokens of a conversation; None where a server has messages become tokens
    context   tokens that the model takes; None where only its server knows
    identity  what a resumed run must have in common
    start     makes the generator, for as long as it is used
    usage     what a server was asked so far
    """

    chat: ChatFormat | None
    context: int | None
    identity: dict[str, Any]
    start: Callable[[], AbstractContextManager[Generator | ServedSampler]]
    usage: Usage | None = None


def folder_answering(folder: str, device: str, dtype: str, sampling: Sampling, slots: int) -> Answering:
    """An assistant's folder. Raises UserError for a base model."""
    opened = open_model(folder, device, dtype)
    chat = opened.chat

    @contextmanager
    def start() -> Iterator[Generator]:
        with opened.computing():
            yield opened.generator(sampling, slots)

    return Answering(chat, opened.config.max_position_embeddings, {"the model": fingerprint(folder)}, start)


def served_answering(
    engine: str,
    folder: str | None,
    sampling: Sampling,
    *,
    concurrency: int,
    timeout: float,
    retries: int,
) -> Answering:
    """A model behind a server, with the tokenizer of a folder or its own. Raises UserError where it is not there."""
    served = open_served(engine, folder, timeout=timeout, retries=retries)
    chat = served.chat
    served.server.check()

    @contextmanager
    def start() -> Iterator[ServedSampler]:
        yield served.sampler(sampling, concurrency=concurrency, logprobs=False, skip_long=True)

    return Answering(chat, None, served.identity, start, served.server.usage)


def decide(judgements: Sequence[str], consistent: float) -> str:
    """Sum up the judgements of one question, of which the share `consistent` must agree.

    "yes"      that share is right
    "mixed"    some are right, fewer than that; or none, and judgements that could not be read leave it open
    "no"       none is right, and that share is informative and wrong
    "evasive"  none is right, and fewer than that say anything
    """
    needed = consistent * len(judgements) - 1e-9
    counts = Counter(judgements)
    if counts[RIGHT]:
        return "yes" if counts[RIGHT] >= needed else "mixed"
    if counts[WRONG] >= needed:
        return "no"
    return "mixed" if counts[UNREADABLE] and counts[WRONG] + counts[UNREADABLE] >= needed else "evasive"


class Probe:
    """Asks questions, without the passages that they came from.

    chat        how a question becomes a conversation in tokens; None where a server makes them of messages
    context     of the model, in tokens, where it is known; a question that leaves no room in it is not asked
    samples, max_tokens, seed  of each question; the answers to it depend on its tokens and the seed alone
    consistent  the share of the answers to one question that must agree
    written_by  who wrote the questions: "given", "embedded", or a model
    """

    def __init__(
        self,
        generator: Generator | ServedSampler,
        chat: ChatFormat | None,
        judge: Judge,
        *,
        context: int | None,
        samples: int,
        max_tokens: int | None,
        seed: int,
        consistent: float,
        written_by: str,
    ) -> None:
        self._generator, self._chat, self.judge, self._context = generator, chat, judge, context
        self._samples, self._max_tokens, self._seed = samples, max_tokens, seed
        self._consistent, self.written_by = consistent, written_by

    def ask(self, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
        """The record of each question that was asked, in order."""
        waiting: dict[int, Question] = {}
        completed = self._generator.complete_each(self._requests(questions, waiting))
        finished = ((waiting.pop(index), completions) for index, completions in completed)
        answered = (
            Answered(question, [reply.text.strip() for reply in completions], completions)
            for question, completions in finished
            if completions  # there are none where it was too long for a server
        )
        for item, judgements in self.judge.judge_each(answered):
            yield self._record(item, judgements)

    def _requests(self, questions: Iterable[Question], waiting: dict[int, Question]) -> Iterator[Request]:
        index = 0
        for question in questions:
            messages = [message("user", question.question)]
            ids: Sequence[Any] = as_record(messages)
            if self._chat is not None:
                with naming(question.where):
                    ids = self._chat.encode(messages, prompt=True).token_ids.tolist()
            if self._context is not None and len(ids) >= self._context:
                continue
            waiting[index] = question
            index += 1
            yield Request(ids, self._samples, self._max_tokens, self._seed, request_number(ids), question.where)

    def _record(self, answered: Answered, judgements: list[str]) -> dict[str, Any]:
        question, answers = answered.question, answered.question.answers
        completions: Sequence[Completion] = answered.details
        return {
            "question": question.question,
            "answer": answers[0] if len(answers) == 1 else list(answers),
            "passage_id": question.passage_id,
            "responses": list(answered.responses),
            "judgements": judgements,
            "known": decide(judgements, self._consistent),
            "logprobs": [
                round(sum(reply.logprobs) / len(reply.logprobs), 4) if reply.logprobs else None for reply in completions
            ],
            "kind": question.kind,
            "language": language_of(question),
            "written_by": self.written_by,
            "judged_by": self.judge.name,
            "where": question.where,
        }


def ask_all(probe: Probe, state: Kept, questions: Sequence[Question], quiet: bool) -> None:
    """Ask the questions that the state has not, into it."""
    if state:
        say(f"{state.path}: kept {counted(len(state), 'question')}", quiet)
    tally: Counter[str] = Counter()
    with Progress("probe", total=len(questions), unit="questions", quiet=quiet) as progress:
        progress.advance(len(state))
        for record in probe.ask(state.missing(questions, lambda question: f"{question.where} {question.question}")):
            state.add(f"{record['where']} {record['question']}", record)
            tally[NAMES[record["known"]]] += 1
            progress.advance(**tally)


def plan(
    most: int, samples: int, max_tokens: int | None, temperature: float, writer: str | None, left_out: Mapping[str, int]
) -> list[str]:
    """Describe the run in two lines: the questions and their answers, and the tokens that these take."""
    others = "".join(f"; left out: {reason} {count}" for reason, count in left_out.items())
    written = f", written by {writer} at most" if writer is not None else ""
    limit = "a context of tokens each" if max_tokens is None else counted(most * samples * max_tokens, "token")
    return [
        f"{counted(most, 'question')}{written}, {counted(samples, 'answer')} each{others}",
        f"at most {limit} to be sampled, at temperature {temperature:g}; for example",
    ]


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


def describe(
    kinds: Mapping[str, Counter[str]], left_out: Counter[str], taught: Counter[str], balance: float | None
) -> Iterator[str]:
    """Describe the results of a probe and its lessons in lines; `taught` counts by "yes" and "no"."""
    totals = sum(kinds.values(), Counter[str]())
    yield from table(kinds)
    yield from (f"left out: {reason} {count}" for reason, count in left_out.items())
    spare = {name: totals[name] - taught[known] for known, name in NAMES.items() if known in ("yes", "no")}
    more = "".join(
        f"; {count} more {name} left out to keep them balanced (--balance none keeps all)"
        for name, count in spare.items()
        if count
    )
    yield f"conversations: {counted(taught['no'], 'refusal')}, {counted(taught['yes'], 'confirmation')}{more}"
    if balance is not None and taught["no"] and not taught["yes"]:
        yield "nothing is known, so the refusals stand alone: mix them with other conversations in sft"


def examples(questions: Sequence[Question], models: Mapping[str, ChatModel]) -> Iterator[str]:
    """Some of the questions, and the prompts of the models that write them and judge their answers."""
    for question in questions[:3]:
        yield f"  {question.question} [{question.kind}: {' | '.join(question.answers)}]"
    for name, prompt in (("writer", WRITER_PROMPT), ("judge", JUDGE_PROMPT)):
        if name in models:
            yield f"what the {name} is asked:\n{prompt}"
