"""Probe a model's knowledge: ask each question several times, and judge each answer.

The procedure is that of "The Llama 3 Herd of Models" (arXiv:2407.21783), section 4.3.6.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmkit.errors import naming
from llmkit.formats.conversations import message
from llmkit.formats.questions import Question
from llmkit.generation.next_token import request_number
from llmkit.generation.requests import Request, split_thoughts
from llmkit.generation.sampler import Sampler
from llmkit.io.progress import Progress, counted, say
from llmkit.io.resume import Kept
from llmkit.probing.judges import JUDGE_PROMPT, ChatModel
from llmkit.probing.model_questions import WRITER_PROMPT
from llmkit.probing.refusals import language_of
from llmkit.text.matching import RIGHT, UNREADABLE, WRONG, Answered, Judge

CONSISTENT = 2 / 3  # of the answers to a question: 2 of 3, 4 of 5
NAMES = {"yes": "known", "no": "unknown", "mixed": "mixed", "evasive": "evasive"}  # names of a question's result


def decide(judgements: Sequence[str]) -> str:
    """Summarise the judgements of one question, of which the share `CONSISTENT` must agree.

    "yes"      that share is right
    "mixed"    fewer are right, but some; or none is, and unreadable judgements leave it open
    "no"       none is right, and that share is wrong
    "evasive"  none is right, and fewer than that are wrong
    """
    needed = CONSISTENT * len(judgements) - 1e-9
    counts = Counter(judgements)
    if counts[RIGHT]:
        return "yes" if counts[RIGHT] >= needed else "mixed"
    if counts[WRONG] >= needed:
        return "no"
    return "mixed" if counts[UNREADABLE] and counts[WRONG] + counts[UNREADABLE] >= needed else "evasive"


def ask_all(
    questions: Sequence[Question],
    state: Kept,
    sampler: Sampler,
    judge: Judge,
    samples: int,
    max_tokens: int | None,
    seed: int,
    written_by: str,
    quiet: bool,
) -> int:
    """Ask the questions that the state lacks, without their passages; return the number of records in it.

    samples, max_tokens, seed  of each question; its answers depend only on its tokens and the seed
    written_by  source of the questions: "given", "embedded", or a model
    """
    if state:
        say(f"{state.path}: kept {counted(len(state), 'question')}", quiet)
    under_way: deque[Question] = deque()

    def requests() -> Iterator[Request]:
        for question in state.missing(questions, lambda question: f"{question.where} {question.question}"):
            with naming(question.where):
                prompt = sampler.encode([message("user", question.question)])
            under_way.append(question)
            yield Request(prompt, samples, max_tokens, seed, request_number(prompt), question.where)

    finished = ((under_way.popleft(), completions) for completions in sampler.complete(requests()))
    answered = (
        Answered(question, [split_thoughts(reply.text)[1].strip() for reply in completions], completions)
        for question, completions in finished
        if completions  # none if the question is too long
    )
    tally: Counter[str] = Counter()
    with Progress("probe", total=len(questions), unit="questions", quiet=quiet) as progress:
        progress.advance(len(state))
        for item, judgements in judge.judge_each(answered):
            question, completions = item.question, item.details
            known = decide(judgements)
            record = {
                "question": question.question,
                "answer": question.answers[0] if len(question.answers) == 1 else list(question.answers),
                "passage_id": question.passage_id,
                "responses": list(item.responses),
                "judgements": judgements,
                "known": known,
                "logprobs": [
                    round(sum(reply.logprobs) / len(reply.logprobs), 4) if reply.logprobs else None
                    for reply in completions
                ],
                "kind": question.kind,
                "language": language_of(question),
                "written_by": written_by,
                "judged_by": judge.name,
                "where": question.where,
            }
            state.add(f"{question.where} {question.question}", record)
            tally[NAMES[known]] += 1
            progress.advance(**tally)
    return len(state)


def plan(
    questions: Sequence[Question],
    most: int,
    samples: int,
    max_tokens: int | None,
    models: Mapping[str, ChatModel],
    left_out: Mapping[str, int],
) -> Iterator[str]:
    """Describe the run in lines, the most important first, with some questions and the prompts of the models."""
    others = "".join(f"; left out: {reason} {count}" for reason, count in left_out.items())
    written = f", written by {models['writer'].sampler.name} at most" if "writer" in models else ""
    limit = "a context of tokens each" if max_tokens is None else counted(most * samples * max_tokens, "token")
    yield f"{counted(most, 'question')}{written}, {counted(samples, 'answer')} each{others}"
    yield f"at most {limit} to be sampled; for example"
    for question in questions[:3]:
        yield f"  {question.question} [{question.kind}: {' | '.join(question.answers)}]"
    for name, prompt in (("writer", WRITER_PROMPT), ("judge", JUDGE_PROMPT)):
        if name in models:
            yield f"prompt of the {name}:\n{prompt}"


# ---- results


def count_by_kind(records: Iterable[dict[str, Any]]) -> dict[str, Counter[str]]:
    """Count known, unknown, mixed and evasive questions by kind, the most common kind first."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        kinds[record["kind"]][NAMES[record["known"]]] += 1
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1].total(), kind[0])))


def table(kinds: Mapping[str, Counter[str]]) -> Iterator[str]:
    """Yield the counts by kind as lines, with their sum and its shares."""
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
        yield "nothing is known, so there are only refusals: mix them with other conversations in sft"
