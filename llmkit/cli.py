"""The command line: one contract for all subcommands.

stdout carries data; the rest goes to stderr. Exit codes: 0 done, 1 our bug, 2 the user's mistake (one line),
3 a gate not met, 130 interrupted, 141 the reader of our pipe went away. A subcommand is known by name and
imported when it is run or its help is asked for; `--help` imports no torch (0.3 s).
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, Optional, get_type_hints

import typer

from llmkit import __version__
from llmkit.config import flag_of, option_fields, option_of, resolve, value_type
from llmkit.errors import Interrupted, LlmkitError, UserError

# name: (module, config class, help in one line), in the order of the pipeline
COMMANDS = {
    "train-bpe": ("llmkit.stages.train_bpe", "TrainBpeConfig", "Text to a byte-level BPE tokenizer."),
    "pretrain": ("llmkit.stages.pretrain", "PretrainConfig", "Documents and a tokenizer to a base model."),
    "sample": ("llmkit.stages.sample", "SampleConfig", "Text from a model: from a prompt, stdin or JSONL."),
}
OVERVIEW = """Make a ChatGPT-like assistant from nothing, one composable subcommand per stage.

\b
Example:
  zcat docs.jsonl.gz | llmkit train-bpe - --vocab-size 8192 -o tok/
  llmkit pretrain docs.jsonl.gz --tokenizer tok/ --time-budget 10m -o base/
  llmkit sample base/ -p "It was a dark and" -n 3
"""


def run_command_line(arguments: list[str]) -> int:
    """Run one subcommand and return the exit code; every ending is handled here and nowhere else."""
    try:
        app = build_app(next((word for word in arguments if not word.startswith("-")), None))
        code = typer.main.get_command(app).main(args=arguments, prog_name="llmkit", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", Interrupted.exit_code)
    except LlmkitError as error:
        return _fail(str(error), error.exit_code)
    except typer.Exit as stop:
        return stop.exit_code
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(
                f"{error.filename or 'output'}: the disk is full; nothing was written there",
                UserError.exit_code,
            )
        if error.filename is not None:
            return _fail(f"{error.filename}: {(error.strerror or str(error)).lower()}", UserError.exit_code)
        return _bug()
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own click: a wrong flag or argument
            return _fail(f"{error.format_message()} Try --help.", UserError.exit_code)  # type: ignore[attr-defined]
        if "No space left on device" in str(error):  # safetensors and torch wrap the OSError in their own
            return _fail("output: the disk is full; nothing was written there", UserError.exit_code)
        return _bug()


def _fail(message: str, code: int) -> int:
    print(f"llmkit: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _bug() -> int:
    traceback.print_exc()
    print(
        f"llmkit {__version__}: this is a bug in llmkit, please report it with the lines above",
        file=sys.stderr,
    )
    return 1


def build_app(wanted: str | None) -> typer.Typer:
    """The typer application; only the subcommand `wanted` is imported, the others are named with their help."""
    on_terminal = sys.stdout.isatty()
    app = typer.Typer(
        help=OVERVIEW,
        add_completion=True,
        rich_markup_mode="rich" if on_terminal else None,
        pretty_exceptions_enable=False,
        no_args_is_help=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    app.callback(invoke_without_command=True)(_top)
    for name, (module, config_name, line) in COMMANDS.items():
        if name == wanted:
            config_class = getattr(importlib.import_module(module), config_name)
            run = importlib.import_module(module).run
            text = f"{line}\n\n\b\n{inspect.cleandoc(config_class.examples)}"
            following = f"Next: {config_class.following}" if config_class.following else None
            app.command(name, help=text, short_help=line, epilog=following)(_command(config_class, run))
        else:
            app.command(name, short_help=line)(_top)
    return app


def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"llmkit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def _command(config_class: type, run: Callable[[Any], Any]) -> Callable[..., None]:
    """A function whose signature typer turns into flags, made from the fields of a config class."""
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    ]
    hints = get_type_hints(config_class)
    for item in option_fields(config_class):
        details = option_of(item)
        base, _, many = value_type(hints[item.name])
        annotation: Any = bool if base is bool else list[str] if many else str
        if details.positional:
            info = typer.Argument(help=details.help, metavar=details.metavar, show_default=False)
        else:
            spellings = [flag_of(item)] + ([details.short] if details.short else [])
            default = item.default if item.default not in (None, False, ()) else False
            shown = (
                ", ".join(default)
                if isinstance(default, tuple)
                else str(default)
                if default is not False
                else False
            )
            choices = "|".join(details.choices) if details.choices else None
            kind = details.unit or {int: "integer", float: "number"}.get(base, "text")
            metavar = None if base is bool else details.metavar or choices or kind.upper()
            info = typer.Option(
                *spellings,
                help=details.help,
                metavar=metavar,
                show_default=shown,
                rich_help_panel=details.group,
            )
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=Annotated[Optional[annotation], info],  # noqa: UP045 (typer reads it at run time)
            )
        )
    file_info = typer.Option("--config", help="Options from a TOML file; flags win.", metavar="FILE.toml")
    parameters.append(
        inspect.Parameter(
            "config_file",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[Optional[str], file_info],  # noqa: UP045
        )
    )

    def command(context: typer.Context, config_file: str | None = None, **flags: Any) -> None:
        config = resolve(config_class, flags, config_file)
        if _waits_for_a_terminal(config):
            print(context.get_help(), file=sys.stderr)
            raise typer.Exit(2)
        summary = run(config)
        if is_dataclass(summary) and not isinstance(summary, type):
            print(json.dumps({key: value for key, value in asdict(summary).items() if value is not None}))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _waits_for_a_terminal(config: Any) -> bool:
    """Whether the stage would read stdin although a person, not a pipe, is at the other end."""
    reads = getattr(config, "reads_stdin", None)
    return bool(reads is not None and reads() and sys.stdin.isatty())
