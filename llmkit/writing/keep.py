"""Filter drafts by form, language, repetition, refusals, evaluation items, verifiers, scores and duplicates.

    keeper = Keeper()
    draft = Draft(0, (message("user", "2 + 2?"), message("assistant", "4")))
    keeper.decide(draft, keeper.check(draft))    # None: it is kept
    draft = Draft(1, (message("user", "2 + 2 ?"), message("assistant", "4")))
    keeper.decide(draft, keeper.check(draft))    # "duplicate: exact"

A reason is a step of the funnel and the fault, `STEP: FAULT`. Conversations are compared by hashes of their words and
word pairs; MinHash finds the candidates. Words alone would match templates with other names, and 5-grams, as in
crawl-filter, miss an edit in a short conversation (docs/write-chats.md has the figures). Self-Instruct uses the
threshold .7, too (arXiv 2212.10560).
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from time import thread_time
from typing import Any

import numpy as np

from llmkit.crawl.dedup.duplicates import minhash, shared
from llmkit.crawl.filters.contamination import Contamination, ContaminationRules
from llmkit.crawl.filters.quality import STOP_WORDS, GopherRepetition, gopher_repetition
from llmkit.crawl.output import Funnel
from llmkit.formats.conversations import RESULT, Message
from llmkit.formats.problems import Problem, read_problem
from llmkit.generation.requests import split_thoughts
from llmkit.io.records import Row
from llmkit.probing.refusals import SURE_OF_PASSAGE, is_refusal
from llmkit.rewards.reward import Attempt
from llmkit.rewards.verifiers import VerifierReward, verifier_of
from llmkit.text.answer_spans import SMALL
from llmkit.text.language import identify
from llmkit.text.words import Split, split_words
from llmkit.writing.draft import Draft

STEPS = ("form", "length", "language", "repetition", "refusal", "not_in", "wrong", "judge", "duplicate")
SIMILAR = 0.7  # Jaccard similarity at which a draft is a duplicate
REPLIES = 0.3  # least similarity of the replies: other questions about one long text are not duplicates
DOUBT = 0.25  # margin for MinHash: 5 standard deviations of an estimate of .7 from 112 minima
MOST_WORDS = 2000  # of a message
TELLING = 12  # least words and symbols to identify a reply's language, which names and titles do not have
LONG = 100  # least words and symbols for Gopher's rules
LEAST_DISTINCT = 0.3  # share of distinct words, in a shorter reply of at least TELLING words
ALL_SMALL = SMALL.union(*STOP_WORDS.values())  # function words of languages with a list
OPERATORS = frozenset("+*/=<>^%")  # distinguish "3 + 4" from "3 * 4"
# end-of-turn tokens of common templates, replies that continue with further turns, lone surrogates
STRAY = re.compile(
    r"<\|\w{2,20}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|^\W{0,4}(?:User|Human|Assistant)\W{0,2}:|[\ud800-\udfff]",
    re.MULTILINE,
)


class Keeper:
    """Keeps or drops drafts in the order of their index, and counts the outcomes.

    not_in      JSONL of evaluation items that no draft may contain
    fail_below  a draft is dropped if any of its scores is lower
    sandbox     whether unit tests of a record run in the sandbox
    funnel      counts by step and reason, as in crawl-filter
    """

    def __init__(
        self, not_in: Sequence[str] = (), fail_below: float | None = None, *, sandbox: bool = True, quiet: bool = False
    ) -> None:
        self._items = Contamination(ContaminationRules(tuple(not_in)), quiet) if not_in else None
        self._fail_below, self._verifier = fail_below, VerifierReward(sandbox=sandbox)
        self.funnel = Funnel(STEPS)
        self._features: list[tuple[np.ndarray, np.ndarray]] = []  # of kept drafts, see `_features_of`
        self._minima, self._nearest = np.zeros((256, 112), np.uint8), np.zeros(256)  # with room for more
        self._prompts: dict[str, tuple[str, str]] = {}  # kind and topic

    def decide(self, draft: Draft, reason: str | None, scores: Mapping[str, float] | None = None) -> str | None:
        """Return why a draft is dropped, as STEP: FAULT, or None if it is kept; no later one may then repeat it.

        reason  result of `check`
        scores  of a judge, higher is better; empty if unreadable, None without a judge
        """
        started = thread_time()
        if reason is None and scores is not None:
            low = [name for name, score in scores.items() if self._fail_below is not None and score < self._fail_below]
            reason = f"judge: {low[0]}" if low else None if scores else "judge: unreadable"
        reason = reason or self.duplicate(draft)
        self.recall(draft, reason)
        self._spend(reason, started)
        return reason

    def recall(self, draft: Draft, reason: str | None) -> None:
        """Count a draft that was dropped for `reason` or kept, and remember a kept one."""
        step, _, what = (reason or "").partition(": ")
        self.funnel.count(step or None, what or None)
        if reason is not None:
            return
        number, (whole, replies) = len(self._features), _features_of(draft)
        if number == len(self._minima):
            both = self._minima, self._nearest
            self._minima, self._nearest = (np.concatenate([array, np.zeros_like(array)]) for array in both)
        self._minima[number] = minhash(whole)
        similar = self._similarity(self._minima[number])
        self._nearest[:number] = np.maximum(self._nearest[:number], similar)
        self._nearest[number] = similar.max(initial=0)
        self._features.append((whole, replies))
        self._prompts[_asked(draft)] = draft.kind, draft.topic

    def check(self, draft: Draft) -> str | None:
        """Return what is wrong with a draft on its own, before it is judged, or None; count only the time."""
        started = thread_time()
        reason = self._fault(draft)
        self._spend(reason, started)
        return reason

    def _fault(self, draft: Draft) -> str | None:
        if reason := _form(draft):
            return reason
        replies = [split_thoughts(message.text)[1].strip() for message in draft.messages if message.role == "assistant"]
        if any(Split(message.text).word_count > MOST_WORDS for message in draft.messages):
            return f"length: over {MOST_WORDS:,} words"
        prose = re.sub(r"```.*?(?:```|\Z)", "", "\n\n".join(replies), flags=re.DOTALL)
        if draft.language and Split(prose).word_count >= TELLING:
            language, score = identify(prose)
            if score >= SURE_OF_PASSAGE and language != draft.language:
                return f"language: {language}"
        long = [reply for reply in replies if Split(reply).word_count >= TELLING]
        if len(set(long)) < len(long):
            return "repetition: same reply"
        for split in map(Split, long):
            if split.word_count >= LONG:
                repetition = gopher_repetition(split, GopherRepetition()).reason
            else:
                is_varied = len(split.vocabulary) >= LEAST_DISTINCT * split.word_count
                repetition = None if is_varied else "few different words"
            if repetition:
                return f"repetition: {repetition}"
        if draft.refusal != is_refusal(replies[-1], broad=draft.refusal):
            return "refusal: none" if draft.refusal else "refusal: not requested"
        if self._items and self._items.find("\n".join(part.text for turn in draft.messages for part in turn.parts)):
            return "not_in: evaluation item"
        if draft.answer is not None and not draft.refusal:
            verdict = self._verifier.score([Attempt(_problem(draft), replies[-1], 0, "stop", 0)])[0]
            return None if verdict else "wrong: answer" if verdict is not None else "wrong: cannot be judged"
        return None

    def figures(self) -> dict[str, Any]:
        """Return the funnel and the diversity of the kept drafts.

        prompts, by_kind, by_topic  numbers of distinct prompts; some have no kind or topic
        nearest_similarity          mean estimated similarity of a draft to the most similar one; None below two
        """
        kinds, topics = (Counter(pair[side] for pair in self._prompts.values() if pair[side]) for side in (0, 1))
        count, diversity = len(self._features), dict[str, Any](prompts=len(self._prompts))
        diversity |= {"by_kind": dict(kinds.most_common()), "by_topic": dict(topics.most_common())}
        diversity["nearest_similarity"] = round(float(self._nearest[:count].mean()), 4) if count > 1 else None
        return {"funnel": self.funnel.as_json(), "diversity": diversity}

    def close(self) -> None:
        """Stop the processes of verifiers."""
        self._verifier.close()

    def duplicate(self, draft: Draft) -> str | None:
        """Return how a draft repeats a kept one, or None."""
        if _asked(draft) in self._prompts:
            return "duplicate: same prompt"
        whole, replies = _features_of(draft)
        for number in np.flatnonzero(self._similarity(minhash(whole)) >= SIMILAR - DOUBT).tolist():
            other, answered = self._features[number]
            similarity = jaccard(whole, other)
            if similarity >= SIMILAR and jaccard(replies, answered) >= REPLIES:
                return "duplicate: exact" if similarity == 1 else "duplicate: near"
        return None

    def _spend(self, reason: str | None, started: float) -> None:
        """Add the thread's time to the step that a draft reached."""
        self.funnel.spend({reason.partition(":")[0] if reason else STEPS[-1]: thread_time() - started})

    def _similarity(self, row: np.ndarray) -> np.ndarray:
        """Estimate the Jaccard similarity of a signature (112,) to those of the kept drafts: (kept,)."""
        return np.maximum(shared(self._minima[: len(self._features)], row), 0.0)


def features(messages: Sequence[Message]) -> np.ndarray:
    """Hash the words and word pairs of a conversation: (n,) uint32, ascending.

    System messages and tool results are ignored.
    """
    hashes = set[int]()
    for message in messages:
        if message.role == "system":
            continue
        text = " ".join(part.text for part in message.parts if part.kind != RESULT)
        pieces = split_words(unicodedata.normalize("NFC", text).casefold())
        words = [word for word in pieces if word[0].isalnum() or OPERATORS & set(word)]
        hashes.update(zlib.crc32(word.encode()) for word in words if word not in ALL_SMALL)
        hashes.update(zlib.crc32(f"{first} {second}".encode()) for first, second in pairwise(words))
    return np.array(sorted(hashes) or [0], np.uint32)


def jaccard(some: np.ndarray, others: np.ndarray) -> float:
    """Return the Jaccard similarity of features (n,) and (m,)."""
    common = len(np.intersect1d(some, others, assume_unique=True))
    return common / (len(some) + len(others) - common)


def _features_of(draft: Draft) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of a conversation, and of its replies."""
    return features(draft.messages), features([turn for turn in draft.messages if turn.role == "assistant"])


def _asked(draft: Draft) -> str:
    """Return all text that the assistant gets, with case and white space folded."""
    text = "\n".join(message.text for message in draft.messages if message.role != "assistant")
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _form(draft: Draft) -> str | None:
    if draft.fault is not None:
        return draft.fault if draft.fault.startswith("duplicate: ") else f"form: {draft.fault}"
    turns = draft.messages[1:] if draft.messages and draft.messages[0].role == "system" else draft.messages
    if not turns or len(turns) % 2 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        return "form: roles do not alternate up to an answer"
    for turn in draft.messages:
        text = split_thoughts(turn.text)[1] if turn.role == "assistant" else turn.text
        if not text.strip():
            return "form: empty message"
        if STRAY.search(text):
            return "form: stray marks or further turns"
    return None


def _problem(draft: Draft) -> Problem:
    """Return the problem to verify a draft's answer by, from its record or its prompt; words need only match."""
    where = f"draft {draft.index}"
    if draft.record:
        problem = replace(read_problem(Row(dict(draft.record), where, 0)), answer=draft.answer)
    else:
        problem = Problem((), draft.prompt, draft.answer, None, {"answer": draft.answer}, where)
    in_words = problem.verifier is None and verifier_of(problem) == "exact"
    return replace(problem, verifier="match") if in_words else problem
