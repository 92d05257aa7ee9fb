"""`llmkit probe-knowledge`: test what a model knows, and write conversations that teach it to refuse the rest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import (
    BackendConfig,
    CommonConfig,
    RecordsConfig,
    ServedConfig,
    argument,
    as_options,
    lasting_options,
    option,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.formats.questions import Question, read_questions
from llmkit.io.jsonl import input_files, name_of, names_of, open_output, read_documents
from llmkit.io.manifest import write_manifest
from llmkit.io.progress import counted, say
from llmkit.io.records import BadRecords
from llmkit.io.resume import STATE, Kept
from llmkit.io.run_folder import check_files, check_model_folder, uploaded

if TYPE_CHECKING:
    from llmkit.generation.requests import Usage
    from llmkit.generation.sampler import Sampler
    from llmkit.probing.judges import ChatModel
    from llmkit.probing.question_rules import Passage
    from llmkit.probing.recitation import Recited
    from llmkit.probing.refusals import Refusals

STARTED = time.monotonic()
WRITTEN = ".written.state"  # suffix of --out: the questions of --writer
WORDS = "match"


@dataclass(frozen=True, kw_only=True)
class ProbeKnowledgeConfig(RecordsConfig, CommonConfig, BackendConfig, ServedConfig):
    """Options of `llmkit probe-knowledge`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit probe-knowledge chat/ --passages docs.jsonl -o refusals.jsonl --report probe.jsonl
          llmkit probe-knowledge chat/ --questions q.jsonl --samples 3 --limit 200 -o refusals.jsonl
          llmkit probe-knowledge chat/ --passages docs.jsonl --writer openai:http://localhost:8000/v1#qwen -o r.jsonl
          llmkit probe-knowledge base/ --recite docs.jsonl -o recited.jsonl
          llmkit probe-knowledge chat/ --questions squad.json.gz | jq -r .known | sort | uniq -c

        Each question is asked --samples times, without its passage, and each answer is judged right, wrong or evasive
        (empty, "I don't know", the question repeated). A question is known if two thirds of its answers are right, and
        mixed if fewer are. With no right answer it is unknown if two thirds are wrong, else evasive. The output is
        conversations for sft: a refusal for each unknown question, the answer for each known one.

        --questions takes {"question", "answer"}, SQuAD's JSON and others. --passages takes documents; questions are
        made from their sentences, by patterns for English or by --writer. --writer and --judge take an assistant's
        folder or a model on an OpenAI-compatible server; --dry-run shows their prompts (docs/probe-knowledge.md).
    """
    following: ClassVar[str] = "llmkit sft base/ --data chats.jsonl:0.9 --data refusals.jsonl:0.1 -o chat2/"

    model: str | None = argument(
        "Assistant's folder; with --engine, optional and used for its tokenizer only.", metavar="MODEL", default=None
    )
    questions: tuple[str, ...] = option((), "Questions with answers; repeatable [stdin].", metavar="FILE", reads=True)
    passages: tuple[str, ...] = option((), "Documents to make questions from; repeatable.", metavar="FILE", reads=True)
    report: str | None = option(None, "Output file of questions, answers and verdicts.", metavar="FILE", free=True)
    recite: str | None = option(
        None, "Documents to test for memorisation, instead of questions.", metavar="FILE", reads=True
    )
    device: str = option("auto", "Compute device.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option(
        "auto",
        "Precision; auto: bfloat16 on GPUs, else float32; int8: on CPUs.",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    batch_size: int = option(16, "Answers generated in parallel.", at_least=1, at_most=4096, free=True)
    resume: bool = option(False, "Resume a killed run.", free=True)

    max_passages: int = option(200, "With --passages: maximum passages to sample.", group="Questions", at_least=1)
    per_passage: int = option(3, "With --passages: maximum questions per passage.", group="Questions", at_least=1)
    writer: str | None = option(
        None, "Writer of the questions [patterns].", group="Questions", metavar="MODEL|openai:URL#NAME", reads=True
    )

    samples: int = option(5, "Answers per question.", short="-n", group="Answers", at_least=1, at_most=10**6)
    max_tokens: int | None = option(64, "Maximum tokens of an answer.", group="Answers", unit="count", at_least=1)
    temperature: float = option(0.8, "Sampling temperature.", group="Answers", at_least=0, at_most=100)

    judge: str = option(
        "match",
        "Judge of the answers: word matching or a model.",
        group="Judge",
        metavar="match|MODEL|openai:URL#NAME",
        reads=True,
    )
    balance: float | None = option(
        1.0, "Known questions to keep per unknown one; none: all questions.", group="Output", above=0, free=True
    )
    refusals: str | None = option(
        None, 'Wordings of refusals: {"en": [...], ...} [built-in].', group="Output", metavar="FILE", reads=True
    )

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        if self.recite:
            return self.recite == "-"
        return not self.questions + self.passages or "-" in self.questions + self.passages


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints when the conversations went to a file.

    `left_out` counts questions by reason; `usage` has this run's requests and tokens by model.
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


@uploaded("out", "report")
def run(config: ProbeKnowledgeConfig) -> Summary | Recited | None:
    """Load, build, ask, save, summarise. Raises UserError for the user's mistakes."""
    if config.recite is not None:
        return _recite(config, config.recite)
    out = config.out or "-"
    _checked(config)
    results = check_files(config, "probe-knowledge", "report", (STATE, WRITTEN), also=("--balance",))
    if results is not None:
        known = {name: value for name, value in results.items() if name in Summary.__annotations__}
        return Summary(out, config.report, **known)
    state_path, written_path = (None if out == "-" else Path(out + end) for end in (STATE, WRITTEN))

    # load
    from llmkit.probing.judges import judge_of
    from llmkit.probing.model_questions import write_all
    from llmkit.probing.probe import ask_all, plan
    from llmkit.probing.refusals import Refusals

    refusals, bad = Refusals(config.refusals), BadRecords(config.max_bad, config.quiet)
    with ExitStack() as stack, ExitStack() as until_written:
        sampler = stack.enter_context(_sampler(config, config.temperature))
        sampler.check()
        models = _models(config, stack, until_written)
        _ = [each.chat for each in (sampler, *(model.sampler for model in models.values()))]  # refuses base models
        passages, questions, left_out = _read(config, bad)
        writer = models["writer"].sampler.name if "writer" in models else None
        most = len(passages) * config.per_passage if writer else len(questions)
        lines = [*plan(questions, most, config.samples, config.max_tokens, models, left_out)]
        for line in lines if config.dry_run else lines[:1]:
            say(line, config.quiet)
        if config.dry_run:
            return None
        for model in models.values():
            model.sampler.check()

        # build
        others = {f"--{name}": model.sampler.identity["the model"] for name, model in models.items()}
        identity = {**lasting_options(config), **others, **sampler.identity}
        judge = judge_of(models.get("judge"), refusals.texts())
        written_by = writer or ("embedded" if passages else "given")

        # ask
        written = Kept(written_path, identity, resume=config.resume) if writer else None
        if written is not None:
            stack.enter_context(written.resumable())
            questions, left_out = write_all(models["writer"], passages, config.per_passage, written, config.quiet)
            until_written.close()
        state = Kept(state_path, identity, resume=config.resume)
        stack.enter_context(state.resumable())
        samples, length = config.samples, config.max_tokens
        answered = ask_all(questions, state, sampler, judge, samples, length, config.seed, written_by, config.quiet)

    # save and summarise
    left_out += Counter({"longer than the context": len(questions) - answered})
    names = {"written_by": written_by, "judged_by": judge.name, **bad.results}
    summary = _save(config, state, refusals, models, names, left_out, sampler.usage if config.is_served else None)
    state.remove()
    if written is not None:
        written.remove()
    return None if out == "-" else summary


def _models(config: ProbeKnowledgeConfig, stack: ExitStack, until_written: ExitStack) -> dict[str, ChatModel]:
    """Open the "writer" and the "judge", if they are models."""
    from llmkit.probing.judges import TEMPERATURE as JUDGE
    from llmkit.probing.judges import ChatModel
    from llmkit.probing.model_questions import TEMPERATURE as WRITER

    models: dict[str, ChatModel] = {}
    if config.writer is not None:
        sampler = until_written.enter_context(_sampler(config, WRITER, "--writer", config.writer))
        models["writer"] = ChatModel(sampler, config.seed)
    if config.judge != WORDS:
        sampler = stack.enter_context(_sampler(config, JUDGE, "--judge", config.judge))
        models["judge"] = ChatModel(sampler, config.seed)
    return models


def _save(
    config: ProbeKnowledgeConfig,
    state: Kept,
    refusals: Refusals,
    models: Mapping[str, ChatModel],
    names: Mapping[str, Any],
    left_out: Counter[str],
    answers: Usage | None,
) -> Summary:
    """Write the report, the conversations and their manifest, and print the results."""
    from llmkit.probing.judges import check_verdicts
    from llmkit.probing.probe import NAMES, count_by_kind, describe
    from llmkit.probing.refusals import write_lessons
    from llmkit.text.matching import UNREADABLE

    out, kinds = config.out or "-", count_by_kind(state.values())
    verdicts = Counter(verdict for record in state.values() for verdict in record["judgements"])
    if "judge" in models:
        check_verdicts(verdicts, models["judge"])
    force = config.force or config.resume
    if config.report is not None:
        with open_output(config.report, force) as write:
            for record in state.values():
                write(record)
    with open_output(out, force) as write:
        taught = write_lessons(write, state.values, refusals, config.balance, config.seed)
    totals = sum(kinds.values(), Counter[str]())
    count = totals.total()
    results: dict[str, Any] = {"questions": count, "responses": count * config.samples}
    results |= {name: totals[name] for name in NAMES.values()}
    results |= {"confirmations": taught["yes"], "refusals": taught["no"], **names}
    if Path(out).is_file():
        inputs = [*input_files(config.questions), *input_files(config.passages, text=True)]
        parents = [config.model] if config.model else []
        write_manifest(out, "probe-knowledge", as_options(config), inputs=inputs, parents=parents, results=results)
    for line in describe(kinds, left_out, taught, config.balance):
        say(line, config.quiet)
    if names["written_by"] == "embedded":
        say("the questions come from patterns: some are clumsy (written_by: embedded)", config.quiet)
    if verdicts[UNREADABLE]:
        say(f"unreadable judgements: {verdicts[UNREADABLE]} of {verdicts.total()}", config.quiet)
    for name, model in models.items():
        say(f"{name} {model.cost()}", config.quiet)
    usage = {name: asdict(model.sampler.usage) for name, model in models.items()}
    if answers is not None:
        say(f"answers: {answers}", config.quiet)
        usage["answers"] = asdict(answers)
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


# ---- options


def _checked(config: ProbeKnowledgeConfig) -> None:
    """Check the options before any work."""
    if not config.is_served or config.model is not None:
        check_model_folder(config.model, "llmkit probe-knowledge chat/ --questions q.jsonl")
    if config.is_served and (config.max_tokens is None or config.recite):
        raise UserError("--engine: cannot be combined with --max-tokens none or --recite")
    if config.questions and config.passages:
        raise UserError("--passages: cannot be combined with --questions; make two runs")
    if config.writer is not None and not config.passages:
        raise UserError("--writer: needs --passages, to write questions about")
    input_files(config.questions)
    input_files(config.passages, text=True)


def _sampler(
    config: ProbeKnowledgeConfig,
    temperature: float,
    flag: str = "MODEL",
    source: str | None = None,
    end_ids: Collection[int] | None = None,
) -> AbstractContextManager[Sampler]:
    """Open the model under test, or `source` of another option."""
    from llmkit.generation.next_token import Sampling
    from llmkit.generation.sampler import open_sampler

    if source is None and config.is_served:
        flag = "--engine"
    return open_sampler(
        source or (config.engine if config.is_served else str(config.model)),
        Sampling(temperature),
        flag=flag,
        folder=config.model if source is None else None,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        slots=config.batch_size,
        end_ids=end_ids,
        concurrency=config.concurrency,
        timeout=config.timeout,
    )


def _read(config: ProbeKnowledgeConfig, bad: BadRecords) -> tuple[list[Passage], list[Question], Counter[str]]:
    """Read passages and questions (none with --writer); count the questions left out by reason. Raises UserError."""
    columns = parse_columns(config.columns)
    if not config.passages:
        questions, left_out = read_questions(input_files(config.questions or ("-",)), config.limit, bad, columns)
        return [], questions, left_out
    from llmkit.probing.question_rules import ask_about, sample_passages

    names, files = names_of(config.passages), input_files(config.passages, text=True)
    documents = read_documents(files, config.limit, bad, columns)
    passages = sample_passages(documents, config.max_passages, config.seed)
    if not passages:
        raise UserError(f"{names}: expected documents with text to ask about, found none")
    if config.writer is not None:
        return passages, [], Counter()
    questions = ask_about(passages, names, config.per_passage, config.seed)
    asked_about = len({question.passage_id for question in questions})
    say(f"{names}: {counted(len(passages), 'passage')}, {asked_about} of them with questions", config.quiet)
    return passages, questions, Counter()


# ---- recitation


def _recite(config: ProbeKnowledgeConfig, path: str) -> Recited | None:
    """Measure how much of the documents of --recite the model continues word for word."""
    from llmkit.probing.recitation import Recital, Recited, describe, summarise, written

    others = config.questions or config.passages or config.report or config.resume or config.writer
    if others or config.judge != WORDS or config.max_tokens is None:
        raise UserError("--recite: cannot be combined with questions, --report, --resume or --max-tokens none")
    out = config.out or "-"
    _checked(config)
    check_files(config, "probe-knowledge", "report", (STATE, WRITTEN))
    files = input_files([path], text=True)
    bad = BadRecords(config.max_bad, config.quiet)
    documents = read_documents(files, config.limit, bad, parse_columns(config.columns))
    with _sampler(config, temperature=0.0, end_ids=()) as sampler:
        recital = Recital(documents, sampler, config.max_tokens, name_of(path))
        beginnings = counted(len(recital), "document")
        say(f"{name_of(path)}: {beginnings}, {recital.too_short} more are too short", config.quiet)
        if config.dry_run:
            return None
        with open_output(out, config.force) as write:
            groups = summarise(written(recital.recite(), write, len(recital), config.quiet))
    for line in describe(groups, config.max_tokens):
        say(line, config.quiet)
    return None if out == "-" else Recited(out, len(recital), groups, recital.too_short)
