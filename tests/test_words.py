"""The words of messages: plurals agree with their counts, and command names of other programs lead to ours."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from llmkit import cli
from llmkit.config import flag_of, option_fields, option_of
from llmkit.errors import UserError
from llmkit.io.progress import counted

ROOT = Path(__file__).parent.parent
# never singular: context lengths and vocabularies, numbers checked to be above 1, and sentences without a count
NEVER_ONE = re.compile(
    r"(?:\w+\.)*(?:[A-Z_]{4,}|_?context|sequence_length|row_tokens|max_tokens|prefix_tokens|batch_tokens|vocab_size)"
    r"|length|heads|model\.num_key_value_heads|known|tokens|sizes\[item\]|(?:quantity|counted)\(.*\)"
    r"|int\(NOBODY\)|RETRIES \+ 1|len\(folder\.SPECIALS\)|other\['vocab_size'\]|rows \* mixture\.sequence_length"
    r"|config\.min_frequency"  # reported only above 1
)
NEVER_ONE_HERE = {
    "{len(text)} characters of ",
    "{longest} tokens of long answers",
    "{most} values, found ",
    "{value} degrees",
    "{one.tokens} tokens, ",
    "{plan.batch_rows} rows in a batch are fewer than ",
}
NEVER_ONE_HERE |= {
    "{candidates.longest} tokens are more than the context of ",
    "{length - 1} tokens are more than the ",
}
NEVER_ONE_HERE |= {"{len(AS_ASSISTANT)} built-in examples fit the model's context of "}
NEVER_ONE_HERE |= {"{results['bytes_per_token']} bytes per token over "}
VERBS = {
    "is",
    "as",
    "was",
    "has",
    "this",
    "its",
    "us",
    "does",
    "needs",
    "ends",
    "comes",
    "gives",
    "names",
    "allows",
    "runs",
}
VERBS |= {"holds", "leaves", "compares", "promises", "becomes", "tells", "left", "process", "others"}
VERBS |= {"expects", "shows", "scores"}


def bare_plurals(source: str) -> list[tuple[int, str]]:
    """Return line and text of each f-string with a plain number before a plural: `f"{steps} steps"`."""
    found = []
    tree = ast.parse(source)
    ours = {id(text) for one in ast.walk(tree) if isinstance(one, ast.Assert) and one.msg for text in ast.walk(one.msg)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr) or id(node) in ours:  # assertion messages are not for users
            continue
        for value, text in zip(node.values, node.values[1:], strict=False):
            if not (isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant)):
                continue
            spec = ast.unparse(value.format_spec) if value.format_spec else ""
            word = re.match(r" (?:[a-z-]+ )?([a-z-]+s|GPUs)\b", str(text.value))
            number = ast.unparse(value.value)
            plain = value.conversion == -1 and not re.search(r"[.%]|[<>]", spec)  # 1.00 nats
            shown = f"{{{number}}}{text.value}"
            exempt = NEVER_ONE.fullmatch(number) or any(shown.startswith(one) for one in NEVER_ONE_HERE)
            if word and plain and word[1] not in VERBS and not exempt:
                found.append((value.lineno, shown))
    return found


def test_a_count_of_one_is_singular():
    assert counted(1, "process") == "1 process" and counted(2, "process") == "2 processes"
    assert counted(1.0, "second") == "1 second" and counted(0.5, "second") == "0.5 seconds"
    assert counted(6, "retry") == "6 retries" and counted(1234, "key") == "1,234 keys"
    assert bare_plurals('f"{steps} steps, {rate:.2f} nats, {done} is"') == [(1, "{steps} steps, ")]
    assert bare_plurals('f"{config.max_tokens} tokens"') == []
    assert bare_plurals('f"{answers_in(sizes)} tokens"')  # a substring of the expression does not exempt it
    files = sorted((ROOT / "llmkit").rglob("*.py"))
    places = [f"{file}:{line}: {text}" for file in files for line, text in bare_plurals(file.read_text())]
    assert places == [], "use llmkit.io.progress.counted: " + "; ".join(places)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("version", "--version"),
        ("tokenise", "train-bpe"),
        ("dedup", "crawl-filter"),
        ("score", "--score"),
        ("judge", "train-reward"),
        ("merge", "--lora-rank"),
        ("GGUF", "export --format gguf"),
        ("fine_tune", "llmkit sft"),
        ("dpo", "sft"),
        ("chat", "llmkit sample MODEL --chat"),
        ("api", "llmkit serve MODEL"),
    ],
)
def test_a_command_of_other_programs_leads_to_ours(typed: str, named: str):
    with pytest.raises(UserError, match=f"no such command '{typed}'; see .*{re.escape(named)}"):
        cli.parse([typed, "--out", "x"])


def test_hints_name_existing_commands_options_and_pages():
    assert not set(cli.ELSEWHERE) & set(cli.COMMANDS)
    for hint in set(cli.ELSEWHERE.values()):
        for name, words in re.findall(r"llmkit ([a-z][a-z-]+)([^,:]*)", hint):
            module, config, _ = cli.COMMANDS[name]
            flags = {flag_of(item) for item in option_fields(getattr(importlib.import_module(module), config))}
            assert set(re.findall(r"--[a-z-]+", words)) <= flags, hint
        for page in re.findall(r"\S+\.md", hint):
            assert (ROOT / page).exists(), hint


def test_help_is_noun_phrases_and_says_what_becomes_of_bad_records():
    """No option is explained by "this often", "so many" or a subject such as "what"; verbs that order are a few."""
    vague = re.compile(
        r"\bso many\b|\bthis (often|times)\b|\bat which to\b|\bwhat they\b|^(Try|Take|Leave|Say|Go on)\b"
    )
    for name, (module, config, _) in cli.COMMANDS.items():
        config_class = getattr(importlib.import_module(module), config)
        for item in option_fields(config_class):
            text = option_of(item).help
            assert text.endswith(".") and not vague.search(text), f"{name} {flag_of(item)}: {text}"
    crawl = importlib.import_module("llmkit.stages.crawl_filter").CrawlFilterConfig
    assert "skipped" in crawl.examples and "--max-bad" in crawl.examples and "--strict" in crawl.examples
