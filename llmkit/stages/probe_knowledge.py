"""`llmkit probe-knowledge`: test a model's knowledge, and write conversations that teach it to admit what it lacks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.config import CommonConfig, RecordsConfig, ServedConfig, argument, as_options, lasting_options, option
from llmkit.errors import UserError
from llmkit.formats.questions import Question, all_questions
from llmkit.io.files import check_output, check_unfinished
from llmkit.io.jsonl import check_inputs, name_of, names_of, open_output, read_documents
from llmkit.io.manifest import write_file_manifest
from llmkit.io.progress import counted, say
from llmkit.io.records import BadRecords
from llmkit.io.run_folder import check_finished, check_model_folder

if TYPE_CHECKING:
    from llmkit.generation.chat_models import ChatModel
    from llmkit.io.resume import Kept
    from llmkit.probing.probe import Answering
    from llmkit.probing.recitation import Recited
    from llmkit.probing.refusals import Refusals
    from llmkit.text.matching import Judge
    from llmkit.text.passages import Passage

STARTED = time.monotonic()
STATE, WRITTEN = ".state", ".written.state"  # of the answers, and of the questions that a model has written
WORDS = "match"


@dataclass(frozen=True, kw_only=True)
class ProbeKnowledgeConfig(RecordsConfig, CommonConfig, ServedConfig):
    """Options of `llmkit probe-knowledge`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit probe-knowledge chat/ --passages docs.jsonl -o refusals.jsonl --report probe.jsonl
          llmkit probe-knowledge chat/ --questions q.jsonl --samples 3 --limit 200 -o refusals.jsonl
          llmkit probe-knowledge chat/ --passages docs.jsonl --writer openai:http://localhost:8000/v1#qwen -o r.jsonl
          llmkit probe-knowledge base/ --recite docs.jsonl -o recited.jsonl
          llmkit probe-knowledge chat/ --questions squad.json.gz | jq -r .known | sort | uniq -c

        Each question is asked --samples times, without its passage, and each answer is judged right, wrong or evasive
        (empty, "I don't know", the question again). A question is known if at least --consistent of its answers are
        right, and mixed if fewer are. With no right answer it is unknown if at least --consistent are wrong, else
        evasive. The output is conversations for sft: a refusal of each unknown question, the answer to each known one.
        --questions: {"question", "answer"}, SQuAD's JSON and others. --passages: documents; questions are made from
        their sentences, by patterns of English or by --writer. --writer and --judge take an assistant's folder or
        a model behind an OpenAI-compatible server; --dry-run shows their prompts. More: docs/probe-knowledge.md.
    """
    following: ClassVar[str] = "llmkit sft base/ --data chats.jsonl:0.9 --data refusals.jsonl:0.1 -o chat2/"

    model: str | None = argument(
        "Folder of an assistant; with --engine of its tokenizer, or none.", metavar="MODEL", default=None
    )
    questions: tuple[str, ...] = option((), "Questions with answers; repeatable [stdin].", metavar="FILE", reads=True)
    passages: tuple[str, ...] = option((), "Documents to make questions from; repeatable.", metavar="FILE", reads=True)
    report: str | None = option(
        None, "File for every question with its answers and verdicts.", metavar="FILE", free=True
    )
    recite: str | None = option(
        None, "Documents to test for memorisation, and nothing else.", metavar="FILE", reads=True
    )
    prefix_tokens: int = option(32, "With --recite: tokens of each document in the prompt.", at_least=1)
    device: str = option("auto", "Compute device.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option(
        "auto",
        "Precision; auto: bfloat16 on GPUs, else float32; int8: on CPUs.",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    batch_size: int = option(16, "Answers generated at a time.", at_least=1, at_most=4096, free=True)
    resume: bool = option(False, "Resume a killed run.", free=True)

    max_passages: int = option(200, "With --passages: passages to sample, at most.", group="Questions", at_least=1)
    per_passage: int = option(3, "With --passages: questions per passage, at most.", group="Questions", at_least=1)
    writer: str | None = option(
        None, "Writer of the questions [patterns].", group="Questions", metavar="MODEL|openai:URL#NAME", reads=True
    )

    samples: int = option(5, "Answers per question.", short="-n", group="Answers", at_least=1, at_most=10**6)
    max_tokens: int | None = option(64, "Tokens of an answer.", group="Answers", unit="count", at_least=1)
    temperature: float = option(0.8, "Sampling temperature.", group="Answers", at_least=0, at_most=100)

    judge: str = option(
        "match",
        "Judge of the answers: their words, or a model.",
        group="Judge",
        metavar="match|MODEL|openai:URL#NAME",
        reads=True,
    )
    consistent: float = option(
        0.8, "Share of the answers to a question that must agree.", group="Judge", above=0, at_most=1
    )
    reply_tokens: int = option(512, "Tokens of a writer's or judge's reply.", group="Servers", unit="count", at_least=8)

    balance: float | None = option(
        1.0,
        "Ratio of known to unknown questions, reached by leaving some out; none: all stay.",
        group="Lessons",
        above=0,
        free=True,
    )
    refusals: str | None = option(
        None, 'Wordings of refusals: {"en": [...], ...} [ours].', group="Lessons", metavar="FILE", reads=True
    )

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        if self.recite:
            return self.recite == "-"
        return not self.questions + self.passages or "-" in self.questions + self.passages


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints when the conversations went to a file.

    `left_out` counts questions by reason; `usage` has the requests and tokens of the writer and the judge in this run.
    """

    path: str
    report: str | None = None
    written_by: str | None = None
    judged_by: str | None = None
    questions: int | None = None
    responses: int | None = None
    known: int | None = None
    unknown: int | None = None
    mixed: int | None = None
    evasive: int | None = None
    confirmations: int | None = None
    refusals: int | None = None
    bad_records: int | None = None
    not_used: dict[str, int] | None = None
    by_kind: dict[str, dict[str, int]] | None = None
    left_out: dict[str, int] | None = None
    unreadable_judgements: int | None = None
    usage: dict[str, dict[str, int]] | None = None
    seconds: float | None = None


def run(config: ProbeKnowledgeConfig) -> Summary | Recited | None:
    """Load, build, ask, save, summarise. Raises UserError for the user's mistakes."""
    if config.recite is not None:
        return _recite(config, config.recite)
    out = config.out or "-"
    state_path = _checked(config, out)
    written_path = Path(out + WRITTEN) if state_path and config.writer else None
    if config.resume and Path(out).exists() and not any(path and path.exists() for path in (state_path, written_path)):
        check_finished(out, config)
        say(f"{out}: finished, so there is nothing to do; without --resume, --force makes it again", config.quiet)
        return Summary(out)

    # load
    from llmkit.generation.chat_models import cost
    from llmkit.io.resume import Kept, resumable
    from llmkit.probing.judges import check_verdicts
    from llmkit.probing.model_questions import write_all
    from llmkit.probing.probe import NAMES, Probe, ask_all, count_by_kind, describe, examples, plan
    from llmkit.probing.refusals import Refusals, write_lessons
    from llmkit.text.matching import UNREADABLE

    answering = _answering(config)
    refusals = Refusals(config.refusals)
    models = _chat_models(config)
    bad = BadRecords(config.max_bad, config.quiet)
    passages, questions, left_out = _read(config, bad)
    most = len(passages) * config.per_passage if "writer" in models else len(questions)
    writer = models["writer"].name if "writer" in models else None
    lines = plan(most, config.samples, config.max_tokens, config.temperature, writer, left_out)
    for line in [*lines, *examples(questions, models)] if config.dry_run else lines[:1]:
        say(line, config.quiet)
    if config.dry_run:
        return None

    # build
    for model in models.values():
        model.check()
    identity = lasting_options(config) | {f"--{name}": model.identity for name, model in models.items()}
    identity |= answering.identity
    written: Kept | None = None

    # ask
    with resumable(state_path, written_path):
        if "writer" in models:
            written = Kept(written_path, identity, resume=config.resume)
            questions, left_out = write_all(models["writer"], passages, config.per_passage, written, config.quiet)
        state = Kept(state_path, identity, resume=config.resume)
        with answering.start() as generator:
            probe = Probe(
                generator,
                answering.chat,
                _judge(config, models, refusals),
                context=answering.context,
                samples=config.samples,
                max_tokens=config.max_tokens,
                seed=config.seed,
                consistent=config.consistent,
                written_by=models["writer"].name if "writer" in models else "embedded" if passages else "given",
            )
            ask_all(probe, state, questions, config.quiet)
    kinds = count_by_kind(state.values())
    verdicts = Counter(verdict for record in state.values() for verdict in record["judgements"])
    if "judge" in models:
        check_verdicts(verdicts, models["judge"])

    # save
    force = config.force or config.resume
    if config.report is not None:
        with open_output(config.report, force) as write:
            for record in state.values():
                write(record)
    with open_output(out, force) as write:
        taught = write_lessons(write, state.values, refusals, config.balance, config.seed)
    totals = sum(kinds.values(), Counter[str]())
    asked = totals.total()
    results = {"written_by": probe.written_by, "judged_by": probe.judge.name, "questions": asked}
    results |= {"responses": asked * config.samples, **{name: totals[name] for name in NAMES.values()}}
    results |= {"confirmations": taught["yes"], "refusals": taught["no"], **bad.results}
    if Path(out).is_file():
        inputs = [*config.questions, *config.passages]
        write_file_manifest(
            out,
            "probe-knowledge",
            as_options(config),
            inputs=inputs,
            parents=[config.model] if config.model else [],
            results=results,
        )
    state.remove()
    if written is not None:
        written.remove()

    # summarise
    if asked < len(questions):
        left_out["longer than the context"] += len(questions) - asked
    for line in describe(kinds, left_out, taught, config.balance):
        say(line, config.quiet)
    if passages and not models.get("writer"):
        say("the questions were made by patterns: some are clumsy (written_by: embedded)", config.quiet)
    if verdicts[UNREADABLE]:
        say(f"judgements that could not be read: {verdicts[UNREADABLE]} of {verdicts.total()}", config.quiet)
    for name, model in models.items():
        say(f"{name} {cost(model)}", config.quiet)
    usage = {name: asdict(model.usage) for name, model in models.items()}
    if answering.usage is not None:
        say(f"answers: {answering.usage}", config.quiet)
        usage["answers"] = asdict(answering.usage)
    if out == "-":
        return None
    return Summary(
        path=out,
        report=config.report,
        **results,
        by_kind={kind: dict(counts) for kind, counts in kinds.items()},
        left_out=dict(left_out) or None,
        unreadable_judgements=verdicts[UNREADABLE] or None,
        usage=usage or None,
        seconds=round(time.monotonic() - STARTED, 1),
    )


# ---- what is asked for


def _checked(config: ProbeKnowledgeConfig, out: str) -> Path | None:
    """Check the options before any work; return the path of the run's state, None where it has none."""
    if not config.is_served or config.model is not None:
        check_model_folder(config.model, "llmkit probe-knowledge chat/ --questions q.jsonl")
    if config.is_served and (config.max_tokens is None or config.recite):
        raise UserError("--engine: expected neither --max-tokens none nor --recite beside it")
    if config.questions and config.passages:
        raise UserError("--passages: expected no --questions beside it; they are two runs")
    if config.writer is not None and not config.passages:
        raise UserError("--writer: expected --passages, which it writes questions about")
    if config.report == "-":
        raise UserError("--report: expected a file, found -; stdout has the conversations")
    if config.resume and out == "-":
        raise UserError("--resume: expected --out, beside which a killed run has left its state")
    check_inputs([*config.questions, *config.passages])
    outputs = [path for path in (out, config.report) if path not in (None, "-")]
    if len({str(Path(path).resolve()) for path in outputs if path}) < len(outputs):
        raise UserError(f"--report: expected another file than --out, found {config.report} twice")
    for path in outputs:
        check_output(str(path), config.force, config.resume)
    if out == "-":
        return None
    check_unfinished(config.force, config.resume, out + STATE, out + WRITTEN)
    return Path(out + STATE)


def _answering(config: ProbeKnowledgeConfig) -> Answering:
    """Open the model under test; of a server, check that it replies."""
    from llmkit.generation.next_token import Sampling
    from llmkit.probing.probe import folder_answering, served_answering

    sampling = Sampling(config.temperature)
    if not config.is_served:
        return folder_answering(str(config.model), config.device, config.dtype, sampling, config.batch_size)
    return served_answering(
        config.engine,
        config.model,
        sampling,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )


def _chat_models(config: ProbeKnowledgeConfig) -> dict[str, ChatModel]:
    """The models that write and judge, by "writer" and "judge", where there are any; not asked yet."""
    given = {"writer": config.writer, "judge": None if config.judge == WORDS else config.judge}
    if not any(given.values()):
        return {}
    from llmkit.generation.chat_models import ChatSettings, open_chat_model

    settings = ChatSettings(
        max_tokens=config.reply_tokens,
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        slots=config.batch_size,
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )
    return {name: open_chat_model(spec, f"--{name}", settings) for name, spec in given.items() if spec is not None}


def _judge(config: ProbeKnowledgeConfig, models: Mapping[str, ChatModel], refusals: Refusals) -> Judge:
    from llmkit.text.matching import MatchJudge

    by_words = MatchJudge(refusals=refusals.texts())
    if "judge" not in models:
        return by_words
    from llmkit.probing.judges import ModelJudge

    return ModelJudge(models["judge"], by_words)


def _read(config: ProbeKnowledgeConfig, bad: BadRecords) -> tuple[list[Passage], list[Question], Counter[str]]:
    """The passages, the questions unless a model is to write them, and why others are left out. Raises UserError."""
    if not config.passages:
        questions, left_out = all_questions(config.questions or ("-",), config.limit, bad)
        return [], questions, left_out
    from llmkit.probing.question_rules import ask_about
    from llmkit.text.passages import sample_passages

    names = names_of(config.passages)
    passages = sample_passages(read_documents(config.passages, config.limit, bad), config.max_passages, config.seed)
    if not passages:
        raise UserError(f"{names}: expected documents with text to ask about, found none")
    if config.writer is not None:
        return passages, [], Counter()
    questions = ask_about(passages, names, config.per_passage, config.seed)
    asked_about = len({question.passage_id for question in questions})
    say(f"{names}: {counted(len(passages), 'passage')}, {asked_about} of them with questions", config.quiet)
    return passages, questions, Counter()


# ---- a run of its own


def _recite(config: ProbeKnowledgeConfig, path: str) -> Recited | None:
    """`--recite FILE`: how much of its documents the model goes on with, word for word."""
    from llmkit.generation.loaded_model import open_model
    from llmkit.generation.next_token import Sampling
    from llmkit.probing.recitation import Recital, Recited, describe, summarise, written

    beside = config.questions or config.passages or config.report or config.resume or config.writer
    if beside or config.judge != WORDS or config.max_tokens is None:
        raise UserError("--recite: expected neither questions, --report, --resume nor --max-tokens none beside it")
    out = config.out or "-"
    _checked(config, out)
    check_inputs([path])
    opened = open_model(str(config.model), config.device, config.dtype)
    documents = read_documents([path], config.limit, BadRecords(config.max_bad, config.quiet))
    context = opened.config.max_position_embeddings
    recital = Recital(documents, opened.tokenizer, config.prefix_tokens, config.max_tokens, context, name_of(path))
    say(f"{name_of(path)}: {counted(len(recital), 'document')}, {recital.too_short} more are too short", config.quiet)
    if config.dry_run:
        return None
    with opened.computing(), open_output(out, config.force) as write:
        records = recital.recite(opened.generator(Sampling(0.0), config.batch_size, end_ids=()))
        groups = summarise(written(records, write, len(recital), config.quiet))
    for line in describe(groups, config.max_tokens):
        say(line, config.quiet)
    return None if out == "-" else Recited(out, len(recital), groups, recital.too_short)
