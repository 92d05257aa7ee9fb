"""Batches and losses: their interface to the trainer, the next-token loss, and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llmkit.data.batches import IGNORED, EvaluationBatches, TokenRows
from llmkit.io.progress import Progress
from llmkit.model.transformer import Transformer, evaluating
from llmkit.training.distributed import world


class Batch(Protocol):
    """The rows of a step: a named tuple of arrays whose first dimension is rows, which the trainer slices."""

    @property
    def tokens(self) -> int:
        """Tokens to count in the metrics."""
        ...

    def nothing(self) -> Any:
        """Return one row of the same shape without targets, for a rank that has no row when others have one."""
        ...

    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: Any, /) -> Any: ...
    def _make(self, iterable: Iterable[Any], /) -> Any: ...


class Summed(NamedTuple):
    """A loss summed over targets, their number, and other figures of the same rows, for the metrics."""

    total: Tensor
    targets: int
    figures: Mapping[str, float] | None = None


class Loss(Protocol):
    """The loss of some rows of a batch. It is stateless: rows are computed again if memory runs out."""

    def __call__(self, model: Any, rows: Any, /) -> Summed: ...


def rows_of(batch: Batch, start: int, stop: int) -> Any:
    """Return the rows start:stop of a batch, as a batch of the same type."""
    return batch._make(array[start:stop] for array in batch)


def next_token_loss(model: Any, rows: TokenRows) -> Summed:
    """Return the summed cross-entropy in nats (fp32 scalar) of packed rows, and the number of their targets."""
    device = next(model.parameters()).device
    packed = bool(rows.doc_ids_BT[:, -1].any())  # one document per row needs no mask
    loss = model.loss(
        torch.from_numpy(rows.token_ids_BT).to(device),
        torch.from_numpy(rows.targets_BT).to(device),
        torch.from_numpy(rows.doc_ids_BT).to(device) if packed else None,
        reduction="sum",
    )
    return Summed(loss, int((rows.targets_BT != IGNORED).sum()))


def masked_loss(model: Transformer, batches: Iterable[TokenRows], quiet: bool = False) -> dict[str, float]:
    """Return `val_loss`, in nats per target, over batches in which only some tokens are targets."""
    total, count = _summed_loss(model, batches, quiet)
    return {"val_loss": total / max(1, count)}


def held_out_loss(model: Transformer, batches: EvaluationBatches, quiet: bool = False) -> dict[str, float]:
    """Return `val_loss` (nats per token) and `val_bits_per_byte` (of UTF-8 text) over a complete validation set.

    Bits per byte does not depend on the tokenizer: it is the summed loss in bits divided by the bytes of the text,
    where each token is predicted once, from its own document and at most one context before it.
    """
    total, count = _summed_loss(model, batches, quiet)
    return {"val_loss": total / max(1, count), "val_bits_per_byte": total / math.log(2) / max(1, batches.bytes)}


@torch.no_grad()
def _summed_loss(model: Transformer, batches: Iterable[TokenRows], quiet: bool) -> tuple[float, int]:
    total, count = 0.0, 0
    with evaluating(model), Progress("validating", unit="batches", quiet=quiet) as progress:
        for batch in world().deal(batches):
            summed = next_token_loss(model, batch)
            total, count = total + float(summed.total), count + summed.targets
            progress.advance()
    total, targets = world().sum(total, count)
    return total, int(targets)
