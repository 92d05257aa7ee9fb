"""`llmkit probe-knowledge`: what a model knows and what it does not, and conversations that teach it to say so."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmkit.config import CommonConfig, argument, lasting_options, option
from llmkit.errors import Interrupted, UserError
from llmkit.files import check_output
from llmkit.progress import Progress, say
from llmkit.questions import Question, read_questions
from llmkit.stream import check_inputs, name_of, names_of, open_output, read_documents, read_jsonl

if TYPE_CHECKING:
    from llmkit.engine.probing import Probe
    from llmkit.engine.refusals import Refusals
    from llmkit.engine.run_state import RunState

STARTED = time.monotonic()
STATE = ".state"


@dataclass(frozen=True, kw_only=True)
class ProbeKnowledgeConfig(CommonConfig):
    """Options of `llmkit probe-knowledge`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit probe-knowledge chat/ --passages docs.jsonl -o refusals.jsonl --report probe.jsonl
          llmkit probe-knowledge chat/ --questions q.jsonl --samples 3 --limit 200 -o refusals.jsonl
          llmkit probe-knowledge --judge-check labelled.jsonl
          llmkit probe-knowledge base/ --recite docs.jsonl -o recited.jsonl
          llmkit probe-knowledge chat/ --questions squad.json.gz | jq -r .known | sort | uniq -c

        Every question is asked --samples times, without its passage, and every answer is judged: right, wrong, or
        evasive (empty, "I don't know", the question again). A question is known where a share of --consistent of the
        answers is right, mixed where fewer are; where none is, it is unknown if that share says something, else
        evasive. Out come conversations: a refusal for what is unknown, the answer for what is known, nothing else.
        --questions: {"question", "answer"}, SQuAD's JSON and others. --passages: documents, from whose sentences
        questions are made without a model, by patterns of English. --resume goes on after a kill, from OUT.state.
        --judge-check: {"question", "answer", "response", "label": "right", "wrong" or "evasive"}, or true and false.
    """
    following: ClassVar[str] = "llmkit sft base/ --data chats.jsonl:0.9 --data refusals.jsonl:0.1 -o chat2/"

    model: str | None = argument("Folder of an assistant.", metavar="MODEL", default=None)
    questions: tuple[str, ...] = option((), "Questions with answers; repeatable [stdin].", metavar="FILE")
    passages: tuple[str, ...] = option((), "Documents to make questions from; repeatable.", metavar="FILE")
    report: str | None = option(None, "Every question, its answers and what they say.", metavar="FILE", free=True)
    recite: str | None = option(None, "Only tell which documents are known by heart.", metavar="FILE")
    prefix_tokens: int = option(32, "With --recite: tokens given of each document.", at_least=1)
    device: str = option("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option(
        "auto",
        "Precision; auto: bfloat16 on GPUs, else float32; int8: on CPUs.",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    batch_size: int = option(16, "Answers made at a time.", at_least=1, at_most=4096, free=True)
    resume: bool = option(False, "Go on with what a killed run left.", free=True)

    max_passages: int = option(200, "With --passages: as many, drawn by --seed.", group="Questions", at_least=1)
    per_passage: int = option(3, "Questions made of each, at most.", group="Questions", at_least=1)

    samples: int = option(5, "Answers to each question.", short="-n", group="Answers", at_least=1, at_most=10**6)
    max_tokens: int | None = option(64, "Tokens of an answer.", group="Answers", unit="count", at_least=1)
    temperature: float = option(0.8, "Divides the logits.", group="Answers", at_least=0, at_most=100)
    top_p: float | None = option(None, "Only the likeliest tokens up to this.", group="Answers", above=0, at_most=1)

    judge: str = option("match", "How answers are judged: by their words.", group="Judge", choices=("match",))
    match_f1: float = option(0.7, "Least F1 of words of a right answer.", group="Judge", above=0, at_most=1)
    consistent: float = option(0.8, "Share of answers that must agree.", group="Judge", above=0, at_most=1)

    judge_check: str | None = option(
        None, "Only compare the judge with people's labels.", group="Judge", metavar="FILE", free=True
    )
    calibration: bool = option(False, "Tell if log-probabilities foretell a right answer.", group="Judge", free=True)

    balance: float | None = option(1.0, "Known for each unknown; none: all.", group="Lessons", above=0, free=True)
    refusals: str | None = option(None, 'Wordings: {"en": [...], ...} [ours].', group="Lessons", metavar="FILE")

    def reads_stdin(self) -> bool:
        """Whether stdin is the input."""
        if only := self.judge_check or self.recite:
            return only == "-"
        return not self.questions + self.passages or "-" in self.questions + self.passages


@dataclass(frozen=True)
class Summary:
    """What the command line prints when the conversations went to a file; `left_out` counts questions by reason."""

    path: str
    report: str | None = None
    written_by: str | None = None
    questions: int | None = None
    responses: int | None = None
    known: int | None = None
    unknown: int | None = None
    mixed: int | None = None
    evasive: int | None = None
    confirmations: int | None = None
    refusals: int | None = None
    by_kind: dict[str, dict[str, int]] | None = None
    left_out: dict[str, int] | None = None
    calibration: dict[str, Any] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Checked:
    """What the command line prints of a judge; see `check_judge` of engine/judge_check.py."""

    answers: int
    agreement: float
    agreement_95: list[float]
    kappa: float | None
    table: dict[str, int]


@dataclass(frozen=True)
class Recited:
    """What the command line prints when the records of --recite went to a file; see `summarise` of reciting.py."""

    path: str
    documents: int
    by_repeats: dict[str, dict[str, float]]
    too_short: int


def run(config: ProbeKnowledgeConfig) -> Summary | Checked | Recited | None:
    """Load, build, ask, save, summarise. Raises UserError for the user's mistakes."""
    if config.judge_check is not None:
        return _check_judge(config, config.judge_check)
    if config.recite is not None:
        return _recite(config, config.recite)
    out = config.out or "-"
    folder, state_path = _checked(config, out)
    if config.resume and state_path is not None and Path(out).exists() and not state_path.exists():
        say(f"{out}: finished, so there is nothing to do; without --resume, --force makes it again", config.quiet)
        return Summary(out)

    # load
    from llmkit.engine.judge_check import calibration, describe_calibration
    from llmkit.engine.loading import check_assistant, open_model
    from llmkit.engine.matching import MatchJudge
    from llmkit.engine.probing import NAMES, Probe, count_by_kind
    from llmkit.engine.refusals import Refusals
    from llmkit.engine.run_state import RunState, fingerprint
    from llmkit.engine.sampling import Sampling
    from llmkit.tokenizer.chat import ChatFormat

    opened = open_model(folder, config.device, config.dtype)
    chat = ChatFormat(opened.tokenizer)
    check_assistant(opened.config, chat, folder)
    refusals = Refusals(config.refusals)
    questions, left_out, written_by = _questions(config)
    _say_plan(config, questions, left_out)
    if config.dry_run:
        return None

    # build
    identity = lasting_options(config) | {"the model": fingerprint(folder)}
    state = RunState(state_path, identity, config.resume)
    if state.kept:
        say(f"{state_path}: kept {state.kept} questions", config.quiet)
    with opened.computing():
        probe = Probe(
            opened.generator(Sampling(config.temperature, top_p=config.top_p), config.batch_size),
            chat,
            MatchJudge(config.match_f1, refusals.texts()),
            context=opened.config.max_position_embeddings,
            samples=config.samples,
            max_tokens=config.max_tokens,
            seed=config.seed,
            consistent=config.consistent,
            written_by=written_by,
        )

        # ask
        try:
            _ask(probe, state, questions, config.quiet)
        except KeyboardInterrupt:
            if state_path is None:
                raise
            raise Interrupted(f"interrupted; {state_path} has what was asked, and --resume goes on with it") from None

    # save
    taught = _write(config, out, state, refusals)
    kinds = count_by_kind(state.records())
    certainty = calibration(state.records()) if config.calibration else None
    state.remove()

    # summarise
    totals = Counter[str]()
    for counts in kinds.values():
        totals.update(counts)
    asked = totals.total()
    if asked < len(questions):
        left_out["longer than the context"] += len(questions) - asked
    _say_summary(kinds, totals, left_out, taught, config)
    if certainty is not None:
        say(describe_calibration(certainty), config.quiet)
    if out == "-":
        return None
    return Summary(
        path=out,
        report=config.report,
        written_by=written_by,
        questions=asked,
        responses=asked * config.samples,
        **{name: totals[name] for name in NAMES.values()},
        confirmations=taught["yes"],
        refusals=taught["no"],
        by_kind={kind: dict(counts) for kind, counts in kinds.items()},
        left_out=dict(left_out) or None,
        calibration=certainty,
        seconds=round(time.monotonic() - STARTED, 1),
    )


# ---- what is asked for


def _checked(config: ProbeKnowledgeConfig, out: str) -> tuple[str, Path | None]:
    """The model, and where the state of the run stands (None for nowhere), once all that can be known before the
    work is in order."""
    if config.model is None:
        raise UserError("MODEL: expected a model folder, as in llmkit probe-knowledge chat/ --questions q.jsonl")
    if not Path(config.model).is_dir():
        found = "a file" if Path(config.model).exists() else "nothing"
        raise UserError(f"{config.model}: expected a model folder, found {found}")
    if config.questions and config.passages:
        raise UserError("--passages: expected no --questions beside it; they are two runs")
    if config.seed >= 2**63:
        raise UserError(f"--seed: expected less than 2^63, found {config.seed}")
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
    return config.model, None if out == "-" else Path(out + STATE)


def _questions(config: ProbeKnowledgeConfig) -> tuple[list[Question], Counter[str], str]:
    """The questions, why others are left out, and who wrote them. Raises UserError where there are none."""
    left_out: Counter[str] = Counter()
    if not config.passages:
        files = config.questions or ("-",)
        read = list(read_questions(files, config.limit))
        left_out.update(one for one in read if isinstance(one, str))
        questions = [one for one in read if not isinstance(one, str)]
        if not questions:
            raise UserError(f"{names_of(files)}: expected questions, found none that has an answer")
        return questions, left_out, "given"
    from llmkit.data.passages import sample_passages
    from llmkit.data.question_writer import ask_about

    names = names_of(config.passages)
    passages = sample_passages(read_documents(config.passages, config.limit), config.max_passages, config.seed)
    questions = ask_about(passages, names, config.per_passage, config.seed)
    asked_about = len({question.passage_id for question in questions})
    say(f"{names}: {len(passages)} passages, {asked_about} of them with questions", config.quiet)
    return questions, left_out, "embedded"


# ---- the work


def _check_judge(config: ProbeKnowledgeConfig, path: str) -> Checked:
    """`--judge-check FILE`: how far the judge agrees with people."""
    from llmkit.engine.judge_check import check_judge, describe_check
    from llmkit.engine.matching import MatchJudge
    from llmkit.engine.refusals import Refusals

    if config.questions or config.passages or config.recite or config.out:
        raise UserError("--judge-check: expected neither documents, questions nor --out beside it; no model is asked")
    judge = MatchJudge(config.match_f1, Refusals(config.refusals).texts())
    found = check_judge(judge, read_jsonl([path], config.limit))
    for line in describe_check(found):
        say(f"{name_of(path)}: {line}", config.quiet)
    return Checked(**found)


def _recite(config: ProbeKnowledgeConfig, path: str) -> Recited | None:
    """`--recite FILE`: how much of its documents the model goes on with, word for word."""
    from llmkit.engine.loading import open_model
    from llmkit.engine.reciting import Recital, summarise
    from llmkit.engine.sampling import Sampling

    if config.questions or config.passages or config.report or config.resume or config.max_tokens is None:
        raise UserError("--recite: expected neither questions, --report, --resume nor --max-tokens none beside it")
    out = config.out or "-"
    folder, _ = _checked(config, out)
    check_inputs([path])
    opened = open_model(folder, config.device, config.dtype)
    documents = read_documents([path], config.limit)
    context = opened.config.max_position_embeddings
    recital = Recital(documents, opened.tokenizer, config.prefix_tokens, config.max_tokens, context, name_of(path))
    say(f"{name_of(path)}: {len(recital)} documents, {recital.too_short} more are too short", config.quiet)
    if config.dry_run:
        return None
    results: list[dict[str, Any]] = []
    with opened.computing(), open_output(out, config.force) as write:
        generator = opened.generator(Sampling(0.0), config.batch_size, end_ids=())
        with Progress("recite", total=len(recital), unit="documents", quiet=config.quiet) as progress:
            for record in recital.recite(generator):
                write(record)
                results.append({name: record[name] for name in ("repeats", "share")})
                progress.advance()
    groups = summarise(results)
    for name, one in groups.items():
        found = f"{one['mean_share']:.1%} of {config.max_tokens} tokens on average, {one['whole']} recited whole"
        say(f"documents found {name}: {one['documents']}; {found}", config.quiet)
    return None if out == "-" else Recited(out, len(recital), groups, recital.too_short)


def _ask(probe: Probe, state: RunState, questions: Sequence[Question], quiet: bool) -> None:
    """Ask the questions that the state has not, into it."""
    from llmkit.engine.probing import NAMES, made_of

    found: Counter[str] = Counter()
    with Progress("probe", total=len(questions), unit="questions", quiet=quiet) as progress:
        progress.advance(state.kept)
        for record in probe.ask(state.remaining(questions, made_of)):
            state.append(record)
            found[NAMES[record["known"]]] += 1
            progress.advance(**found)


# ---- what comes out


def _write(config: ProbeKnowledgeConfig, out: str, state: RunState, refusals: Refusals) -> Counter[str]:
    """Write the report, then the conversations; how many confirm ("yes") and refuse ("no")."""
    from llmkit.engine.refusals import balanced, lesson

    force = config.force or config.resume
    if config.report is not None:
        with open_output(config.report, force) as write:
            for record in state.records():
                write(record)
    chosen = balanced([record["known"] for record in state.records()], config.balance, config.seed)
    taught: Counter[str] = Counter()
    with open_output(out, force) as write:
        for place, record in enumerate(state.records()):
            if place in chosen:
                taught[record["known"]] += 1
                write(lesson(record, refusals, config.seed))
    return taught


def _say_plan(config: ProbeKnowledgeConfig, questions: Sequence[Question], left_out: Counter[str]) -> None:
    others = "".join(f"; left out: {reason} {count}" for reason, count in left_out.items())
    say(f"{len(questions)} questions, {config.samples} answers each{others}", config.quiet)
    if config.dry_run:
        limit = (
            "the context" if config.max_tokens is None else f"{len(questions) * config.samples * config.max_tokens:,}"
        )
        say(f"at most {limit} tokens to be sampled, at temperature {config.temperature:g}; for example", config.quiet)
        for question in questions[:3]:
            say(f"  {question.question} [{question.kind}: {' | '.join(question.answers)}]", config.quiet)


def _say_summary(
    kinds: dict[str, Counter[str]],
    totals: Counter[str],
    left_out: Counter[str],
    taught: Counter[str],
    config: ProbeKnowledgeConfig,
) -> None:
    """A table by kind of question, its shares, and what is taught."""
    from llmkit.engine.probing import NAMES, table

    for line in table(kinds):
        say(line, config.quiet)
    for reason, count in left_out.items():
        say(f"left out: {reason} {count}", config.quiet)
    if config.passages:
        say(
            "the questions were made by patterns, without a model: some are clumsy (written_by: embedded)", config.quiet
        )
    spare = {name: totals[NAMES[known]] - taught[known] for known, name in (("yes", "known"), ("no", "unknown"))}
    more = "".join(f"; {count} {name} left out for --balance" for name, count in spare.items() if count)
    say(f"conversations: {taught['no']} refusals, {taught['yes']} confirmations{more}", config.quiet)
    if config.balance is not None and taught["no"] and not taught["yes"]:
        say("nothing is known, so the refusals stand alone: mix them with other conversations in sft", config.quiet)
