"""Tuning a policy on comparisons: log-probabilities of answers under the policy and its reference, and their loss.

    source = policy_comparisons(comparisons, "dpo", context)
    source = Reference(tuning, "float32", Path("runs"), quiet=False).compare(source)
    batch = packed_comparisons([source.candidates[:2]], 512, pad)
    PreferenceLoss(Objective.of("dpo"))(model, batch).total.backward()

A prompt is computed once for all its answers. B rows of T tokens, M comparisons in a row, K answers in a comparison.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from llmkit.data.batches import shuffled
from llmkit.data.examples import Examples
from llmkit.errors import UserError
from llmkit.io.files import atomic_file, file_sha256
from llmkit.io.hub import local_folder
from llmkit.io.progress import Progress, counted, say
from llmkit.kernels.attention import Branching
from llmkit.model.transformer import evaluating
from llmkit.reward_model.comparisons import Candidates, ComparisonRows, Comparisons, evaluated, evaluation_rows
from llmkit.reward_model.head import SCORED_TOKENS, row_length
from llmkit.tokenizer.chat import Encoded
from llmkit.training.distributed import is_sharded, world
from llmkit.training.finetuning import Tuning
from llmkit.training.loss import Loss, Summed
from llmkit.training.preferences import MISMATCHED, Objective, figures_of, kto_losses, pair_losses, sums_of


class Answers(NamedTuple):
    """Log-probabilities of the answers of N comparisons.

    logprobs, references, lengths, ranks  float32 (N, K): sums over trained tokens, and their number
    margins  float32 (N,)
    nll      cross-entropy, summed over `tokens` trained tokens of prompts and best answers
    """

    logprobs: Tensor
    references: Tensor
    lengths: Tensor
    ranks: Tensor
    margins: Tensor
    nll: Tensor
    tokens: int


@dataclass(frozen=True)
class PreferenceLoss:
    """The summed loss of rows of comparisons, and the number of comparisons, or of answers with kto."""

    objective: Objective

    def __call__(self, model: Any, batch: ComparisonRows) -> Summed:
        objective = self.objective
        # with FSDP all ranks must run the same number of forward passes
        rows = [batch] if is_sharded(model.embed_tokens) else batch.by_size()
        parts = [answer_logprobs(model, some) for some in rows]
        logprobs, references, lengths, ranks, margins = (
            torch.cat([getattr(part, name) for part in parts]) for name in Answers._fields[:5]
        )
        if objective.loss == "kto":
            each, rewards, divergence = kto_losses(objective, logprobs, references, ranks)
            chosen, rejected = ranks == 1, ranks == 2
            pairs = chosen.unsqueeze(2) & rejected.unsqueeze(1)
            count, extra = int((chosen | rejected).sum()), {"kl": divergence, "estimates": 1.0}
        else:
            each, rewards, pairs = pair_losses(objective, logprobs, references, lengths, ranks, margins)
            chosen = ranks == ranks.amin(1, keepdim=True)
            rejected = ranks.isfinite() & ~chosen
            count, extra = len(each), {}
        total = each.sum()
        if objective.sft_weight:
            nll = torch.stack([part.nll for part in parts]).sum()
            total = total + objective.sft_weight * float(batch.shares[0]) * nll
            extra = {"nll": float(nll.detach()), "tokens": float(sum(part.tokens for part in parts))}
        return Summed(total, count, {**sums_of(rewards, lengths, chosen, rejected, pairs), **extra})


def answer_logprobs(model: Any, batch: ComparisonRows) -> Answers:
    """Return the log-probabilities of the answers in rows of comparisons."""
    device = model.embed_tokens.device
    ids, documents, branches, positions = (torch.from_numpy(array).to(device) for array in batch[:4])
    hidden_BTC = model(ids, doc_ids=Branching(documents, branches, positions))
    trained = batch.predictors >= 0
    row, _ = np.nonzero(trained)
    document, branch = batch.doc_ids[trained], batch.branch_ids[trained]
    predictor_N = torch.from_numpy(row * batch.token_ids.shape[1] + batch.predictors[trained]).to(device)
    target_N = ids[torch.from_numpy(trained).to(device)]
    logprob_N = model.target_logprobs(hidden_BTC.flatten(0, 1)[predictor_N], target_N)

    shape, answer = batch.ranks.shape, np.maximum(branch - 1, 0)
    place = torch.from_numpy(np.ravel_multi_index((row, document, answer), shape)).to(device)
    in_answer = torch.from_numpy(branch > 0).to(logprob_N)
    sums, lengths = (
        logprob_N.new_zeros(batch.ranks.size).index_add(0, place, values).view(shape)
        for values in (logprob_N * in_answer, in_answer)
    )
    present = torch.from_numpy(batch.numbers >= 0)
    best = (branch == 0) | (batch.ranks[row, document, answer] == batch.ranks.min(2)[row, document])
    references, ranks, margins = (
        torch.from_numpy(array)[present].to(logprob_N) for array in (batch.references, batch.ranks, batch.margins)
    )
    nll = -logprob_N[torch.from_numpy(best).to(device)].sum()
    return Answers(sums[present], references, lengths[present], ranks, margins, nll, int(best.sum()))


# ---- data


def balanced(objective: Objective, sources: Sequence[Any]) -> Objective:
    """Weight desirable and undesirable answers equally; section 4.3 of KTO's paper has ratios of 1 to 4/3.

    Raises UserError, with the counts of what was left out, if there are none of one kind.
    """
    ranks = [rank for source in sources for candidates in source.candidates for rank in candidates.ranks]
    desirable, undesirable = ranks.count(1), ranks.count(2)
    if not (desirable and undesirable):
        reasons = ", ".join(source.reasons for source in sources if source.reasons)
        raise UserError(
            f"--loss kto: expected desirable and undesirable answers, found {desirable} and {undesirable}"
            f"{f' ({reasons})' if reasons else ''}; add answers of the other label"
        )
    return replace(
        objective, desirable=max(1.0, undesirable / desirable), undesirable=max(1.0, desirable / undesirable)
    )


def policy_comparisons(source: Comparisons, loss: str, context: int, quiet: bool = False) -> Comparisons:
    """Prepare comparisons for a loss: the common beginning of all answers, such as a turn's header, joins the prompt.

    Comparisons without a better and a worse answer are left out and counted. For kto the best answers are desirable,
    the others not, and each prompt gets an answer to another prompt, cut to the context, with rank `MISMATCHED`. Raises
    UserError if nothing is left, and for kto if all answers have the same prompt.
    """
    usable: list[Candidates] = []
    counts: Counter[str] = Counter()
    for candidates in source.candidates:
        ranks = candidates.ranks
        if not all(mask.any() for mask in candidates.trained[1:]):
            counts["left out: an answer without trained tokens"] += 1
            continue
        if len(ranks) > 1 and len(set(ranks)) < 2:
            counts["left out: equal ranks"] += 1
            continue
        candidates = _with_shared_header(candidates)
        if loss == "kto":
            candidates = replace(candidates, ranks=tuple(min(rank, 2) for rank in ranks))
        elif loss == "orpo":
            prompt = np.arange(len(candidates.prompt)) > 0
            candidates = replace(candidates, trained=(prompt, *candidates.trained[1:]))
        usable.append(candidates)
    if counts:
        source = Comparisons(source.name, usable, source.counts + counts)
        say(f"{source.name}: {source.reasons}; {counted(len(usable), 'comparison')} in use", quiet)
    if not usable:
        raise UserError(f"{source.name}: nothing to learn from: no better and worse answers ({source.reasons})")
    if loss == "kto":
        usable = _with_mismatched(usable, source.name, context)
    numbered = [replace(candidates, number=number) for number, candidates in enumerate(usable)]
    return Comparisons(source.name, numbered, source.counts)


def _with_shared_header(candidates: Candidates) -> Candidates:
    first, most = candidates.answers[0], min(int(mask.argmax()) for mask in candidates.trained[1:])
    same = np.all([answer[:most] == first[:most] for answer in candidates.answers], 0)
    shared = int(np.append(same, False).argmin())
    prompt, *trained = candidates.trained
    return replace(
        candidates,
        prompt=np.concatenate([candidates.prompt, first[:shared]]),
        answers=tuple(answer[shared:] for answer in candidates.answers),
        trained=(np.append(prompt, np.zeros(shared, bool)), *(mask[shared:] for mask in trained)),
    )


def _with_mismatched(usable: Sequence[Candidates], name: str, context: int) -> list[Candidates]:
    """Add to each comparison the first answer of the next one, in shuffled order, with another prompt."""
    order, given = shuffled(len(usable), 0, 0).tolist(), list(usable)
    other: Candidates | None = None
    for place in reversed(range(2 * len(order))):  # in the first half `other` is known, unless there is only one prompt
        number, following = order[place % len(order)], usable[order[(place + 1) % len(order)]]
        own = usable[number].prompt
        if not np.array_equal(own, following.prompt):
            other = following
        if place >= len(order):
            continue
        if other is None:
            raise UserError(f"{name}: --loss kto: expected answers to at least two prompts, found one")
        room = max(1, context - len(own))
        given[number] = replace(
            usable[number],
            answers=(*usable[number].answers, other.answers[0][:room]),
            ranks=(*usable[number].ranks, int(MISMATCHED)),
            trained=(*usable[number].trained, other.trained[1][:room]),
        )
    return given


def answers_of(source: Any, count: int) -> Examples:
    """Return the first answers, each after its prompt, to show them before training."""
    pairs = [
        (np.concatenate([candidates.prompt, ids]), np.concatenate([candidates.trained[0], trained]))
        for candidates in source.candidates[:count]
        for ids, trained in zip(candidates.answers, candidates.trained[1:], strict=True)
    ][:count]
    encoded = (("", Encoded(ids, trained, (len(ids),))) for ids, trained in pairs)
    return Examples.gather(source.name, encoded, 1 + max(len(ids) for ids, _ in pairs))


# ---- the reference


class Reference:
    """The initial model, to compare a policy with.

    precision  of its computation
    folder     cache of its log-probabilities, in files named by a hash of the model's files, the comparisons and the
               precision
    """

    def __init__(self, tuning: Tuning, precision: str, folder: Path, quiet: bool) -> None:
        self._model, self._pad, self._folder, self._quiet = tuning.model, tuning.pad_id, folder, quiet
        self._digest = sha256(f"{precision} {tuning.model.config.backend}".encode())
        for path in sorted(local_folder(tuning.folder, weights=True).iterdir()):
            if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
                self._digest.update(f"{path.name} {file_sha256(path)}".encode())

    def compare(self, source: Comparisons, *, held_out: bool = False) -> Comparisons:
        """Return the comparisons with the log-probabilities of their answers, from the cache or computed and cached;
        each rank computes its share."""
        path = self._path(source, held_out)
        count = sum(len(candidates.answers) for candidates in source.candidates)
        values = world().broadcast(_read_references(path, count) if world().leads else None)
        if values is None:
            first, stop = world().share(len(source))
            part = source.candidates[first:stop]
            own = sequence_logprobs(part, self._model, self._pad, self._quiet, held_out=held_out)
            values = [value for part in world().gather(own) for value in part]
            if world().leads:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as handle:
                    save_file({"logprobs": np.array(values, np.float32)}, handle.name, {"name": path.name})
        else:
            say(f"{source.name}: log-probabilities of the reference from {path}", self._quiet)
        return with_references(source, values)

    def _path(self, source: Comparisons, held_out: bool) -> Path:
        digest = self._digest.copy()
        digest.update(b"" if held_out else b"as in training")
        for candidates in source.candidates:
            for ids in (candidates.prompt, *candidates.answers, *candidates.trained[1:]):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return self._folder / f"reference-{digest.hexdigest()[:16]}.safetensors"


def _read_references(path: Path, count: int) -> list[float] | None:
    """Read log-probabilities from a file; return None if it is missing, or, with a message, if it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(os.fspath(path), "numpy") as file:
            values = file.get_tensor("logprobs")
            if (file.metadata() or {}).get("name") == path.name and values.shape == (count,) and (values <= 0).all():
                return values.tolist()
        fault = "those of other answers"
    except (SafetensorError, OSError) as error:
        fault = str(error)
    say(f"{path}: expected log-probabilities of {counted(count, 'answer')}, found {fault}; computing them again")
    return None


def with_references(source: Comparisons, logprobs: Sequence[float]) -> Comparisons:
    """Return the comparisons with reference log-probabilities, which are given for all answers in order."""
    given = iter(logprobs)
    compared = [replace(one, references=tuple(islice(given, len(one.answers)))) for one in source.candidates]
    return Comparisons(source.name, compared, source.counts)


def sequence_logprobs(
    candidates: Sequence[Candidates], model: Any, pad: int, quiet: bool, *, held_out: bool = False
) -> list[float]:
    """Return the log-probabilities of all answers in order, rounded as in training, or as by `held_out_figures`."""
    values: list[Sequence[float]] = [()] * len(candidates)
    length = row_length(np.array([one.size for one in candidates], np.int64))
    # with gradients a CPU rounds bfloat16 differently, by .15 nats per answer; frozen parameters keep no activations
    trained = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter.requires_grad]

    def compute(batch: ComparisonRows) -> np.ndarray:
        batch = batch._replace(numbers=np.where(batch.numbers < 0, 0, batch.numbers))  # all of M, in order
        return answer_logprobs(model, batch).logprobs.view(batch.ranks.shape).cpu().numpy()

    progress = Progress("reference", unit="comparisons", total=len(candidates), quiet=quiet)
    with ExitStack() as restored, evaluating(model), progress, torch.set_grad_enabled(not held_out):
        for parameter in trained:
            restored.callback(parameter.requires_grad_, True)
        for number, logprobs in evaluated(candidates, SCORED_TOKENS, length, pad, compute):
            values[number] = logprobs.tolist()
            progress.advance()
    return [value for part in values for value in part]


@torch.no_grad()
def held_out_figures(model: Any, sources: Sequence[Comparisons], loss: Loss, pad: int) -> dict[str, float]:
    """Return metrics of held-out comparisons: `val_loss`, and those of `figures_of` with the prefix `val_`."""
    total, targets, parts = 0.0, 0, []
    batches = (
        batch
        for source in sources
        for batch, _ in evaluation_rows(source.candidates, SCORED_TOKENS, row_length(source.sizes), pad)
    )
    with evaluating(model):
        for batch in world().deal(batches):
            summed = loss(model, batch)
            total, targets = total + float(summed.total), targets + summed.targets
            parts.append(summed.figures or {})
    total, count = world().sum(total, float(targets))
    return {"val_loss": total / max(1.0, count), **{f"val_{name}": value for name, value in figures_of(parts).items()}}
