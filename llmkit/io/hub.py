"""Model folders at addresses, read as folders of this machine.

    local_folder("hf://org/model@main")               # configuration and tokenizer, in the hub's own cache
    local_folder("hf://org/model", weights=True)      # the weights, too

A revision is asked for once a process, and all its files are those of one commit. Of a repository only safetensors and
texts are fetched: no pickle, no code. What the cache has is not fetched again, and read where there is no network.
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
TEXTS = ("", ".json", ".jinja", ".model", ".md", ".txt")  # ends of names: configuration, tokenizers, terms of use
TEMPLATES = "additional_chat_templates/"
FULL = (errno.ENOSPC, errno.EDQUOT)
THREADS = 4  # files of a model that come at a time
OTHER_KINDS = ("datasets/", "spaces/", "buckets/")
_ADDRESS = re.compile(r"hf://(?:models/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>.+?))?/?")
_NAME = re.compile(r"(?:hf:/*|(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+(?:@[\w./-]+)?)", re.IGNORECASE)
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


def hub_hint(path: str) -> str:
    """The end of a message on a folder that is not there: the address that was meant, where its form tells."""
    match = _NAME.fullmatch(path)
    return f"; a model of the hub: hf://{match[1]}" if match else ""


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
            from huggingface_hub import HfApi, constants, try_to_load_from_cache

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
            names = ("config.json", "tokenizer.json")
            paths = [try_to_load_from_cache(self.repo, name, revision=revision) for name in names]
            folder = next((Path(path).parent for path in paths if isinstance(path, str)), None)
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

    def weights(self) -> list[str]:
        """The names of the files of weights. Raises UserError where there are none in safetensors."""
        if WEIGHTS in self.sizes:
            return [WEIGHTS]
        if INDEX in self.sizes:
            # whoever loads it says what is wrong
            with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
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
        missing = {name: self.commit for name, path in paths.items() if not isinstance(path, str)}
        for name in paths.keys() - missing.keys():
            self.folder = Path(str(paths[name])).parents[name.count("/")]
        if missing and self.offline:
            raise UserError(f"{self.offline}; the cache lacks {min(missing)}")
        size = sum(self.sizes[name] for name in missing)
        if missing:
            what = f"{counted(len(missing), 'file')}, {quantity(size)}B"
            say(f"{self.address}: fetching {what}, of commit {self.commit[:12]}", settings.quiet)
        if revision and not self.offline:  # the cache notes the commit of a revision that a file was asked by
            missing[names[0]] = revision
        if missing:
            self._download(missing, size)

    def _download(self, revisions: Mapping[str, str], size: int) -> None:
        """Fetch files by name and revision, `size` bytes in all, in threads that an interrupted process leaves behind.

        Those of the hub's snapshot_download would go on to the end of their files.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # each would stay on the screen
        waiting, errors = deque(revisions.items()), list[BaseException]()
        blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model") / "blobs"

        def stored() -> int:
            with suppress(OSError):  # none there yet, or one is renamed
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
        except LocalEntryNotFoundError as error:  # the hub went away
            raise (error.__cause__ or ConnectionError(str(error))) from None
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in FULL):  # no error of this machine
                raise
            reason = f"cannot be written: {str(error.strerror).lower()}; HF_HOME names another place"
            raise UserError(f"{error.filename or constants.HF_HUB_CACHE}: {reason} for the hub's cache") from None
        if self.commit not in path.parts:
            raise ConnectionError(f"{revision} is another commit now")
        return path


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
        self.commit = hashlib.sha256(json.dumps([self.address, *sorted(entries.items())]).encode()).hexdigest()[:12]
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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.startswith("."))[:8]) or "nothing"


def _is_text(name: str) -> bool:
    if "/" in name:
        return name.startswith(TEMPLATES) and name.endswith(".jinja") and name.count("/") == 1
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in TEXTS
