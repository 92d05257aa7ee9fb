"""Rows in which several answers follow one prompt, which is computed once: a mask for torch's attention."""

from functools import cached_property

import torch
from torch import Tensor


class Branching:
    """Which keys a query sees where documents branch: computed once a batch, used by every layer.

    doc_ids (B, T)       equal numbers are one document
    branch_ids (B, T)    0 on what all branches of a document share, 1, 2, ... on each of them
    position_ids (B, T)  of each token in its branch: a branch goes on where the shared part ends

    A query sees the keys of its document that come before it and are shared or of its own branch. A token so sees
    what it would see if its branch stood alone after a copy of the shared part.
    """

    def __init__(self, doc_ids: Tensor, branch_ids: Tensor, position_ids: Tensor) -> None:
        self.doc_ids, self.branch_ids, self.position_ids = doc_ids, branch_ids, position_ids
        self._masks: dict[int | None, Tensor] = {}

    @cached_property
    def _seen(self) -> Tensor:
        place = torch.arange(self.doc_ids.shape[1], device=self.doc_ids.device)
        same = self.doc_ids.unsqueeze(2) == self.doc_ids.unsqueeze(1)
        key_branch = self.branch_ids.unsqueeze(1)
        own = (key_branch == 0) | (key_branch == self.branch_ids.unsqueeze(2))
        return same & own & (place <= place.unsqueeze(1))

    def mask(self, window: int | None = None) -> Tensor:
        """Boolean (B, 1, T, T), true where a key is seen; `window` leaves the last so many positions of a branch."""
        if window not in self._masks:
            seen = self._seen
            if window is not None:
                seen = seen & (self.position_ids.unsqueeze(1) > self.position_ids.unsqueeze(2) - window)
            self._masks[window] = seen.unsqueeze(1)
        return self._masks[window]
