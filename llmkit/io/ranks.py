"""Rank and world size of this process, as torchrun sets them; without torchrun, 0 and 1.

Source: the variables of https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from llmkit.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process of a job.

    rank, size  rank and world size; `local_rank` is the rank on this machine
    restarts    how often torchrun has restarted the job after a failure
    job         identifies the job, the same in all processes and after a restart; None without torchrun
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    job: str | None = None

    @property
    def leads(self) -> bool:
        """True on rank 0, the only process that prints and writes."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read torchrun's variables; ignore them unless all are set. Raise UserError if a value is not a number."""
    if any(name not in environment for name in NEEDED):
        return Launch()
    names = {"LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0", **environment}
    try:
        rank, size, local_rank, restarts = (
            int(names[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        )
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK: expected the numbers that torchrun sets: {error}") from None
    if not 0 <= rank < size:
        raise UserError(f"RANK {rank}, WORLD_SIZE {size}: expected a rank below the number of processes; use torchrun")
    address = f"{names['MASTER_ADDR']}:{names['MASTER_PORT']}"
    return Launch(rank, size, local_rank, restarts, f"{names.get('TORCHELASTIC_RUN_ID', 'none')}@{address}")


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def launch() -> Launch:
    """Return the launch of this process."""
    return read_launch(os.environ)
