"""Which implementation of the kernels runs: one switch, read from `LLMKIT_KERNELS` when it is first needed.

`torch` is eager PyTorch and runs everywhere. `auto` picks the fastest that this machine has, which today is
`torch` as well: there is no other.
"""

import os

from llmkit.errors import UserError

BACKENDS = ("auto", "torch")


def backend() -> str:
    """Name of the implementation in use, for dispatch, `--dry-run` and the manifest."""
    chosen = os.environ.get("LLMKIT_KERNELS", "auto") or "auto"
    if chosen not in BACKENDS:
        raise UserError(f"LLMKIT_KERNELS: expected one of {', '.join(BACKENDS)}, found {chosen!r}")
    return "torch"
