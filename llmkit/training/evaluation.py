"""Next-token loss on packed rows, and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmkit.data.batches import IGNORED, EvaluationBatches
from llmkit.io.progress import Progress
from llmkit.model.transformer import Transformer
from llmkit.training.distributed import world


def next_token_loss(model: Any, rows: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Summed cross-entropy in nats (fp32 scalar) of packed rows `(token_ids, targets, doc_ids)`, each numpy [B, T],
    and the number of its targets."""
    token_ids, targets, doc_ids = rows
    device = next(model.parameters()).device
    packed = bool(doc_ids[:, -1].any())  # one document a row needs no mask
    loss = model.loss(
        torch.from_numpy(token_ids).to(device),
        torch.from_numpy(targets).to(device),
        torch.from_numpy(doc_ids).to(device) if packed else None,
        reduction="sum",
    )
    return loss, int((targets != IGNORED).sum())


def masked_loss(model: Transformer, batches: Iterable[tuple[Any, ...]], quiet: bool = False) -> dict[str, float]:
    """`val_loss`, in nats a target, over batches in which only some tokens are targets."""
    total, count = _summed_loss(model, batches, quiet)
    return {"val_loss": total / max(1, count)}


def held_out_loss(model: Transformer, batches: EvaluationBatches, quiet: bool = False) -> dict[str, float]:
    """`val_loss` (nats a token) and `val_bits_per_byte` (of UTF-8 text) over a whole validation set.

    Bits per byte does not depend on the tokenizer: the summed loss in bits over the bytes of the text, where
    each token is predicted once, from its own document and at most the context before it.
    """
    total, count = _summed_loss(model, batches, quiet)
    return {"val_loss": total / max(1, count), "val_bits_per_byte": total / math.log(2) / max(1, batches.bytes)}


@torch.no_grad()
def _summed_loss(model: Transformer, batches: Iterable[tuple[Any, ...]], quiet: bool) -> tuple[float, int]:
    model.eval()
    total, count = 0.0, 0
    with Progress("validating", unit="batches", quiet=quiet) as progress:
        for batch in world().deal(batches):
            loss, targets = next_token_loss(model, batch)
            total, count = total + float(loss), count + targets
            progress.advance()
    model.train()
    total, targets = world().sum(total, count)
    return total, int(targets)
