"""Training state on disk: everything that a resumed run needs to go on bit for bit, and no pickle.

`state/step-00000120/` holds `tensors.safetensors` (masters, moments) and `state.json` (step, tokens, loss, seconds).
A checkpoint is written beside its place and renamed; the former one goes when the new one stands, so that a kill
at any moment leaves a whole one. Writing happens in a thread, on a copy.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkit.errors import UserError
from llmkit.files import PARTIAL, atomic_folder, read_json, write_json

TENSORS, STATE = "tensors.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one run, newest last; `keep` of them stay."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps at which whole checkpoints stand, ascending."""
        if not self.folder.is_dir():
            return []
        names = [p.name for p in self.folder.glob("step-*") if not p.name.endswith(PARTIAL)]
        return sorted(int(name.removeprefix("step-")) for name in names)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], wait: bool = False) -> None:
        """Copy the tensors and write them in the background; `wait` returns when they are on disk.

        Raises what the former background write raised, such as an OSError for a full disk.
        """
        self.wait()
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(state)), daemon=False)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no write is under way; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_folder(self.folder / f"step-{step:08d}", force=True) as partial:
                save_file(tensors, partial / TENSORS)
                write_json(partial / STATE, {**state, "step": step})
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        except BaseException as error:
            self._error = error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint's tensors and state, or None where there is none.

        Raises UserError for a checkpoint that is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.steps():
            return None
        place = self.folder / f"step-{self.steps()[-1]:08d}"
        try:
            return load_file(place / TENSORS), read_json(place / STATE)
        except (SafetensorError, OSError, ValueError) as error:
            other = "remove it and resume from an older one" if len(self.steps()) > 1 else "start again with --force"
            raise UserError(f"{place}: damaged checkpoint ({error}); {other}") from error
