"""Log-likelihoods of continuations; shared prefixes are computed once.

    scorer = Scorer(load_model("base/"))
    pairs = [("The sea is", " blue"), ("The sea is", " made of cheese")]
    for likelihood in scorer.score(encode_pairs(load_tokenizer("base/"), pairs)):
        print(likelihood.logprob, likelihood.is_greedy)

Sequences are sorted, and neighbours that share most of their tokens become one row: a tree of tokens in depth-first
order, in which each token attends to its ancestors. The options of a question form such a row, and so do questions
after the same examples. Rows of similar length form a batch. Logits are computed only at scored positions, and once
for options that share a position.

Tokens are split between context and continuation as in lm-evaluation-harness 0.4.13 (`TemplateLM._encode_pair` and
`HFLM._loglikelihood_tokens`), so that scores equal those of its `--model hf`.

B rows, T tokens per row, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from llmkit.errors import UserError
from llmkit.kernels.attention import Branching
from llmkit.model.devices import is_small, threads
from llmkit.model.transformer import Transformer
from llmkit.tokenizer.encoding import Tokenizer

LONGEST_ROW = 512  # tokens of a tree; beyond that, masked attention costs more than sharing saves
SHARED = 2  # a sequence joins its neighbour's tree if it shares at least 1/SHARED of its tokens
BATCH_TOKENS = {"cpu": 2048}  # including padding; more do not fit the CPU's cache: 20% slower at 8192
BATCH_TOKENS_ELSEWHERE = 1 << 16
LOGITS = {"cpu": 1 << 20}  # per chunk: 4 MB in float32
LOGITS_ELSEWHERE = 1 << 24
SCORED = 128  # scored positions are padded to a multiple: oneDNN compiles its matmul for each new number
LARGEST = 31 << 20  # bytes; glibc keeps up to twice the largest freed block, if that is below 32 MB (mallopt(3))

Tokens = tuple[list[int], int]  # ids of a sequence, and the start of its continuation (at least 1)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Likelihood of a continuation after its context.

    logprob    natural logarithm, summed over `tokens` tokens
    is_greedy  whether greedy decoding gives the continuation
    truncated  whether the context was truncated on the left
    """

    logprob: float
    is_greedy: bool
    tokens: int
    truncated: bool = False


# ---- tokenization


def split_pair(context: str, continuation: str) -> tuple[str, str]:
    """Move white space at the end of a context to the continuation.

    Raises UserError for an empty continuation.
    """
    before = context.rstrip()
    rest = context[len(before) :] + continuation
    if not rest.strip():
        raise UserError(f"expected a continuation with text, found {rest[:40]!r} after {context[-40:]!r}")
    return before, rest


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
    """Encode contexts with their continuations, each pair as one text, split by `split_pair`.

    An empty context becomes the beginning token, or the end token if the tokenizer has none. Raises UserError for an
    empty continuation.
    """
    split = [split_pair(context, continuation) for context, continuation in pairs]
    texts = list(dict.fromkeys(text for context, rest in split for text in (context, context + rest)))
    ids, lengths = tokenizer.encode_batch(texts)
    ids_of = {text: some.tolist() for text, some in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)}
    begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    encoded: list[Tokens] = []
    for context, rest in split:
        before, full = (_with(begin, ids_of[context]) if context else []), ids_of[context + rest]
        full = _with(begin if context else [beginning(tokenizer)], full)
        start = max(1, len(before))
        if start < len(full):  # the context's own tokens, even if its last one would merge with the continuation
            encoded.append((before + full[start:] if before else full, start))
        else:  # the continuation merges completely into the context's last token; lm-evaluation-harness fails here
            encoded.append((full, len(full) - 1))
    return encoded


def encode_core(
    tokenizer: Tokenizer, groups: Sequence[Sequence[str]], contexts: Sequence[str] | None, is_schema: bool
) -> list[Tokens]:
    """Encode the options of each item as nanochat's core_eval does for CORE.

    Scored are the tokens after the options' common prefix; of a schema, their common suffix; with `contexts`, the
    tokens after the context.
    """
    begin, encoded = beginning(tokenizer), []
    for number, texts in enumerate(groups):
        ids = [[begin, *tokenizer.encode(text)] for text in texts]
        if contexts is not None:
            starts = [_common([begin, *tokenizer.encode(contexts[number])], ids[0])]
        elif is_schema:
            backwards = [tokens[::-1] for tokens in ids]
            shared = min(_common(backwards[0], other) for other in backwards[1:])
            starts = [len(tokens) - shared for tokens in ids]
        else:
            starts = [min(_common(ids[0], other) for other in ids[1:])] * len(ids)
        encoded += [(tokens, max(1, min(start, len(tokens) - 1))) for tokens, start in zip(ids, starts, strict=True)]
    return encoded


def beginning(tokenizer: Tokenizer) -> int:
    """Return the token that stands for an empty context. Raises UserError if the tokenizer has none."""
    known = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_text_id)
    first = next((token for token in known if token is not None), None)
    if first is None:
        raise UserError(f"{tokenizer.path}: expected a beginning or end token for an empty context, found none")
    return first


def _with(begin: list[int], ids: list[int]) -> list[int]:
    return ids if ids[:1] == begin else begin + ids


def windows(tokens: Tokens, context: int) -> list[Tokens]:
    """Truncate a sequence on the left to a model's context.

    A continuation longer than the context is scored in non-overlapping pieces, each after one token of context.

    >>> windows(([0, 1, 2, 3, 4], 3), 3), windows(([0, 1, 2, 3, 4], 1), 3)
    ([([1, 2, 3, 4], 2)], [([0, 1, 2, 3], 1), ([1, 2, 3, 4], 3)])
    """
    ids, start = tokens
    continuation = len(ids) - start
    if continuation <= context:
        ids = ids[-(context + 1) :]
        return [(ids, len(ids) - continuation)]
    pieces = []
    for first in range(start, len(ids), context):
        end = min(first + context, len(ids))
        piece = ids[max(0, end - context - 1) : end] if first > start else ids[first - 1 : end]
        pieces.append((piece, len(piece) - (end - first)))
    return pieces


# ---- rows


@dataclass
class _Row:
    """A tree of tokens: ids, depths, and ends of subtrees.

    scored  (request, positions of the logits, target tokens)
    path    positions of the last sequence
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    scored: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    branches: bool = False

    def add(self, ids: list[int], shared: int) -> None:
        """Add a sequence that shares its first `shared` tokens with the previous one."""
        self.close(shared)
        self.branches |= bool(self.ids)
        first, new = len(self.ids), len(ids) - shared
        self.path += range(first, first + new)
        self.ids += ids[shared:]
        self.depths += range(shared, len(ids))
        self.ends += [-1] * new

    def close(self, depth: int = 0) -> None:
        """End the subtrees of the last path from `depth` on."""
        for position in self.path[depth:]:
            self.ends[position] = len(self.ids)
        del self.path[depth:]


def _rows(requests: Sequence[Tokens]) -> list[_Row]:
    """Arrange all sequences in rows, without their last tokens, whose logits are not needed."""
    order = sorted(range(len(requests)), key=lambda index: requests[index][0])
    rows: list[_Row] = []
    before: list[int] = []
    for index in order:
        ids, start = requests[index]
        inputs = ids[:-1]
        shared = _common(before, inputs)
        row = rows[-1] if rows else _Row()
        room = max(LONGEST_ROW, 2 * len(inputs)) - len(row.ids)
        if not rows or SHARED * shared < len(inputs) or len(inputs) - shared > room:
            row, shared = _Row(), 0
            rows.append(row)
        if len(inputs) > shared or not row.ids:
            row.add(inputs, shared)
        else:
            row.close(len(inputs))
        row.scored.append((index, row.path[start - 1 :], ids[start:]))
        before = inputs
    for row in rows:
        row.close()
    return rows


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common prefix."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return next(index for index in range(most) if first[index] != second[index])


class _Trees(Branching):
    """The attention mask of trees: a token attends to its ancestors.

    ends (B, T)    exclusive end of each token's subtree
    depths (B, T)  position of each token in its sequence
    """

    def __init__(self, ends: Tensor, depths: Tensor) -> None:
        super().__init__(ends, ends, depths)
        self.documents = None  # subtrees do not cross documents

    @cached_property
    def _seen(self) -> Tensor:
        position = torch.arange(self.doc_ids.shape[1], device=self.doc_ids.device)
        query = position.unsqueeze(1)
        return (position <= query) & (query < self.doc_ids.unsqueeze(1))


# ---- scores


class Scorer:
    """Scores continuations with a model. `computed` counts the tokens of its forward passes, including padding."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.device = model, model.embed_tokens.device
        self.context = model.config.max_position_embeddings
        self._threads = 1 if is_small(model.config.parameter_count, self.device) else torch.get_num_threads()
        self._batch_tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS_ELSEWHERE)
        self.computed = 0
        torch.empty(LARGEST, dtype=torch.uint8, device="cpu")  # otherwise page faults take a tenth of the time

    def score(self, requests: Sequence[Tokens]) -> list[Likelihood]:
        """Return the likelihood of each continuation. Raises UserError if logits are not finite."""
        pieces = [(number, piece) for number, tokens in enumerate(requests) for piece in windows(tokens, self.context)]
        logprobs = np.zeros(len(requests))
        greedy = np.ones(len(requests), bool)
        # not inference_mode: training reuses the rotary tables
        with torch.no_grad(), threads(self._threads):
            for batch in _batches(_rows([piece for _, piece in pieces]), self._batch_tokens):
                for index, logprob, is_greedy in self._score_batch(batch):
                    logprobs[pieces[index][0]] += logprob
                    greedy[pieces[index][0]] &= is_greedy
        if not np.isfinite(logprobs).all():
            raise UserError("its logits are not finite: its weights are damaged, or overflow its dtype")
        return [
            Likelihood(float(logprob), bool(is_greedy), len(ids) - start, len(ids) > self.context + 1)
            for (ids, start), logprob, is_greedy in zip(requests, logprobs, greedy, strict=True)
        ]

    def _score_batch(self, rows: Sequence[_Row]) -> Iterator[tuple[int, float, bool]]:
        width = max(len(row.ids) for row in rows)
        filled = np.zeros((3, len(rows), width), np.int64)
        filled[2] = width  # padding attends to itself
        for number, row in enumerate(rows):
            filled[:, number, : len(row.ids)] = row.ids, row.depths, row.ends
        self.computed += len(rows) * width
        ids_BT, depths_BT, ends_BT = torch.from_numpy(filled).to(self.device)
        trees = _Trees(ends_BT, depths_BT) if any(row.branches for row in rows) else None
        scored = [
            (index, np.array(positions) + number * width, targets)
            for number, row in enumerate(rows)
            for index, positions, targets in row.scored
        ]
        positions, where = np.unique(np.concatenate([positions for _, positions, _ in scored]), return_inverse=True)
        targets = np.concatenate([targets for *_, targets in scored])
        positions = np.pad(positions, (0, -len(positions) % SCORED), "edge")
        hidden_NC = self.model(ids_BT, doc_ids=trees, rows=torch.from_numpy(positions).to(self.device))
        logprobs, best = np.empty(len(targets)), np.empty(len(targets), bool)
        step = max(1, LOGITS.get(self.device.type, LOGITS_ELSEWHERE) // self.model.config.vocab_size)
        for first in range(0, len(hidden_NC), step):
            logprobs_NV = self.model.logits(hidden_NC[first : first + step]).float().log_softmax(-1)
            chosen = np.flatnonzero((where >= first) & (where < first + step))
            row, target = (torch.from_numpy(x[chosen]).to(self.device) for x in (where - first, targets))
            logprob = logprobs_NV[row, target]
            greedy = logprob == logprobs_NV.amax(-1)[row]  # argmax, which breaks ties, takes 13x as long
            greedy[greedy.clone()] = logprobs_NV[row[greedy]].argmax(-1) == target[greedy]
            logprobs[chosen], best[chosen] = logprob.cpu().numpy(), greedy.cpu().numpy()
        end = 0
        for index, positions, _ in scored:
            start, end = end, end + len(positions)
            yield index, float(logprobs[start:end].sum()), bool(best[start:end].all())


def _batches(rows: list[_Row], tokens: int) -> Iterator[list[_Row]]:
    """Yield batches of rows of similar length, longest first; rows with and without branches are not mixed."""
    for branches in (True, False):
        batch: list[_Row] = []
        for row in sorted((row for row in rows if row.branches is branches), key=lambda row: -len(row.ids)):
            if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch
