"""`llmkit sft --inspect`: the tokens of some examples, as they will be trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from llmkit.display import check_stdout, printable
from llmkit.io.progress import counted
from llmkit.tokenizer.chat import has_chat_tokens

if TYPE_CHECKING:
    from llmkit.data.mixture import Packable
    from llmkit.tokenizer.encoding import Tokenizer

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "result": "yellow", "": "white"}


def show_examples(sources: Sequence[Packable], tokenizer: Tokenizer, count: int) -> None:
    """Print `count` examples, taken from the sources in turn, on stdout.

    On a terminal each role has a colour, and what is trained on is bold and underlined; elsewhere it stands between
    « and ». Each token is followed by a thin bar on a terminal, so that one sees where words are cut.
    """
    from rich.console import Console
    from rich.text import Text

    check_stdout()
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)
    shown = printable if console.is_terminal else str
    for number in range(count):
        source, index = sources[number % len(sources)], number // len(sources)
        if index >= len(source):
            continue
        ids, trained = source[index]
        heading = (
            f"==> {source.name}, example {index + 1}: {counted(len(ids), 'token')}, {int(trained.sum())} trained on <=="
        )
        text = Text()
        pieces = zip(_roles(ids.tolist(), trained.tolist(), tokenizer), trained.tolist(), ids.tolist(), strict=True)
        stream = tokenizer.stream()  # a character of several tokens is shown with the last of them
        for (role, learnt), group in groupby(pieces, key=lambda piece: (piece[0], piece[1])):
            words = [shown(word) for _, _, token in group if (word := stream.push([token]))]
            if console.is_terminal:
                text.append("\u2009".join(words), f"{COLOURS[role]}{' bold underline' if learnt else ''}")
            else:
                text.append(f"\u00ab{''.join(words)}\u00bb" if learnt else "".join(words))
        text.append(shown(stream.finish()))
        console.print(shown(heading), style="bold" if console.is_terminal else None)
        console.print(text, "")


def _roles(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> list[str]:
    """Name the role of each token; under a foreign template, trained tokens count as the assistant's."""
    if not has_chat_tokens(tokenizer):
        return ["assistant" if learnt else "" for learnt in trained]
    start, separator, end = (tokenizer.specials[name] for name in ("<|im_start|>", "<|im_sep|>", "<|im_end|>"))
    result = tokenizer.specials["<|result_start|>"], tokenizer.specials["<|result_end|>"]
    roles, role, inside = [], "", False
    for index, token in enumerate(ids):
        if token == start:
            until = next((i for i in range(index, len(ids)) if ids[i] == separator), index)
            role = tokenizer.decode(ids[index + 1 : until])
        inside = inside or token == result[0]
        roles.append("result" if inside else role if role in COLOURS else "")
        if token == result[1]:
            inside = False
        if token == end:
            role = ""
    return roles
