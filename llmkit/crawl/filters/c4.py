"""C4's rules (Raffel et al. 2020, section 2.2), with the choices of FineWeb: terminal punctuation is not asked for.

Lines are taken out of the text one by one; a page is dropped for a placeholder text, for a curly bracket, or when
too few sentences are left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmkit.crawl.filters.verdict import Verdict
from llmkit.text.words import Split, count_sentences, split_words

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
LOREM_IPSUM, JAVASCRIPT = "lorem ipsum", "javascript"
PHRASES = (LOREM_IPSUM, JAVASCRIPT, *POLICIES)
TERMINAL = (".", "?", "!", '"', "'", "\u201d", "\u2019")  # quotation marks count, as in C4


@dataclass(frozen=True, slots=True)
class C4:
    """Which lines and pages go; False or None switches a rule off."""

    min_sentences: int | None = 5  # in the lines that are left
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000  # characters; a line with a longer word goes
    remove_citations: bool = True  # [12], [edit] and [citation needed] go, the line stays
    remove_javascript_lines: bool = True  # lines that say "javascript"
    remove_policy_lines: bool = True  # lines that say "privacy policy", "use cookies" and the like
    remove_unterminated_lines: bool = False  # lines that end in no . ? ! or quotation mark; FineWeb keeps them
    drop_lorem_ipsum: bool = True  # pages with the printers' placeholder text
    drop_curly_bracket: bool = True  # pages with a "{" in a line that would stay: code


def c4(split: Split, rules: C4) -> Verdict:
    """The text without the lines that go, or the reason why the page is dropped.

    The measures count the lines removed by each rule (`javascript_lines`, ...), and the `sentences` and `words` left.
    """
    page = split.text.lower()
    suspects = tuple(phrase for phrase in PHRASES if phrase in page)  # few pages have any: spares looking line by line
    lines: list[str] = []
    measures: dict[str, float] = {}
    sentences = lost = 0
    for line in map(str.strip, split.text.split("\n")):
        if rules.remove_citations and "[" in line:
            whole, line = line, CITATION.sub("", line).strip()
            lost += len(split_words(whole)) - len(split_words(line))
        rule = _rule(line, rules, split.letters_per_word) or (_phrase_rule(line.lower(), rules) if suspects else None)
        if rule == "lorem_ipsum":
            return Verdict(rule, None, split.text, measures)
        if not rule and rules.drop_curly_bracket and "{" in line:
            return Verdict("curly_bracket", None, split.text, measures)
        if rule:
            measures[rule] = measures.get(rule, 0) + 1
            lost += len(split_words(line)) if line else 0
            continue
        sentences += count_sentences(line)
        lines.append(line)
    measures |= {"sentences": sentences, "words": split.word_count - lost}
    measures = split.telling(measures)
    short = rules.min_sentences is not None and measures.get("sentences", rules.min_sentences) < rules.min_sentences
    text = "\n".join(lines).strip()
    return Verdict("min_sentences" if short else None, sentences if short else None, text, measures)


def _rule(line: str, rules: C4, letters_per_word: int) -> str | None:
    """The rule on the form of a line that takes it out. Where a letter counts as a word, no word is long."""
    longest, least = rules.max_word_length, rules.min_words_per_line
    if letters_per_word > 1:
        few = least is not None and len(split_words(line)) < least * letters_per_word
        return "short_lines" if few else None
    if longest is not None and len(line) > longest < max(map(len, line.split())):
        return "long_word_lines"
    if rules.remove_unterminated_lines and (not line.endswith(TERMINAL) or line.endswith("...")):
        return "unterminated_lines"
    if least is not None and len(line.split(None, least)) < least:
        return "short_lines"
    return None


def _phrase_rule(line: str, rules: C4) -> str | None:
    """The rule on what a line, in lower case, says that takes it out or drops its page."""
    if rules.drop_lorem_ipsum and LOREM_IPSUM in line:
        return "lorem_ipsum"
    if rules.remove_javascript_lines and JAVASCRIPT in line:
        return "javascript_lines"
    if rules.remove_policy_lines and any(policy in line for policy in POLICIES):
        return "policy_lines"
    return None
