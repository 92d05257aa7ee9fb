"""Model folders at addresses, read as folders of this machine.

    local_folder("hf://org/model@main")               # configuration and tokenizer, in the hub's own cache
    local_folder("hf://org/model", weights=True)      # the weights, too

A revision is asked for once a process, and all its files are those of one commit. Of a repository only safetensors and
texts are fetched: no pickle, no code. What the cache has is not fetched again, and read where there is no network.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmkit.errors import UserError
from llmkit.io.files import file_sha256
from llmkit.io.progress import counted, quantity, say
from llmkit.io.ranks import launch
from llmkit.io.remote import Unreachable, cached_file, is_remote, listing, retried, settings

EXAMPLE = "hf://ORG/MODEL or hf://ORG/MODEL@REVISION, such as hf://Qwen/Qwen3-0.6B"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = ("", ".json", ".jinja", ".model", ".md", ".txt")  # ends of names: configuration, tokenizers, terms of use
TEMPLATES = "additional_chat_templates/"
OTHER_KINDS = ("datasets/", "spaces/", "buckets/")
_ADDRESS = re.compile(r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.+?))?/?")
_models: dict[str, HubModel] = {}
_pinned: dict[str, str] = {}  # the commit of an address


def local_folder(path: str | os.PathLike[str], *, weights: bool = False) -> Path:
    """The folder itself, or one with the files of an address, its weights only where they are asked for.

    Raises UserError where there is no such model, where it has no safetensors, and where it cannot be fetched.
    """
    if not is_remote(os.fspath(path)):
        return Path(path)
    model = _model(os.fspath(path))
    if weights:
        model.fetch(model.weights())
    return model.folder


def is_model(path: str) -> bool:
    """True for a folder, and for an address that is the form of a model's."""
    match = _ADDRESS.fullmatch(path)
    return os.path.isdir(path) if match is None else not match["repo"].startswith(OTHER_KINDS)


def hub_name(path: str) -> str:
    """The name by which other libraries load a model of the hub; the path itself where it is none."""
    match = _ADDRESS.fullmatch(path)
    return path if match is None else match["repo"]


def check_weights(address: str) -> None:
    """Raise UserError where the address of a model has no weights that can be read; they are not fetched."""
    _model(address).weights()


def fetched(address: str) -> dict[str, Any]:
    """The commit of a model at an address, and its files that were read, with size in bytes and SHA-256."""
    model = _model(address)
    files: list[dict[str, Any]] = []
    for name in sorted(model.read):
        path = model.folder / name
        stored = path.resolve().name  # of a large file the SHA-256 in the hub's cache
        digest = stored if re.fullmatch("[0-9a-f]{64}", stored) else file_sha256(path)
        files.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
    return {"revision": model.commit, "files": files} if model.repo else {"files": files}


def commits() -> dict[str, str]:
    """The commit of each model's address that was read so far."""
    return {address: model.commit for address, model in _models.items() if model.repo}


def pin(commits: Mapping[str, str]) -> None:
    """Read these addresses at these commits from now on: a resumed run goes on with the model that it began with."""
    _pinned.update(commits)


def _model(address: str) -> HubModel:
    if address in _models:
        return _models[address]
    if match := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", address):
        raise UserError(f"{address}: expected {EXAMPLE}; write hf://{match[1]}")
    if address.startswith(("http://", "https://")):  # which do not list their files
        raise UserError(f"{address}: expected a model folder of this machine or of a bucket, or {EXAMPLE}")
    _models[address] = HubModel(address) if address.startswith("hf://") else BucketModel(address)
    return _models[address]


class HubModel:
    """A commit of a model's repository: `sizes` of its files, by name, and the `folder` of those that were fetched."""

    def __init__(self, address: str) -> None:
        """Fetch all but the weights. Raises UserError."""
        match = _ADDRESS.fullmatch(address)
        if match is None or match["repo"].startswith(OTHER_KINDS):
            raise UserError(f"{address}: expected the address of a model, {EXAMPLE}")
        try:
            from huggingface_hub import HfApi, constants

            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of each try that fails
        except ImportError:
            raise UserError(f'{address}: needs the package huggingface_hub; pip install "llmkit[remote]"') from None
        self.address, self.repo, revision = address, match["repo"], _pinned.get(address) or match["revision"] or "main"
        self.read: set[str] = set()  # names of the files that were asked for
        self.offline: Unreachable | None = None
        if constants.HF_HUB_OFFLINE:
            self.offline = Unreachable(f"{address}: not in the hub's cache, and HF_HUB_OFFLINE is set")
        try:
            if self.offline:
                raise self.offline
            ask = lambda: HfApi().model_info(self.repo, revision=revision, files_metadata=True)  # noqa: E731
            info: Any = retried(address, ask)
            self.commit, self.sizes = info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}
        except Unreachable as error:
            folder = self._cached_folder(revision)
            if folder is None:
                raise
            if not self.offline:
                say(f"{error}; so it is read from the hub's cache, commit {folder.name}")
            self.commit, self.offline = folder.name, error
            files = [path for path in folder.rglob("*") if path.is_file()]
            self.sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        texts = [name for name in self.sizes if _is_text(name)]
        if not texts:
            raise UserError(f"{address}: expected a model, found {_listed(self.sizes)}")
        self.fetch(texts, revision)

    def _cached_folder(self, revision: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        paths = [
            try_to_load_from_cache(self.repo, name, revision=revision) for name in ("config.json", "tokenizer.json")
        ]
        return next((Path(path).parent for path in paths if isinstance(path, str)), None)

    def weights(self) -> list[str]:
        """The names of the files of weights. Raises UserError where there are none in safetensors."""
        if WEIGHTS in self.sizes:
            return [WEIGHTS]
        if INDEX in self.sizes:
            with suppress(
                OSError, ValueError, AttributeError, TypeError, KeyError
            ):  # whoever loads it says what is wrong
                names = set(json.loads((self.folder / INDEX).read_bytes())["weight_map"].values())
                return sorted(names & self.sizes.keys())
            return []
        if self.offline:
            raise UserError(f"{self.offline}; the cache has its texts alone, without weights")
        if "adapter_config.json" in self.sizes:
            raise UserError(
                f"{self.address}: expected a whole model, found an adapter without its base; merge it into its base by "
                "peft's merge_and_unload and save_pretrained"
            )
        pickles = sorted(name for name in self.sizes if name.endswith((".bin", ".pt", ".pth")) and "/" not in name)
        if pickles:
            raise UserError(
                f"{self.address}: expected {WEIGHTS}, found {pickles[0]}, a pickle, which can run code, so it is not "
                f"read; many a model has a revision with safetensors, such as hf://{self.repo}@refs/pr/1"
            )
        raise UserError(f"{self.address}: expected {WEIGHTS} or {INDEX}, found {_listed(self.sizes)}")

    def fetch(self, names: list[str], revision: str | None = None) -> None:
        """Have these files in `folder`, and with `revision` its commit in the cache. Raises UserError."""
        from huggingface_hub import try_to_load_from_cache

        self.read.update(names)
        paths = {name: try_to_load_from_cache(self.repo, name, revision=self.commit) for name in names}
        for name, path in paths.items():
            if isinstance(path, str):
                self.folder = Path(path).parents[name.count("/")]
        missing = [name for name, path in paths.items() if not isinstance(path, str)]
        if missing:
            if self.offline:
                raise UserError(f"{self.offline}; the cache lacks {missing[0]}")
            size = quantity(sum(self.sizes[name] for name in missing))
            what = f"{counted(len(missing), 'file')}, {size}B"
            say(f"{self.address}: fetching {what}, of commit {self.commit[:12]}", settings.quiet)
        if missing or (revision and not self.offline):
            with _bars_on_terminal():
                self.folder = retried(self.address, lambda: self._download(names, revision or self.commit))

    def _download(self, names: list[str], revision: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self.repo, revision=revision, allow_patterns=[*map(glob.escape, names)]))
        except LocalEntryNotFoundError as error:  # the hub went away
            raise (error.__cause__ or ConnectionError(str(error))) from None
        # it gives back what it has, where the hub goes away; and the revision may be that of another commit now
        if folder.name != self.commit or not all((folder / name).is_file() for name in names):
            raise ConnectionError("not all files came")
        return folder


class BucketModel(HubModel):
    """A model folder of a bucket: its files stand in the cache, links to them in `folder`."""

    def __init__(self, address: str) -> None:
        """Fetch all but the weights. Raises UserError."""
        if settings.cache is None:
            raise UserError(f"{address}: expected --cache DIR beside it, a folder into which the model is fetched")
        entries = listing(address)
        if not entries:
            raise UserError(f"{address}: expected a model folder, found nothing")
        self.address, self.repo, self.offline, self.read = address.rstrip("/"), "", None, set()
        self.sizes = {name: size for name, (size, _) in entries.items()}
        self.commit = hashlib.sha256(json.dumps([address, *sorted(entries.items())]).encode()).hexdigest()[:12]
        self.folder = Path(settings.cache) / f"{self.commit}-{self.address.rpartition('/')[2]}"
        self.fetch([name for name in self.sizes if _is_text(name)])

    def fetch(self, names: list[str], revision: str | None = None) -> None:
        """Have these files in `folder`. Raises UserError."""
        self.read.update(names)
        for name in names:
            file = cached_file(f"{self.address}/{name}")
            self.folder.mkdir(exist_ok=True)
            with suppress(FileExistsError):
                (self.folder / name).symlink_to(Path("..") / file.name)


@contextmanager
def _bars_on_terminal() -> Iterator[None]:
    """Hide the hub's progress bars where none of ours would be shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = sys.stderr is not None and sys.stderr.isatty() and launch().leads and not settings.quiet
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.startswith("."))[:8]) or "nothing"


def _is_text(name: str) -> bool:
    if "/" in name:
        return name.startswith(TEMPLATES) and name.endswith(".jinja")
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in TEXTS
