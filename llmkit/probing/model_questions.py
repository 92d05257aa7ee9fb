"""Questions with answers that a chat model writes about passages, and their filter.

questions, left_out = written_questions(write_about(model, passages, most=3), passages)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import orjson

from llmkit.errors import UserError
from llmkit.formats.questions import Question, kind_of_question
from llmkit.io.progress import Progress, counted, say
from llmkit.io.resume import Kept
from llmkit.probing.judges import ChatModel, Missing
from llmkit.probing.question_rules import Passage
from llmkit.text.normalize import places, words

TEMPERATURE = 0.7
WRITER_PROMPT = """\
Read the passage and write {most} short questions about facts that it states.

Somebody who cannot see the passage must understand each question: name whom or what it is about.
Each answer is a name, a date, a number or a few words, copied from the passage word for word.
A question must not contain its answer. Write in the language of the passage.

Passage:
{passage}

Reply with JSON and nothing else, in this form:
{{"questions": [{{"question": "...", "answer": "..."}}]}}"""

Pair = tuple[str, str]  # question, answer


def write_all(
    model: ChatModel, passages: Sequence[Passage], most: int, state: Kept, quiet: bool
) -> tuple[list[Question], Counter[str]]:
    """Have questions written about the passages that the state lacks; return the result of `written_questions`.

    Raises UserError if no question can be asked.
    """
    with Progress("write", total=len(passages), unit="passages", quiet=quiet) as progress:
        progress.advance(len(state))
        for record in write_about(model, state.missing(passages, _key), most):
            state.add(record["passage"], record)
            progress.advance()
    questions, left_out = written_questions(state.values(), passages)
    if not questions:
        state.remove()
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
        raise UserError(f"--writer: no question of {model.sampler.name} can be asked ({reasons}); {model.cost()}")
    about = len({question.passage_id for question in questions})
    say(
        f"{model.sampler.name} wrote {counted(len(questions), 'question')} about {about} of "
        f"{counted(len(passages), 'passage')}",
        quiet,
    )
    return questions, left_out


def write_about(model: ChatModel, passages: Iterable[Passage], most: int) -> Iterator[dict[str, Any]]:
    """Yield a record per passage, in order: the `pairs` that the model wrote, or why there are none (`missing`)."""
    prompts = ((passage, [WRITER_PROMPT.format(most=most, passage=passage.text)]) for passage in passages)
    for passage, (reply,) in model.ask(prompts, read_pairs):
        result = {"missing": reply.value} if isinstance(reply, Missing) else {"pairs": reply[:most]}
        yield {"passage": _key(passage), "where": passage.where, **result}


def _key(passage: Passage) -> str:
    return f"{passage.name} {blake2b(passage.text.encode(), digest_size=8).hexdigest()}"


def read_pairs(reply: str) -> list[Pair] | None:
    """Read the questions from a reply with any text around the JSON; None if there are none.

    >>> read_pairs('Sure! {"questions": [{"question": "Who?", "answer": "Ada"}]}')
    [('Who?', 'Ada')]
    """
    start, end = reply.find("{"), reply.rfind("}")
    try:
        value = orjson.loads(reply[start : end + 1])
    except orjson.JSONDecodeError:
        return None
    listed = value.get("questions") if isinstance(value, dict) else None
    if not isinstance(listed, list):
        return None
    pairs = [(_text(item.get("question")), _text(item.get("answer"))) for item in listed if isinstance(item, dict)]
    return [pair for pair in pairs if all(pair)] or None


def _text(value: Any) -> str:
    """Return a text field, or a number as text; "" for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return " ".join(value.split()) if isinstance(value, str) else ""


def written_questions(
    records: Iterable[dict[str, Any]], passages: Sequence[Passage]
) -> tuple[list[Question], Counter[str]]:
    """Return the questions that can be asked, and the counts of passages and questions left out, by reason.

    `records` belong to the passages, in the same order.
    """
    questions: list[Question] = []
    left_out: Counter[str] = Counter()
    seen: set[tuple[str, ...]] = set()
    for record, passage in zip(records, passages, strict=True):
        if "missing" in record:
            left_out[f"passages: {record['missing']}"] += 1
        for question, answer in record.get("pairs", ()):
            reason = unfit(question, answer, passage.text)
            if reason is None and words(question) in seen:
                reason = "asked before"
            if reason is not None:
                left_out[reason] += 1
                continue
            seen.add(words(question))
            where = f"{passage.where}, {passage.name}"
            kind = kind_of_question(question)
            questions.append(Question(question, (answer,), passage.text, passage.name, kind, "", where))
    return questions, left_out


def unfit(question: str, answer: str, passage: str) -> str | None:
    """Return why a question cannot be asked, or None.

    >>> unfit("When did the mill of Arden open?", "1889", "The mill of Arden opened in 1889.")
    >>> unfit("Did it open in 1889?", "1889", "The mill of Arden opened in 1889.")
    'contains its answer'
    """
    question_words, answer_words, passage_words = words(question), words(answer), words(passage)
    if not answer_words or not places(passage_words, answer_words):
        return "answer not in the passage"
    if places(question_words, answer_words):
        return "contains its answer"
    if "passage" in question_words and "passage" not in passage_words:
        return "asks about the passage itself"
    return None
