"""Models and data sets of the hub, with a stub of its API."""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmkit.errors import UserError
from llmkit.io import hub, remote
from llmkit.io.hub import commits, local_folder
from llmkit.io.manifest import describe_inputs, write_manifest
from llmkit.io.remote import matching, open_remote
from llmkit.io.run_folder import RunFolder, check_model_folder
from tests.helpers.hub_server import HubServer, Repo, hub_server

constants = pytest.importorskip("huggingface_hub.constants")
TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}", "LICENSE": b"terms", "chat_template.jinja": b"x"}
OTHERS = {
    "model.py": b"import os",
    "additional_chat_templates/../../x.jinja": b"",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"x",
    ".gitattributes": b"x",
}
WEIGHTS = {"model.safetensors": bytes(300_000)}
LINES = b'{"text": "a document"}\n' * 20_000


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A hub with org/model and a data set, and an empty cache."""
    with hub_server() as server:
        server.repos["models/org/model"] = Repo({"main": {**TEXTS, **OTHERS, **WEIGHTS}})
        server.repos["datasets/org/data"] = Repo(
            {
                "main": {"data/a.jsonl": LINES, "data/more/b.jsonl": b"{}\n", "c.jsonl": b"{}\n", "d.jsonl.gz": b"x"},
                "refs/convert/jsonl": {"train/0.jsonl": LINES},
            }
        )
        monkeypatch.setattr(remote, "PAUSE", 0.001)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        use(server.address, monkeypatch)
        yield server


def use(address: str, monkeypatch) -> None:
    """Switch to another hub, as in a new process."""
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "_models", {})
    monkeypatch.setattr(hub, "_pinned", {})
    monkeypatch.setattr(remote, "_commits", {})
    HfFileSystem.clear_instance_cache()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_fetched_without_pickles_and_code_and_weights_only_on_request(server: HubServer) -> None:
    folder = local_folder("hf://org/model")
    assert names(folder) == TEXTS.keys()
    assert local_folder("hf://org/model@main/", weights=True) == folder
    assert names(folder) == TEXTS.keys() | WEIGHTS.keys()
    assert folder.name == server.repos["models/org/model"].commit("main")
    requests = len(server.requests)
    local_folder("hf://org/model", weights=True)
    assert len(server.requests) == requests  # requested once


def test_only_the_weights_files_of_the_index_are_fetched(server: HubServer) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files = {name: b"x" for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors")}
    server.repos["models/org/large"] = Repo({"main": {**TEXTS, hub.INDEX: json.dumps(index).encode(), **files}})
    assert names(local_folder("hf://org/large", weights=True)) - TEXTS.keys() == {
        hub.INDEX,
        "model-1.safetensors",
        "model-2.safetensors",
    }


@pytest.mark.parametrize("ways", ["busy", "cut", "busy cut"])
def test_a_model_is_fetched_completely_from_a_flaky_hub(server: HubServer, ways: str, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its own pauses are seconds
    server.ways = set(ways.split())
    folder = local_folder("hf://org/model", weights=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS["model.safetensors"]


def test_a_fetch_ends_with_an_interrupt(server: HubServer) -> None:
    """It does not wait for the end of the file, which may take minutes."""
    local_folder("hf://org/model")
    server.ways = {"stall"}
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        local_folder("hf://org/model", weights=True)


def test_cached_models_are_read_without_a_network(server: HubServer, monkeypatch, capsys) -> None:
    folder = local_folder("hf://org/model", weights=True)
    server.repos["models/org/other"] = Repo({"main": {**TEXTS, **WEIGHTS}})
    local_folder("hf://org/other")
    capsys.readouterr()
    use("http://127.0.0.1:9", monkeypatch)
    assert local_folder("hf://org/model", weights=True) == folder
    assert re.fullmatch(
        r"llmkit: hf://org/model: cannot be read after 6 attempts .*; using the hub.s cache, .*\n",
        capsys.readouterr().err,
    )
    use("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("hf://org/model", weights=True) == folder
    assert not capsys.readouterr().err
    for address, told in (
        ("hf://org/new", "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("hf://org/model@v2", "not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("hf://org/other", "HF_HUB_OFFLINE is set; the cache has the model's text files, but not its weights"),
    ):
        with pytest.raises(UserError, match=f"^{address}: .*{told}"):
            local_folder(address, weights=True)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://org/none", "no such repository on the hub, or a private one: log in"),
        ("hf://org/private", "no such repository on the hub, or a private one: log in"),
        ("hf://org/model@v2", "no such revision on the hub"),
        ("hf://org/gated", "its terms must be accepted: open its page on the hub, then log in"),
        (
            "hf://org/pickled",
            "expected model.safetensors, found pytorch_model.bin, a pickle, .* hf://org/pickled@refs/pr/1",
        ),
        ("hf://org/gguf", "expected model.safetensors or model.safetensors.index.json, found README.md, a.gguf"),
        ("hf://org/adapter", "expected a complete model, found an adapter without its base"),
        ("hf://org/empty", "expected a model, found nothing"),
        ("hf://org/model/onnx", "expected the address of a model, hf://ORG/MODEL"),
        ("hf://gpt2", "expected the address of a model, hf://ORG/MODEL"),
        ("hf://datasets/org/data", "expected the address of a model, hf://ORG/MODEL"),
        ("https://huggingface.co/org/model/tree/main", "write hf://org/model"),
        ("https://example.org/model/", "expected a model folder, local or in a bucket, or hf://ORG/MODEL"),
        *(
            (path, "expected a model folder, found nothing; for the model on the hub: hf://org/model")
            for path in ("org/model", "hf:org/model", "HF://org/model", "huggingface.co/org/model")
        ),
    ],
)
def test_an_unusable_model_is_an_error_in_one_line(server: HubServer, address: str, told: str) -> None:
    whole = {**TEXTS, **WEIGHTS}
    server.repos |= {
        "models/org/private": Repo({"main": whole}, private=True),
        "models/org/gated": Repo({"main": whole}, terms=True),
        "models/org/pickled": Repo({"main": {**TEXTS, "pytorch_model.bin": b"x"}}),
        "models/org/gguf": Repo({"main": {"a.gguf": b"x", "README.md": b"x"}}),
        "models/org/adapter": Repo({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}}),
        "models/org/empty": Repo({"main": {".gitattributes": b""}}),
    }
    with pytest.raises(UserError, match=f"^{address}: .*{told}") as error:
        check_model_folder(address, "llmkit")
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written_is_named(server: HubServer, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/hub")
    with pytest.raises(UserError, match=r"^/proc/hub.*: cannot be written: .*; set HF_HOME"):
        local_folder("hf://org/model")


def test_a_package_that_is_missing_is_named(server: HubServer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'hf://org/model: needs the .* pip install "llmkit\[remote\]"'):
        local_folder("hf://org/model")


def test_a_manifest_tells_commit_and_hashes_and_a_resumed_run_stays_with_the_commit(
    server: HubServer, monkeypatch, tmp_path
) -> None:
    address, repo = "hf://org/model", server.repos["models/org/model"]
    repo.main["manifest.json"] = json.dumps({"manifest_version": 2, "stage": "sft"}).encode()
    first = local_folder(address, weights=True)
    (tmp_path / "out").mkdir()
    parent = write_manifest(tmp_path / "out", "sft", {}, parents=[address])["parents"][0]
    assert parent["path"] == address and parent["revision"] == repo.commit("main") == commits()[address]
    assert {"path": "config.json", "bytes": 2, "sha256": hub.file_sha256(first / "config.json")} in parent["files"]
    assert parent["files"][-2]["sha256"] == hub.file_sha256(first / "model.safetensors")
    assert parent["manifest_sha256"]

    run = RunFolder(str(tmp_path / "run"), "run/", resume=False, force=False)
    run.begin({})
    repo.revisions = {"main": {**repo.main, "README.md": b"new"}, "old": repo.main}
    use(server.address, monkeypatch)
    assert local_folder(address) != first
    use(server.address, monkeypatch)
    RunFolder(str(tmp_path / "run"), "run/", resume=True, force=False)
    assert local_folder(address) == first


def test_files_of_a_data_set(server: HubServer, monkeypatch) -> None:
    """By a pattern, at a revision with slashes in its name, and from a model repository."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its own pauses are seconds
    assert matching("hf://datasets/org/data/**/*.jsonl") == [
        f"hf://datasets/org/data/{name}" for name in ("c.jsonl", "data/a.jsonl", "data/more/b.jsonl")
    ]
    for server.ways in (set(), {"cut"}):
        for address, data in (
            ("hf://datasets/org/data/data/a.jsonl", LINES),
            ("hf://datasets/org/data@refs/convert/jsonl/train/0.jsonl", LINES),
            ("hf://org/model/LICENSE", b"terms"),
        ):
            with open_remote(address) as file:
                assert file.read() == data
    asked = [request for request in server.requests if "/api/" in request]
    in_manifest = describe_inputs(
        [f"hf://datasets/org/data/{name}" for name in ("data/a.jsonl", "data/more/b.jsonl", "c.jsonl", "d.jsonl.gz")]
    )
    assert in_manifest[-1] == {
        "path": "hf://datasets/org/data/d.jsonl.gz",
        "bytes": 1,
        "version": hashlib.sha256(b"x").hexdigest(),
    }
    read_again = [request for request in server.requests if "/api/" in request][len(asked) :]
    assert len(read_again) <= 3  # listings of folders that were not cached


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://datasets/org/none/a.jsonl", "no such repository on the hub"),
        ("hf://datasets/org/data@v2/a.jsonl", "no such revision on the hub"),
        ("hf://datasets/org/data/none.jsonl", "expected a file, found none there"),
        ("hf://datasets/org/data/data", "expected a file, found a folder"),
        ("hf://datasets/org/data", "expected a file, found a folder"),
        ("hf://datasets/org/gated/a.jsonl", "its terms must be accepted"),
        ("hf://data", "invalid address"),
        ("https://huggingface.co/datasets/org/data/blob/main/a/b.jsonl", "write hf://datasets/org/data@main/a/b.jsonl"),
    ],
)
def test_an_unusable_file_of_a_data_set_is_an_error_in_one_line(server: HubServer, address: str, told: str) -> None:
    server.repos["datasets/org/gated"] = Repo({"main": {"a.jsonl": LINES}}, terms=True)
    with pytest.raises(UserError, match=f"^{address}: .*{told}"), open_remote(address) as file:
        file.read()


def test_commands_take_models_of_the_hub(tmp_path, llmkit) -> None:
    """With HF_ENDPOINT and HF_HOME, as for other programs."""
    from tests.helpers.tiny import save_assistant

    with hub_server() as server:
        server.repos["models/org/chat"] = Repo().add(save_assistant(tmp_path / "chat", "Bob."))
        server.repos["datasets/org/data"] = Repo({"main": {"p/0.jsonl": b'{"question": "Who?"}\n'}})
        hub_of = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.address}
        words = ("sample", "hf://org/chat", "--jsonl", "hf://datasets/org/data/p/0.jsonl")
        done = llmkit(*words, cwd=tmp_path, env={**os.environ, **hub_of})
    assert done.returncode == 0 and json.loads(done.stdout)["completion"] == "Bob.", done.stderr


SUM = {"Body": "Ann has 3 pens.", "Question": "How many are 2 more?", "Answer": "5.0"}
WHY = {"context": "Kim fell.", "question": "Why?", "answerA": "ice", "answerB": "fun", "answerC": "tea", "label": "1"}
MATH = [
    {"problem": f"{n} + 1?", "solution": "\\boxed{2}", "type": kind} for n, kind in ((1, "Algebra"), (2, "Geometry"))
]
RAIN = [{"question": f"what is {word}", "answer": [word]} for word in ("rain", "snow")]


@pytest.mark.parametrize(
    ("task", "repo", "files", "asked"),
    [
        ("svamp", "ChilleD/SVAMP", {"data/test-00000-of-00001-6cf7.parquet": SUM}, ["Question: Ann has 3 pens. How"]),
        ("social_iqa", "lighteval/siqa", {"data/validation-0.parquet": WHY, "data/train-0.parquet": SUM}, ["Q: Kim"]),
        ("social_iqa", "lighteval/siqa", {"validation-0.parquet": WHY}, ["Q: Kim fell"]),
        (
            "minerva_math",
            "EleutherAI/hendrycks_math",
            {f"{row['type']}/test-00000-of-00001.parquet": row for row in MATH},
            ["Problem:\nFind the domain"] * 2,
        ),
        (
            "nq_open",
            "google-research-datasets/nq_open",
            {
                f"nq_open/{split}-00000-of-00001.parquet": row
                for split, row in zip(("validation", "train"), RAIN, strict=True)
            },
            ["Q: what is snow?\nA: snow\nQ: what is rain?\nA:"],
        ),
    ],
)
def test_items_of_shipped_tasks_come_from_their_addresses(server, monkeypatch, task, repo, files, asked):
    from pyarrow import BufferOutputStream, Table
    from pyarrow.parquet import write_table

    from llmkit.evaluation.tasks import load_items, load_tasks

    stored = {}
    for path, row in files.items():
        sink = BufferOutputStream()
        write_table(Table.from_pylist([row]), sink)
        stored[path] = sink.getvalue().to_pybytes()
    server.repos[f"datasets/{repo}"] = Repo({"main": stored})
    (found,) = load_tasks([task])
    items = load_items(found, shots=1 if task == "nq_open" else None).items
    assert [item.contexts[0][: len(start)] for item, start in zip(items, asked, strict=True)] == asked
    server.repos.clear()
    use(server.address, monkeypatch)
    with pytest.raises(UserError, match=rf"; or give --data-dir DIR with {found.file or task}.jsonl"):
        load_items(found)
