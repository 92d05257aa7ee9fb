"""The command line: one contract for all subcommands.

stdout carries data; everything else goes to stderr. Exit codes: 0 done, 1 a bug, 2 a mistake of the user (one line),
3 a gate not met, 130 interrupted, 141 the reader of our pipe has closed it. A subcommand is registered by name and
imported when it runs or its help is shown; `--help` imports no torch (0.3 s).
"""

from __future__ import annotations

import glob
import importlib
import inspect
import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import Field, asdict, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from llmkit import __version__
from llmkit.config import dropped, flag_of, option_fields, option_of, resolve, value_type
from llmkit.display import write_message
from llmkit.errors import Interrupted, LlmkitError, UserError
from llmkit.io.ranks import launch

OF_A_RUN = ("config.json", "manifest.json", "tokenizer.json")  # a folder with one of these is one input
OUTPUTS = ("out", "report", "rejects", "collect", "pairs")  # options that name output files
# name: (module, config class, help in one line), in the order of the pipeline
COMMANDS = {
    "crawl-filter": ("llmkit.stages.crawl_filter", "CrawlFilterConfig", "Extract clean documents from web archives."),
    "train-bpe": ("llmkit.stages.train_bpe", "TrainBpeConfig", "Train a byte-level BPE tokenizer."),
    "pretrain": ("llmkit.stages.pretrain", "PretrainConfig", "Pretrain a base model on documents."),
    "sft": ("llmkit.stages.sft", "SftConfig", "Fine-tune a model on conversations or preferences."),
    "probe-knowledge": (
        "llmkit.stages.probe_knowledge",
        "ProbeKnowledgeConfig",
        "Test what an assistant knows, and write refusals for what it does not.",
    ),
    "write-chats": ("llmkit.stages.write_chats", "WriteChatsConfig", "Generate conversations that follow a guide."),
    "train-reward": ("llmkit.stages.train_reward", "TrainRewardConfig", "Train a reward model on preferences."),
    "rl": ("llmkit.stages.rl", "RlConfig", "Train a policy by reinforcement learning."),
    "sample": ("llmkit.stages.sample", "SampleConfig", "Generate text from a prompt, stdin or JSONL."),
    "serve": ("llmkit.stages.serve", "ServeConfig", "Serve models: an OpenAI-compatible API and a chat page."),
    "evaluate": ("llmkit.stages.evaluate", "EvaluateConfig", "Score models on standard benchmarks or your own tasks."),
    "export": ("llmkit.stages.export", "ExportConfig", "Convert a model to GGUF, another precision or a PEFT adapter."),
    "report": ("llmkit.stages.report", "ReportConfig", "Show what every stage did on one page."),
}
OVERVIEW = """Make a ChatGPT-like assistant from scratch, one composable subcommand per stage.

\b
Example:
  zcat docs.jsonl.gz | llmkit train-bpe - --vocab-size 8192 -o tok/
  llmkit pretrain docs.jsonl.gz --tokenizer tok/ --time-budget 10m -o base/
  llmkit sample base/ -p "It was a dark and" -n 3
"""
# commands of other programs, and where llmkit has them
ELSEWHERE = {
    name: hint
    for names, hint in (
        ("chat talk run repl interactive", "llmkit sample MODEL --chat"),
        ("generate infer inference complete completion predict prompt", "llmkit sample MODEL -p PROMPT"),
        ("eval evaluation test validate benchmark bench lm-eval lighteval", "llmkit evaluate MODEL --tasks TASK,..."),
        ("server api deploy web ui", "llmkit serve MODEL"),
        ("dpo orpo kto ipo simpo align", "llmkit sft --loss dpo, ipo, kto, orpo or simpo"),
        ("rlhf", "llmkit train-reward, then llmkit rl, to learn from preferences"),
        ("grpo ppo rloo dapo gspo reinforce rlvr rft", "llmkit rl --algo"),
        ("tokenize tokenise encode pack prepare preprocess", "llmkit pretrain, which tokenizes, and llmkit train-bpe"),
        ("train-tokenizer tokenizer tokeniser bpe vocab train-tok", "llmkit train-bpe"),
        ("train training trainer fit", "llmkit pretrain for documents, llmkit sft for conversations"),
        ("continue cpt continued-pretraining", "llmkit pretrain --from MODEL"),
        ("finetune fine-tune finetuning fine-tuning tune instruct", "llmkit sft"),
        ("lora peft adapter", "llmkit sft --lora-rank 16"),
        ("qlora bitsandbytes", "llmkit sft --lora-rank 16 --quantize nf4"),
        ("reward reward-model train-rm rm preference", "llmkit train-reward"),
        ("score rank judge", "llmkit train-reward to train a judge, llmkit train-reward --score to use it"),
        ("merge merge-lora", "llmkit sft --lora-rank, which merges its adapter at the end"),
        ("convert save hf gguf llama-cpp ollama", "llmkit export --format gguf or hf"),
        ("quantize quantise quantization quant", "llmkit export --format gguf --dtype q8_0"),
        ("crawl filter extract clean scrape warc pii language", "llmkit crawl-filter"),
        ("dedup dedupe deduplicate minhash", "llmkit crawl-filter"),
        ("write synthesize synthetic synth generate-data self-instruct distill distil", "llmkit write-chats"),
        ("probe knowledge refusals hallucination hallucinations recite", "llmkit probe-knowledge"),
        ("plot plots stats dashboard show visualize compare view", "llmkit report"),
        ("version", "llmkit --version"),
        ("list commands options usage", "llmkit --help"),
        ("init new config setup", "llmkit COMMAND --help: commands need no setup, and --config reads a TOML file"),
        ("demo example examples tutorial quickstart", "README.md, and make demo in a clone"),
        (
            "download pull push upload login fetch",
            "hf://ORG/MODEL, which can be used like a model folder; to upload, the program hf of huggingface_hub",
        ),
        ("resume", "--resume of each command"),
    )
    for name in names.split()
}
IN_PROCESSES = ("pretrain", "sft", "train-reward", "rl")  # commands that run in several processes under torchrun
PIPE_CLOSED = 141


# ---- exit codes


def run_command_line(arguments: list[str]) -> int:
    """Run one subcommand and return the exit code; all exceptions are handled here."""
    _interrupt_on_signals()
    try:
        job = parse(arguments)
        if isinstance(job, int):
            return job
        if launch().size > 1 and (name := _command_name(arguments)) not in IN_PROCESSES:
            raise UserError(f"{name}: runs in one process; start it without torchrun, or with --nproc-per-node 1")
        summary = job()
        if launch().size > 1:
            from llmkit.training.distributed import leave

            leave()
        if is_dataclass(summary) and not isinstance(summary, type) and launch().leads:
            print(json.dumps({key: value for key, value in asdict(summary).items() if value is not None}))
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        _abandon_stdout()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return _fail("interrupted", Interrupted.exit_code)
    except LlmkitError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("not enough memory on this machine for this input", UserError.exit_code)
    except Exception as error:
        from llmkit.io.files import is_full_disk

        if is_full_disk(error):
            _abandon_stdout()
            return _fail(f"{getattr(error, 'filename', None) or 'output'}: no space left on disk", UserError.exit_code)
        if isinstance(error, OSError) and error.filename is not None:
            return _fail(f"{error.filename}: {str(error.strerror).lower()}", UserError.exit_code)
        if launch().size > 1:
            from llmkit.training.failures import is_lost, lose_together

            if is_lost(error):
                lose_together(error)
        write_message(traceback.format_exc().rstrip("\n"))
        if _several():
            return _fail("a bug in llmkit; please report the lines above", 1)
        write_message(f"llmkit {__version__}: a bug in llmkit; please report the lines above")
        return 1


def parse(arguments: list[str]) -> Callable[[], Any] | int:
    """Return a function that does the work, or an exit code if there is none, as for --help.

    The work runs outside of typer, which turns an EOFError into an interrupt and a broken pipe into exit code 1.
    """
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    name = _command_name(arguments)
    if name is not None and (hint := ELSEWHERE.get(name.lower().replace("_", "-"))):
        raise UserError(f"no such command {name!r}; see {hint}")
    command = typer.main.get_command(build_app(name))
    try:
        return command.main(args=arguments, prog_name="llmkit", standalone_mode=False) or 0
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # while printing the help
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        flag = getattr(error, "option_name", "")
        module, config_class, _ = COMMANDS.get(name or "", ("llmkit.config", "CommonConfig", ""))
        field = flag.lstrip("-").removeprefix("no-").replace("-", "_")
        if advice := dropped(field, getattr(importlib.import_module(module), config_class)):
            raise UserError(f"{flag}: was removed; {advice}") from None
        message = error.format_message()  # type: ignore[attr-defined]  # an error of typer's own click
        message = f"{message[:1].lower()}{message[1:].rstrip('.')}".replace(". Did you mean", "; did you mean")
        raise UserError(f"{message} See --help" if message.endswith("?") else f"{message}; see --help") from None


def _command_name(arguments: list[str]) -> str | None:
    return next((word for word in arguments if not word.startswith("-")), None)


def _interrupt_on_signals() -> None:
    """Handle SIGTERM and SIGHUP like Ctrl-C: training saves a checkpoint, and partial outputs are deleted."""
    process = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)  # a forked worker, ended by its pool, prints no traceback
        os.kill(os.getpid(), number)

    in_main = threading.current_thread() is threading.main_thread()
    for number in (signal.SIGTERM, signal.SIGHUP):  # not if nohup has set SIGHUP to be ignored
        if in_main and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)


def _abandon_stdout() -> None:
    """Redirect stdout to /dev/null, because Python flushes it at exit and would report the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str, code: int) -> int:
    if _several():  # one rank reports for all
        from llmkit.training.failures import fail_together

        fail_together(message, code)
    write_message(f"llmkit: error: {' '.join(message.split())}")
    return code


def _several() -> bool:
    """Return True if the job has several processes; False if torchrun's variables are invalid."""
    with suppress(UserError):
        return launch().size > 1
    return False


# ---- flags from config classes


def build_app(wanted: str | None) -> typer.Typer:
    """Build the typer application; import only the subcommand `wanted`, or all for shell completion."""
    app = typer.Typer(
        help=OVERVIEW,
        epilog="Next: llmkit train-bpe --help",
        rich_markup_mode="rich" if _on_terminal() else None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(invoke_without_command=True)(_top)
    for name, (module, config_name, line) in COMMANDS.items():
        if name != wanted and "_LLMKIT_COMPLETE" not in os.environ:
            app.command(name, short_help=line)(_top)
            continue
        config_class = getattr(importlib.import_module(module), config_name)
        text = _literal(f"{line}\n\n\b\n{inspect.cleandoc(config_class.examples)}")
        following = _literal(f"Next: {config_class.following}") if config_class.following else None
        command = _command(config_class, importlib.import_module(module).run)
        app.command(name, help=text, short_help=line, epilog=following)(command)
    return app


def _on_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _literal(text: str) -> str:
    return text.replace("[", "\\[") if _on_terminal() else text  # rich parses `[words]` as markup


def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"llmkit {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(UserError.exit_code)


def _command(config_class: type, run: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make a function whose signature, from the fields of a config class, typer turns into flags."""

    # `--no-force` overrides `force = true` of a config file; hidden, because it would be noise in the help
    off = {f"not_{item.name}": item for item in option_fields(config_class) if item.default is False}

    def command(context: typer.Context, config_file: str | None = None, **flags: Any) -> Callable[[], Any]:
        for negative, item in off.items():
            flags[item.name] = False if flags.pop(negative) else flags[item.name]
        config = resolve(config_class, flags, config_file)
        reads = getattr(config, "reads_stdin", None)
        if reads is not None and reads() and sys.stdin is not None and sys.stdin.isatty():
            print(context.get_help(), file=sys.stderr)
            raise typer.Exit(UserError.exit_code)
        return lambda: _run_alone(run, config)

    hints = get_type_hints(config_class)
    annotations = {item.name: _annotation(item, hints[item.name]) for item in option_fields(config_class)}
    for negative, item in off.items():
        annotations[negative] = Annotated[bool | None, typer.Option(f"--no-{flag_of(item)[2:]}", hidden=True)]
    annotations["config_file"] = Annotated[
        str | None,
        typer.Option(
            "--config",
            help="Options from a TOML file; flags win.",
            metavar="FILE.toml",
            rich_help_panel="Common",
        ),
    ]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    parameters += [inspect.Parameter(name, kind, default=None, annotation=value) for name, value in annotations.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _run_alone(run: Callable[[Any], Any], config: Any) -> Any:
    """Run a stage under a lock on its --out, which rank 0 holds."""
    from llmkit.io.files import sole_writer
    from llmkit.io.remote import is_remote, settings

    settings.quiet, settings.cache = config.quiet, config.cache
    _check_inputs_stay(config)
    if config.out in (None, "-") or is_remote(config.out) or config.dry_run or not launch().leads:
        return run(config)
    with sole_writer(config.out):
        return run(config)


def _check_inputs_stay(config: Any) -> None:
    """Raise UserError if an output would replace an input, or is inside the folder of an input model."""
    from llmkit.io.remote import is_named

    outputs = [value for name in OUTPUTS if (value := getattr(config, name, None)) not in (None, "-")]
    outputs = [path for path in outputs if os.path.isfile(path) or os.path.isdir(path) or "://" in path]  # no device
    values = [getattr(config, item.name) for item in option_fields(type(config)) if option_of(item).reads]
    texts = [text for value in values for text in (value if isinstance(value, tuple) else [value or ""])]
    paths = {path for text in texts for path in _paths_in(text)} if outputs else ()
    inputs = [name for path in paths for name in (glob.glob(path, recursive=True) if glob.has_magic(path) else [path])]
    inputs = [path for path in inputs if os.path.exists(path)]
    inputs += [path for path in paths if any(is_named(out, path) for out in outputs)]
    for path, out in itertools.product(inputs, outputs):
        read, written = os.path.realpath(path), os.path.realpath(out)
        if f"{read}/".startswith(f"{written}/") or is_named(out, path):
            raise UserError(f"{out}: is an input and would be lost; choose another place")
        if written.startswith(f"{read}/") and any(os.path.isfile(f"{read}/{name}") for name in OF_A_RUN):
            raise UserError(f"{out}: is inside the input {path} and would be lost; choose another place")


def _paths_in(text: str) -> Iterator[str]:
    """Yield each part of an option's value that may be a path: it may have a kind before and a weight after it."""
    for part in dict.fromkeys((text, *text.split(","))):
        words = part.split(":")[:8]
        for start, stop in itertools.combinations(range(len(words) + 1), 2):
            if 0 < len(path := ":".join(words[start:stop])) < 4096 and "\0" not in path:
                yield path


def _annotation(item: Field, hint: Any) -> Any:
    """Annotate one option for typer. Its value stays a string, which `resolve` converts and checks."""
    details = option_of(item)
    base, _, many = value_type(hint)
    kind: Any = bool if base is bool else list[str] if many else str
    if details.positional:
        metavar = details.metavar or item.name.upper()
        info = typer.Argument(help=_literal(details.help), metavar=metavar, show_default=False)
        return Annotated[kind | None, info]
    flag = flag_of(item)
    if base is bool and item.default:
        flag = f"{flag}/--no-{flag[2:]}"
    shown: Any = ", ".join(item.default) if isinstance(item.default, tuple) else item.default
    shown = f"{shown:g}" if isinstance(shown, float) else shown
    words = details.choices
    unit = details.unit or {int: "integer", float: "number"}.get(base, "text")
    text = details.help
    if base is not bool and (shown or shown == 0):
        text += f" (default {shown})"
    info = typer.Option(
        *([flag, details.short] if details.short else [flag]),
        help=_literal(text),
        metavar="" if base is bool else details.metavar or "|".join(words or ()) or unit.upper(),
        show_default=False,
        rich_help_panel=details.group,
        autocompletion=(lambda incomplete: [word for word in words if word.startswith(incomplete)]) if words else None,
    )
    return Annotated[kind | None, info]
