"""Extract the final answer of a completion, as text or as the letter of a choice."""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Sequence

from llmkit.formats.problems import last_boxed
from llmkit.rewards.numbers import ANNOUNCED, SENTENCE_END

MARK = re.compile("(?<!#)####(?!#)")
# text after #### in a heading rather than an answer: "Step 1", "Final Answer:" alone, "2. Compute"
HEADING = re.compile(
    r"\A(?:[\W\d_]*(?:(?:step|part|case|solution|conclusion|explanation|reasoning|summary|given|verification|check"
    r"|calculation|method|approach|question|problem|plan|thought|analysis|example)s?\b"
    r"|(?:final )?(?:answer|result)[\W_]*\Z)|[\W_]*\d+[.)]\s+[^\W\d_])",
    re.IGNORECASE,
)
THOUGHT = "</think>"
TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
DENIAL = re.compile(
    r"\b(?:not|never|neither|nor|cannot|except|(?:all|any|anything) but|other than|wrong|incorrect|false"
    r"|eliminat|exclud|reject|ruled? out|(?:is|are|was) too \w)"
    r"|n['\u2019]t\b",
    re.IGNORECASE,
)
INSTEAD = re.compile(
    r",? (?:and |but )?(?:not|rather than|instead of) (?:[(\[]?[A-Z][)\]]?(?:,? (?:or|and) |\b))+(?=\W*\Z)"
)
CONCLUSION = re.compile(r"(?:so|thus|therefore|hence|that leaves|this leaves)\b", re.IGNORECASE)
LETTER = r"A-Za-z0-9_\u00c0-\u024f'\u2019"  # other scripts have no spaces between words: 答案是B
# a single capital letter, except the article A and the pronoun I before a lower-case word
NAMED = re.compile(rf"(?<![{LETTER}])([A-Z])(?![{LETTER}])(?!(?<=[AI])\s+(?!(?:or|nor|and|but|is|was)\b)[a-z])")
QUOTES = " \t\r\n\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb"


def unasked(completion: str, prompt: str) -> str:
    """Remove repetitions of the whole prompt, if it has three words or more."""
    question = prompt.strip()
    return completion.replace(question, "\n") if len(question.split()) >= 3 else completion


def after_thinking(completion: str) -> str:
    """Return the text after the last </think>, or all of it if nothing follows."""
    rest = completion.rpartition(THOUGHT)[2]
    return rest if rest.strip() else completion


def tagged(completion: str) -> str | None:
    """Return the text in the last <answer>...</answer>, closed or not; None without one."""
    return next(reversed(TAG.findall(completion)), None)


def final(completion: str) -> str:
    """Return the answer part of a completion: the text after its thinking, in <answer> if there is one.

    >>> final("<think>4?</think> So <answer>5</answer>."), final("5")
    ('5', '5')
    """
    text = after_thinking(completion)
    answer = tagged(text)
    return text if answer is None else answer


def marked(completion: str, numeric: bool = False) -> str | None:
    """Return the text after ####, or "" if several differ; without ####, the last box, as in MATH's solutions.

    Headings ("#### Step 1", and if `numeric` any without a digit) do not count.

    >>> marked("2 + 2 = 4\\n#### 4"), marked("#### 4\\n#### 5"), marked(r"\\boxed{3} \\boxed{4}"), marked("four")
    ('4', '', '4', None)
    """
    pieces = [part.strip(" \t").partition("\n") for part in MARK.split(completion)[1:]]
    lines = [
        line.strip()
        for number, (line, _, rest) in enumerate(pieces, 1)
        if not (
            (rest.strip() or number < len(pieces))
            and (HEADING.match(line) or (numeric and line.strip() and not any(map(str.isdecimal, line))))
        )
    ]
    if not lines:
        boxed = last_boxed(completion)
        return None if boxed is None else TEXT.sub(r"\1", boxed)
    answers = {line[start.end() :] if (start := ANNOUNCED.search(line)) else line for line in lines}
    return answers.pop() if len(answers) == 1 else ""


def statement(completion: str) -> str:
    """Return the final statement: the marked text, else the text after "the answer is", else the last line."""
    text = marked(completion)
    if text is not None:
        return text
    places = deque(ANNOUNCED.finditer(completion), maxlen=1)
    if places:
        rest = completion[places[-1].end() :].strip()
        return rest.splitlines()[0] if rest else ""
    lines = completion.strip().splitlines()
    return lines[-1].strip() if lines else ""


def last_sentence(completion: str) -> str:
    """Return the last sentence of the final statement.

    >>> last_sentence("2 + 3 = 5. The answer is five. "), last_sentence("Six.")
    ('five.', 'Six.')
    """
    text = statement(completion)[-1000:]
    ends = [end.end() for end in SENTENCE_END.finditer(text) if text[end.end() :].strip()]
    return text[ends[-1] :] if ends else text


def plain(text: str) -> str:
    """Normalize text for comparison: fold case and white space, strip quotes, emphasis and a final full stop.

    >>> plain(' **"Yes  indeed."** ')
    'yes indeed'
    """
    text = " ".join(unicodedata.normalize("NFC", text).replace("\u2019", "'").split()).strip(QUOTES)
    return (text[:-1] if text.endswith((".", "!", "\u3002")) and len(text) > 1 else text).strip(QUOTES).casefold()


def says(completion: str, answer: str) -> bool:
    """True if the answer is the whole completion or its final statement.

    Deliberately strict: "It is Paris" is not "Paris"; the verifier `match` accepts both.
    """
    wanted = plain(answer)
    return bool(wanted) and wanted in (plain(completion), plain(statement(completion)))


def chosen(completion: str, options: Sequence[tuple[str, str]]) -> str | None:
    """Return the letter of the option that a completion chooses; None if it chooses none, or leaves it open.

    It accepts the letter ("B", "(b)", "B)", "B. text", "The answer is B") or the text of an option alone. The final
    statement may name only one letter, and deny nothing: "A or B" and "not A, but B" choose nothing.
    """
    choice = unicodedata.normalize("NFKC", statement(completion)).strip(QUOTES)
    choice = INSTEAD.sub("", choice)
    ending = last_sentence(choice).strip(QUOTES)
    choice = ending if CONCLUSION.match(ending) else choice
    alone = re.fullmatch(r"(?i:(?:the )?(?:option|choice|letter|answer)\s+)?[(\[]?([A-Za-z])[)\].:\u3002]{0,2}", choice)
    letters = [letter for letter, _ in options]
    if alone:
        return alone[1].upper() if alone[1].upper() in letters else None
    texts = [letter for letter, text in options if plain(text) and plain(text) == plain(choice)]
    if texts:
        return texts[0] if len(texts) == 1 else None
    labelled = re.match(r"[(\[]?([A-Za-z])[)\].:]{1,2}\s*(.+)", choice, re.DOTALL)
    if labelled and any(
        letter == labelled[1].upper() and plain(text) == plain(labelled[2]) for letter, text in options
    ):
        return labelled[1].upper()
    reasoned = re.match(r"[(\[*]*([A-Z])[)\]*.:]*[ \t]*,?[ \t]*(?:because|since|as|for)\b", choice)
    if reasoned and reasoned[1] in letters:
        return reasoned[1]
    named = NAMED.findall(choice)
    candidates = {letter for letter in named if letter in letters}
    return candidates.pop() if len(candidates) == 1 and not DENIAL.search(choice) else None
