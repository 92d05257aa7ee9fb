"""Output to URLs: files appear there complete, or stay on disk and are uploaded later."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmkit.config import resolve
from llmkit.errors import GateError, Interrupted, UserError
from llmkit.io.jsonl import input_files, open_output, read_jsonl
from llmkit.io.remote import is_named, upload
from llmkit.stages import crawl_filter, evaluate, train_bpe
from tests.helpers.object_store import ObjectStore, empty_bucket
from tests.helpers.tiny import make_model, save_folder
from tests.helpers.web import Record, html, prose, write_warc

ROWS = [{"text": f"Text {number}, by ann@example.com.", "id": number} for number in range(50)]


@pytest.fixture
def store(bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty bucket, and a current folder with only docs.jsonl."""
    monkeypatch.chdir(tmp_path)
    empty_bucket(bucket.address)
    Path("docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return bucket


def crawl(out: str = "s3://bucket/a/out.jsonl", **options) -> crawl_filter.Summary | None:
    config = {"inputs": ("docs.jsonl",), "only": ("pii", "exact_duplicates"), "workers": 1, "quiet": True, **options}
    return crawl_filter.run(crawl_filter.CrawlFilterConfig(out=out, **config))


def test_records_are_written_to_urls(store: ObjectStore) -> None:
    """The same bytes as a local run, with the manifest next to them and no local files left."""
    Path("twice.jsonl").write_bytes(Path("docs.jsonl").read_bytes() * 2)
    local = {"inputs": ("twice.jsonl",), "rejects": "rejects.jsonl"}
    crawl("local.jsonl.gz", **local)
    summary = crawl("s3://bucket/a/out.jsonl.gz", **{**local, "rejects": "s3://bucket/b/out.jsonl.gz"})
    assert summary is not None and (summary.path, summary.rejects) == (
        "s3://bucket/a/out.jsonl.gz",
        "s3://bucket/b/out.jsonl.gz",
    )
    made = store.objects()
    assert made["a/out.jsonl.gz"] == Path("local.jsonl.gz").read_bytes()
    assert gzip.decompress(made["b/out.jsonl.gz"]) == Path("rejects.jsonl").read_bytes()
    manifest = json.loads(made.pop("a/out.jsonl.gz.manifest.json"))
    assert manifest["options"]["out"] == "s3://bucket/a/out.jsonl.gz"
    assert manifest["output"] == json.loads(Path("local.jsonl.gz.manifest.json").read_bytes())["output"]
    assert sorted(made) == ["a/out.jsonl.gz", "b/out.jsonl.gz"]
    assert not list(Path().glob("*bucket*"))


def test_the_report_is_uploaded_with_the_documents(store: ObjectStore, capsys) -> None:
    Path("items.jsonl").write_text(json.dumps({"question": "Who wrote the text about the sea?"}))
    Path("docs.jsonl").write_text(json.dumps({"text": "Who wrote the text about the sea? Ann did."}) + "\n")
    crawl(only=("contamination",), not_in=("items.jsonl",), quiet=False)
    names = ["a/out.jsonl", "a/out.jsonl.contamination.json", "a/out.jsonl.manifest.json"]
    assert sorted(store.objects()) == names
    assert json.loads(store.objects()[names[1]])["items"][0]["item"] == "items.jsonl:1"
    assert "listed in out.jsonl.contamination.json next to --out" in capsys.readouterr().err


@pytest.mark.parametrize("rejects", ["s3://bucket/a/out.jsonl", "s3a://bucket/a/out.jsonl"])
def test_two_outputs_at_one_url_are_refused(store: ObjectStore, rejects: str) -> None:
    message = r"^--out and --rejects: expected different files, found s3://bucket/a/out\.jsonl twice$"
    with pytest.raises(UserError, match=message):
        crawl(rejects=rejects)
    assert store.objects() == {} and os.listdir() == ["docs.jsonl"]


def test_tables_are_uploaded_and_existing_files_replaced_only_with_force(store: ObjectStore) -> None:
    crawl("s3://bucket/out.parquet")
    assert [row.value["id"] for row in read_jsonl(["s3://bucket/out.parquet"])] == list(range(50))
    with pytest.raises(UserError, match=r"^s3://bucket/out.parquet: already exists; --force replaces it"):
        crawl("s3://bucket/out.parquet")
    crawl("s3://bucket/out.parquet", limit=10, force=True)
    assert len(list(read_jsonl(["s3://bucket/out.parquet"]))) == 10


def test_a_failed_upload_stays_on_disk_until_resume_uploads_it(store: ObjectStore) -> None:
    store.refuse = lambda method, path: 403 if method == "PUT" else None
    advice = r"the output is in bucket-a-out\.jsonl\.upload/; the same command with --resume uploads it$"
    with pytest.raises(UserError, match=rf"^s3://bucket/a/out\.jsonl: not allowed .*check the credentials; {advice}"):
        crawl()
    assert store.objects() == {}
    with pytest.raises(UserError, match="upload: an unfinished run; --resume continues it, --force starts over"):
        crawl()
    store.refuse = lambda method, path: None
    with pytest.raises(UserError, match="another run: --limit was none and is now 5"):
        crawl(resume=True, limit=5)
    os.rename("docs.jsonl", "read.jsonl")  # a finished crawl does not need its input
    summary = crawl(resume=True)
    assert summary is not None and (summary.path, summary.documents) == ("s3://bucket/a/out.jsonl", 50)
    os.rename("read.jsonl", "docs.jsonl")
    crawl("local.jsonl")
    assert store.objects()["a/out.jsonl"] == Path("local.jsonl").read_bytes()
    assert not list(Path().glob("*bucket*"))


def test_a_request_to_a_busy_server_is_retried(store: ObjectStore) -> None:
    refused = []

    def refuse(method: str, path: str) -> int | None:
        if method == "PUT" and len(refused) < 2:
            refused.append(path)
            return 503
        return None

    store.refuse = refuse
    crawl()
    assert len(refused) == 2 and "a/out.jsonl" in store.objects()


def test_an_interrupted_run_resumes(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is next to the pending upload; without a state, nothing is left."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmkit.crawl.output.Collector.add", interrupt)
        with pytest.raises(Interrupted, match=r"--resume continues \(bucket-a-out.jsonl.upload/out/out.jsonl.state\)"):
            crawl()
    assert store.objects() == {}
    crawl(resume=True)
    assert len(store.objects()["a/out.jsonl"].splitlines()) == 50
    with pytest.raises(UserError, match=r"^none\.jsonl: expected a readable file"):
        crawl("s3://bucket/b.jsonl", inputs=("none.jsonl",))
    assert not list(Path().glob("*bucket*"))


def test_scores_are_uploaded_before_a_gate_ends_the_run(store: ObjectStore) -> None:
    save_folder(Path("base"), make_model(context=256))
    Path("things.jsonl").write_text(json.dumps({"query": "The sea is", "choices": ["blue", "red"], "gold": 0}))
    outputs = {"out": "s3://bucket/scores.json", "report": "s3://bucket/items.jsonl"}
    given = {"models": ["base"], "tasks": ["things.jsonl"], "gates": ["things=2"], "quiet": True, **outputs}
    store.refuse = lambda method, path: 403 if method == "PUT" else None
    with pytest.raises(UserError, match="--resume uploads it"):
        evaluate.run(resolve(evaluate.EvaluateConfig, given))
    store.refuse = lambda method, path: None
    with pytest.raises(GateError, match=r"things .* under"):
        evaluate.run(resolve(evaluate.EvaluateConfig, {**given, "resume": True}))
    assert sorted(store.objects()) == ["items.jsonl", "scores.json", "scores.json.manifest.json"]


def test_killed_at_moments_that_the_server_sees_and_resumed_it_leaves_the_same_bytes(store: ObjectStore) -> None:
    """While it reads the second archive, during the upload, and between the documents and their manifest."""
    for number in range(2):
        pages = [
            Record(f"https://a.example/{n}", html(f"Page {n}", prose(n))) for n in range(12 * number, 12 * number + 16)
        ]
        write_warc(Path(f"{number}.warc.gz"), pages)
        store.client().put_object(Bucket="bucket", Key=f"{number}.warc.gz", Body=Path(f"{number}.warc.gz").read_bytes())
    command = [sys.executable, "-m", "llmkit", "crawl-filter", "--workers", "1", "--only", "extract,exact_duplicates"]
    crawl("local.jsonl", inputs=("0.warc.gz", "1.warc.gz"), only=("extract", "exact_duplicates"))
    command += ["s3://bucket/0.warc.gz", "s3://bucket/1.warc.gz", "-o", "s3://bucket/out.jsonl", "--resume"]
    gets = []

    def killed(moment: tuple[str, str]) -> bool:
        """Run the command and kill it when the server gets this request; return True if it was killed."""

        def refuse(method: str, path: str) -> int | None:
            gets.append(path) if method == "GET" else None
            if (method, path) == moment:
                process.kill()
                process.wait()
                return 503
            return None

        store.refuse = refuse
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            errors = process.communicate()[1]
        store.refuse = lambda method, path: None
        assert process.returncode == -signal.SIGKILL or not process.returncode, errors
        return process.returncode < 0

    for path in ("1.warc.gz", "out.jsonl", "out.jsonl.manifest.json"):
        assert killed(("GET" if "warc" in path else "PUT", f"/bucket/{path}"))
        assert ("out.jsonl" in store.objects()) == ("manifest" in path)
    assert not killed(("", ""))
    assert store.objects()["out.jsonl"] == Path("local.jsonl").read_bytes()
    assert gets.count("/bucket/0.warc.gz") == 1 and "out.jsonl.manifest.json" in store.objects()
    assert not list(Path().glob("*bucket*"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://a.example/out.jsonl", "records are written only to s3:// and gs://"),
        ("hf://datasets/org/name/out.jsonl", "records are written only to s3:// and gs://"),
        ("s3://bucket", "expected a file name in a bucket"),
        ("s3://none/out.jsonl", "expected a bucket, found none there"),
        ("s3://bucket/folder", "expected a file, found a folder"),
        ("s3://bucket/docs/", "expected a file name in a bucket"),
        ("s3://bucket/docs/..", "expected a file name in a bucket"),
        ("s3://bucket/docs.csv", r"\.csv is not supported; choose \.jsonl"),
        ("s3://secret/out.jsonl", "not allowed .*check the credentials"),
    ],
)
def test_urls_that_cannot_be_written(store: ObjectStore, address: str, message: str) -> None:
    """The run ends before its work, and nothing is written."""
    store.client().put_object(Bucket="bucket", Key="folder/file", Body=b"")
    store.refuse = lambda method, path: 403 if path.startswith("/secret") else None
    with pytest.raises(UserError, match=rf"^{re.escape(address)}: {message}"):
        crawl(address)
    assert list(store.objects()) == ["folder/file"] and os.listdir() == ["docs.jsonl"]


def test_nothing_is_written_without_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"^s3://bucket/a/out\.jsonl: no credentials for writing"):
        crawl()


def test_evaluation_items_are_read_from_urls(store: ObjectStore) -> None:
    items = json.dumps({"question": "Who wrote the text about the sea?"}).encode()
    store.client().put_object(Bucket="bucket", Key="items.jsonl", Body=items)
    Path("docs.jsonl").write_text(json.dumps({"text": "Who wrote the text about the sea? Ann did."}) + "\n")
    summary = crawl("out.jsonl", only=("contamination",), not_in=("s3://bucket/items.jsonl",))
    assert summary is not None and summary.dropped == {"contamination": 1}


@pytest.mark.parametrize("path", ["a.jsonl", "*.jsonl", "docs/"])
def test_a_missing_bucket_is_distinguished_from_a_missing_file(store: ObjectStore, path: str) -> None:
    with pytest.raises(UserError, match=rf"^s3://none/{re.escape(path)}.*: expected a bucket, found none there$"):
        input_files([f"s3://none/{path}"])


def test_folders_stay_here(store: ObjectStore, llmkit) -> None:
    with pytest.raises(UserError, match=r"^s3://bucket/tok: only records are written to addresses"):
        train_bpe.run(train_bpe.TrainBpeConfig(inputs=("docs.jsonl",), vocab_size=300, out="s3://bucket/tok"))
    for address in ("s3://bucket/out.jsonl", "S3://bucket/out.jsonl", "s3:/bucket/out.jsonl"):
        with pytest.raises(UserError, match=rf"^{address}: only records are written"), open_output(address):
            pass
    done = llmkit("crawl-filter", "s3://bucket/*.jsonl", "-o", "s3://bucket/a.jsonl", "--force")
    assert done.returncode == 2 and "s3://bucket/a.jsonl: is an input and would be lost" in done.stderr
    assert os.listdir() == ["docs.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("s3://bucket/a/b.jsonl", True),
        ("s3://bucket/a/", True),
        ("s3://bucket/**/*.jsonl", True),
        ("s3://bucket/*/b.*", True),
        ("s3://bucket/*.jsonl", False),
        ("s3://bucket/a", False),
        ("bucket/a/b.jsonl", False),
    ],
)
def test_which_inputs_an_output_would_replace(pattern: str, named: bool) -> None:
    assert is_named("s3://bucket/a/b.jsonl", pattern) == named


@pytest.mark.parametrize("status", [None, 403])
def test_a_large_file_appears_when_its_last_part_is_there(store: ObjectStore, status: int | None) -> None:
    """Parts of a failed upload are removed."""
    Path("large").write_bytes(os.urandom(40 << 20))
    visible: list[int] = []

    def refuse(method: str, path: str) -> int | None:
        if "partNumber" in path:
            visible.append(store.client().list_objects_v2(Bucket="bucket")["KeyCount"])
        return status if "partNumber=3" in path else None

    store.refuse = refuse
    if status is None:
        upload("large", "s3://bucket/large", quiet=True)
        assert store.objects() == {"large": Path("large").read_bytes()}
    else:
        with pytest.raises(UserError, match="not allowed"):
            upload("large", "s3://bucket/large", quiet=True)
        assert store.objects() == {} and "Uploads" not in store.client().list_multipart_uploads(Bucket="bucket")
    assert len(visible) == 3 and not any(visible)
