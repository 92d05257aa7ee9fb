"""Model folders at addresses, fetched into a local cache.

    local_folder("hf://org/model@main")               # configuration and tokenizer, in the hub's own cache
    local_folder("hf://org/model", weights=True)      # also the weights

A revision is resolved once per process, so that all files are of one commit. Only safetensors and text files are
fetched: no pickles, no code. Cached files are not fetched again and are also read without a network.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from llmkit.errors import UserError
from llmkit.io.files import file_sha256
from llmkit.io.progress import Progress, counted, quantity, say
from llmkit.io.remote import Unreachable, cached_file, is_remote, listing, retried, settings

EXAMPLE = "hf://ORG/MODEL or hf://ORG/MODEL@REVISION, such as hf://Qwen/Qwen3-0.6B"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = ("", ".json", ".jinja", ".model", ".md", ".txt")  # extensions of configurations, tokenizers and licenses
TEMPLATES = "additional_chat_templates/"
FULL = (errno.ENOSPC, errno.EDQUOT)
THREADS = 4  # files fetched at a time
OTHER_KINDS = ("datasets/", "spaces/", "buckets/")
_ADDRESS = re.compile(r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.+?))?/?")
_NAME = re.compile(r"(?:hf:/*|(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+(?:@[\w./-]+)?)", re.IGNORECASE)
_models: dict[str, HubModel] = {}
_pinned: dict[str, str] = {}  # address to commit


def local_folder(path: str | os.PathLike[str], *, weights: bool = False) -> Path:
    """Return the folder of a model: a local one unchanged, or the files fetched from an address, weights if wanted.

    Raise UserError if there is no such model, if it has no safetensors, or if it cannot be fetched.
    """
    if not is_remote(os.fspath(path)):
        return Path(path)
    model = _model(os.fspath(path))
    if weights:
        model.fetch(model.weights())
    return model.folder


def is_model(path: str) -> bool:
    """Return True for a folder, and for an address that has the form of a model's."""
    match = _ADDRESS.fullmatch(path)
    return os.path.isdir(path) if match is None else not match["repo"].startswith(OTHER_KINDS)


def hub_hint(path: str) -> str:
    """Return the end of a message about a missing folder: the hub address that a name like ORG/MODEL suggests."""
    match = _NAME.fullmatch(path)
    return f"; for the model on the hub: hf://{match[1]}" if match else ""


def hub_name(path: str) -> str:
    """Return the name under which other libraries load a hub model; other paths unchanged."""
    match = _ADDRESS.fullmatch(path)
    return path if match is None else match["repo"]


def check_weights(address: str) -> None:
    """Raise UserError if a model's address has no readable weights, without fetching them."""
    _model(address).weights()


def fetched(address: str) -> dict[str, Any]:
    """Return the commit of a model at an address and its fetched files, with size in bytes and SHA-256."""
    model = _model(address)
    files: list[dict[str, Any]] = []
    for name in sorted(model.read):
        path = model.folder / name
        stored = path.resolve().name  # the hub's cache names large files by their SHA-256
        digest = stored if re.fullmatch("[0-9a-f]{64}", stored) else file_sha256(path)
        files.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
    return {"revision": model.commit, "files": files} if model.repo else {"files": files}


def commits() -> dict[str, str]:
    """Return the commit of each model address read so far."""
    return {address: model.commit for address, model in _models.items() if model.repo}


def pin(commits: Mapping[str, str]) -> None:
    """Read these addresses at these commits from now on, so that a resumed run uses the model it started with."""
    _pinned.update(commits)


def _model(address: str) -> HubModel:
    if address in _models:
        return _models[address]
    if match := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", address):
        raise UserError(f"{address}: expected {EXAMPLE}; write hf://{match[1]}")
    if address.startswith(("http://", "https://")):  # web servers do not list their files
        raise UserError(f"{address}: expected a model folder, local or in a bucket, or {EXAMPLE}")
    _models[address] = HubModel(address) if address.startswith("hf://") else BucketModel(address)
    return _models[address]


class HubModel:
    """A commit of a model repository: the `sizes` of its files by name, and the `folder` of those fetched."""

    def __init__(self, address: str) -> None:
        """Fetch everything except the weights. Raise UserError."""
        match = _ADDRESS.fullmatch(address)
        if match is None or match["repo"].startswith(OTHER_KINDS):
            raise UserError(f"{address}: expected the address of a model, {EXAMPLE}")
        try:
            from huggingface_hub import HfApi, constants, try_to_load_from_cache

            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it logs every failed attempt
        except ImportError:
            raise UserError(f'{address}: needs the package huggingface_hub; pip install "llmkit[remote]"') from None
        self.address, self.repo, revision = address, match["repo"], _pinned.get(address) or match["revision"] or "main"
        self.read: set[str] = set()  # names of the files requested so far
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
            names = ("config.json", "tokenizer.json")
            paths = [try_to_load_from_cache(self.repo, name, revision=revision) for name in names]
            folder = next((Path(path).parent for path in paths if isinstance(path, str)), None)
            if folder is None:
                raise
            if not self.offline:
                say(f"{error}; using the hub's cache, commit {folder.name}")
            self.commit, self.offline = folder.name, error
            files = [path for path in folder.rglob("*") if path.is_file()]
            self.sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        texts = [name for name in self.sizes if _is_text(name)]
        if not texts:
            raise UserError(f"{address}: expected a model, found {_listed(self.sizes)}")
        self.fetch(texts, revision)

    def weights(self) -> list[str]:
        """Return the names of the weight files. Raise UserError if there are none in safetensors."""
        if WEIGHTS in self.sizes:
            return [WEIGHTS]
        if INDEX in self.sizes:
            # a damaged index is reported when the model is loaded
            with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
                names = set(json.loads((self.folder / INDEX).read_bytes())["weight_map"].values())
                return sorted(names & self.sizes.keys())
            return []
        if self.offline:
            raise UserError(f"{self.offline}; the cache has the model's text files, but not its weights")
        if "adapter_config.json" in self.sizes:
            raise UserError(
                f"{self.address}: expected a complete model, found an adapter without its base; merge it into its base "
                "with peft's merge_and_unload and save_pretrained"
            )
        pickles = sorted(name for name in self.sizes if name.endswith((".bin", ".pt", ".pth")) and "/" not in name)
        if pickles:
            raise UserError(
                f"{self.address}: expected {WEIGHTS}, found {pickles[0]}, a pickle, which is not read because it can "
                f"run code; many models have a revision with safetensors, such as hf://{self.repo}@refs/pr/1"
            )
        raise UserError(f"{self.address}: expected {WEIGHTS} or {INDEX}, found {_listed(self.sizes)}")

    def fetch(self, names: list[str], revision: str | None = None) -> None:
        """Fetch the missing files into `folder`; `revision` is noted in the cache. Raise UserError."""
        from huggingface_hub import try_to_load_from_cache

        self.read.update(names)
        paths = {name: try_to_load_from_cache(self.repo, name, revision=self.commit) for name in names}
        missing = {name: self.commit for name, path in paths.items() if not isinstance(path, str)}
        for name in paths.keys() - missing.keys():
            self.folder = Path(str(paths[name])).parents[name.count("/")]
        if missing and self.offline:
            raise UserError(f"{self.offline}; the cache lacks {min(missing)}")
        size = sum(self.sizes[name] for name in missing)
        if missing:
            what = f"{counted(len(missing), 'file')}, {quantity(size)}B"
            say(f"{self.address}: fetching {what}, commit {self.commit[:12]}", settings.quiet)
        if revision and not self.offline:  # the cache notes the commit of a revision when a file is requested by it
            missing[names[0]] = revision
        if missing:
            self._download(missing, size)

    def _download(self, revisions: Mapping[str, str], size: int) -> None:
        """Fetch files, name to revision, `size` bytes in total, in daemon threads that end with the process.

        The threads of the hub's snapshot_download keep an interrupted process alive until their files are complete.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # each file's bar would stay on the screen
        waiting, errors = deque(revisions.items()), list[BaseException]()
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model") / "blobs"

        def stored() -> int:
            with suppress(OSError):  # no such folder yet, or a file was just renamed
                return sum(entry.stat().st_size for entry in os.scandir(blobs))
            return 0

        def work() -> None:
            with suppress(IndexError):
                while not errors:
                    name, revision = waiting.popleft()
                    try:
                        path = retried(self.address, partial(self._file, name, revision))
                        self.folder = path.parents[name.count("/")]
                    except BaseException as error:
                        errors.append(error)

        threads = [Thread(target=work, daemon=True) for _ in range(min(THREADS, len(waiting)))]
        before = stored()
        with Progress(f"fetch {self.repo}", total=size, unit="B", quiet=settings.quiet) as progress:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.1)
                threads = [thread for thread in threads if thread.is_alive()] or threads
                progress.advance(max(0, stored() - before - progress.done))
        if errors:
            raise errors[0]

    def _file(self, name: str, revision: str) -> Path:
        """Fetch a file into the hub's cache."""
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(self.repo, name, revision=revision))
        except LocalEntryNotFoundError as error:  # the hub became unreachable
            raise (error.__cause__ or ConnectionError(str(error))) from None
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in FULL):  # not a local error
                raise
            reason = f"cannot be written: {str(error.strerror).lower()}; set HF_HOME to move the hub's cache"
            raise UserError(f"{error.filename or constants.HF_HUB_CACHE}: {reason}") from None
        if self.commit not in path.parts:
            raise ConnectionError(f"{revision} is now another commit")
        return path


class BucketModel(HubModel):
    """A model folder in a bucket: its files are fetched into `--cache` and linked in `folder`."""

    def __init__(self, address: str) -> None:
        """Fetch everything except the weights. Raise UserError."""
        if settings.cache is None:
            raise UserError(f"{address}: expected --cache DIR, a folder to fetch the model into")
        entries = listing(address)
        if not entries:
            raise UserError(f"{address}: expected a model folder, found nothing")
        self.address, self.repo, self.offline, self.read = address.rstrip("/"), "", None, set()
        self.sizes = {name: size for name, (size, _) in entries.items()}
        self.commit = hashlib.sha256(json.dumps([self.address, *sorted(entries.items())]).encode()).hexdigest()[:12]
        self.folder = Path(settings.cache) / f"{self.commit}-{self.address.rpartition('/')[2]}"
        self.fetch([name for name in self.sizes if _is_text(name)])

    def fetch(self, names: list[str], revision: str | None = None) -> None:
        """Fetch the missing files and link them in `folder`. Raise UserError."""
        self.read.update(names)
        for name in names:
            file = cached_file(f"{self.address}/{name}")
            self.folder.mkdir(exist_ok=True)
            with suppress(FileExistsError):
                (self.folder / name).symlink_to(Path("..") / file.name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.startswith("."))[:8]) or "nothing"


def _is_text(name: str) -> bool:
    if "/" in name:
        return name.startswith(TEMPLATES) and name.endswith(".jinja") and name.count("/") == 1
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in TEXTS
