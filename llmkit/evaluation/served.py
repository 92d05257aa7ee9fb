"""Log-likelihoods from a server that echoes prompts with log-probabilities (OpenAI's legacy `/v1/completions`).

scorer = ServedScorer(OpenAIClient(parse_address("openai:http://localhost:8000/v1#base", "--engine")))
scorer.score([([1, 72, 105], 1)])  # our token ids
scorer.score_texts([("The sea is", " blue")])  # the server's tokenization
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from llmkit.errors import ServerError
from llmkit.evaluation.likelihood import Likelihood, Tokens, split_pair, windows
from llmkit.generation.served_models import OpenAIClient, PromptTooLong, Refused
from llmkit.io.progress import counted
from llmkit.tokenizer.encoding import Tokenizer

WITH_FOLDER = "give MODEL with --engine, to use its tokenizer"


class ServedScorer:
    """Scores continuations with a model behind a server, `concurrency` requests at a time.

    context    longest prompt in tokens; longer ones are truncated on the left. None if unknown
    tokenizer  the tokenizer of the ids in `score`; the texts of echoed tokens are compared with it
    """

    def __init__(
        self, server: OpenAIClient, concurrency: int = 8, context: int | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self._server, self._concurrency, self._context, self._tokenizer = server, concurrency, context, tokenizer
        self._max_tokens = 0
        self._checked = set[int]()  # token ids already compared

    def score(self, requests: Sequence[Tokens]) -> list[Likelihood]:
        """Return the likelihood of each continuation.

        Raises ServerError if the server does not echo, or has another tokenizer.
        """
        # a server also takes the last token of a sequence, and may need room to generate one more
        context = 1 << 40 if self._context is None else self._context - 2
        pieces = [windows(tokens, context) for tokens in requests]
        scores = iter(self._each(self._score, [piece for some in pieces for piece in some]))
        likelihoods = []
        for (ids, start), some in zip(requests, pieces, strict=True):
            each = [next(scores) for _ in some]
            logprob, is_greedy = sum(score.logprob for score in each), all(score.is_greedy for score in each)
            likelihoods.append(Likelihood(logprob, is_greedy, len(ids) - start, len(ids) > context + 1))
        return likelihoods

    def score_texts(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its context, with the server's tokenization.

        Raises ServerError if no token starts at the beginning of the continuation, or none precedes it.
        """
        return self._each(self._score_text, [split_pair(context, rest) for context, rest in pairs])

    def _each(self, score: Callable[[Any], Likelihood], requests: list[Any]) -> list[Likelihood]:
        with ThreadPool(self._concurrency) as pool:
            return list(pool.imap(score, requests))

    def _score(self, tokens: Tokens) -> Likelihood:
        ids, start = tokens
        echo = self._echo(ids)
        if len(echo["token_logprobs"]) != len(ids):
            raise self._fault(
                f"log-probabilities of the prompt's {counted(len(ids), 'token')}", len(echo["token_logprobs"])
            )
        # compare each id once, and only words and numbers: servers differ in spaces, special tokens and partial
        # characters
        for token, name in zip(ids, echo["tokens"], strict=True):
            if self._tokenizer is None or token in self._checked:
                continue
            ours, theirs = self._tokenizer.decode([token]).strip(), str(name).strip()
            if ours.isalnum() and theirs not in (ours, f"token_id:{token}"):
                raise self._fault(
                    f"the tokenizer of {self._tokenizer.path.parent}, whose token {token} is {ours!r}",
                    f"{theirs!r}; give the served folder as MODEL",
                )
            self._checked.add(token)
        return self._likelihood(echo, start)

    def _score_text(self, pair: tuple[str, str]) -> Likelihood:
        context, rest = pair
        echo = self._echo(context + rest)
        names = [str(name) for name in echo["tokens"]]
        letters, start, text = "".join(rest.split()), len(names), ""
        # from the end, because servers may prepend a token; without spaces, because some omit them from tokens
        while start and len(text) < len(letters):
            start -= 1
            text = "".join(names[start].split()) + text
        if text != letters:
            raise self._fault(f"a token boundary before {rest[:40]!r}", f"{text[:40]!r}; {WITH_FOLDER}")
        while start > 1 and not names[start - 1].strip():
            start -= 1
        return self._likelihood(echo, start)

    def _echo(self, prompt: str | list[int]) -> dict[str, Any]:
        """Return a prompt's tokens and log-probabilities, without those of a token generated on the side."""
        extra = self._max_tokens
        try:
            reply = self._server.ask(prompt, max_tokens=extra, seed=0, temperature=0.0, logprobs=True, echo=True)
        except PromptTooLong:
            raise ServerError(f"{self._server.place}: a prompt is longer than its context; {WITH_FOLDER}") from None
        except Refused:
            if extra:
                raise
            self._max_tokens = 1  # not every server accepts 0
            return self._echo(prompt)
        names = ("tokens", "token_logprobs", "top_logprobs")
        rows = {name: row if isinstance(row := reply.echoed.get(name), list) else [] for name in names}
        sizes = {len(row) for row in rows.values()}
        if len(sizes) > 1 or max(sizes) <= extra:
            raise self._fault("log-probabilities of the prompt (echo=true)", "none; llmkit serve and vLLM return them")
        return {name: row[: len(row) - extra] for name, row in rows.items()}

    def _likelihood(self, echo: dict[str, Any], start: int) -> Likelihood:
        logprobs, best = echo["token_logprobs"][start:], echo["top_logprobs"][start:]
        if not all(isinstance(value, (int, float)) for value in logprobs):
            raise self._fault("log-probabilities of a continuation's tokens", f"none for the first; {WITH_FOLDER}")
        greedy = [not top or value >= max(top.values()) for value, top in zip(logprobs, best, strict=True)]
        return Likelihood(float(sum(logprobs)), all(greedy), len(logprobs))

    def _fault(self, expected: str, actual: object) -> ServerError:
        return ServerError(f"{self._server.place}: expected {expected}, found {actual}")
