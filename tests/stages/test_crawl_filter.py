"""`llmkit crawl-filter` as a user runs it: output and reasons, kills and resumes, pipes, and bad input."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from pyarrow import parquet
from web import SENTENCES, Record, html, mixed_pages, prose, write_warc

from tests.helpers.jsonl import lines, write

LLMKIT = [sys.executable, "-m", "llmkit", "crawl-filter"]


@pytest.fixture(scope="module")
def crawl(tmp_path_factory) -> Path:
    """A folder with mixed.warc.gz, many.warc.gz (several batches), blocked/domains."""
    folder = tmp_path_factory.mktemp("crawl")
    write_warc(folder / "mixed.warc.gz", mixed_pages())
    (folder / "blocked").mkdir()
    (folder / "blocked" / "domains").write_text("casino.blocked.example\n")
    # incompressible pages make small batches
    pages = [
        Record(f"https://many.example/{n}", html(f"Page {n}", prose(n % 45), f"<!-- {os.urandom(75_000).hex()} -->"))
        for n in range(60)
    ]
    write_warc(folder / "many.warc.gz", pages)
    return folder


@pytest.fixture(scope="module")
def filtered(crawl, llmkit) -> Path:
    """A folder with the output from mixed.warc.gz: docs.jsonl with its manifest, rejects.jsonl."""
    out = crawl / "filtered"
    out.mkdir()
    done = llmkit(
        *("crawl-filter", crawl / "mixed.warc.gz", "--blocklist", crawl / "blocked", "-o", out / "docs.jsonl"),
        *("--rejects", out / "rejects.jsonl"),
    )
    assert done.returncode == 0, done.stderr
    (out / "summary.json").write_text(done.stdout)
    (out / "stderr").write_text(done.stderr)
    return out


def test_each_page_is_kept_or_dropped_by_the_expected_step(filtered):
    """The path of a page's URL names the step that should drop it."""
    documents, rejects = lines(filtered / "docs.jsonl"), lines(filtered / "rejects.jsonl")
    assert [document["url"].split("/")[3] for document in documents] == ["kept"] * 3
    assert len(rejects) == len(mixed_pages()) + 1 - len(documents)  # and the warcinfo
    steps = {reject["url"].split("/")[3]: reject["step"] for reject in rejects if "url" in reject}
    assert steps and all(expected == found for expected, found in steps.items()), steps
    assert {reject["reason"] for reject in rejects if reject["step"] == "language"} == {"other_language"}
    reasons = {(reject["step"], reject["reason"]) for reject in rejects}
    assert {("c4", "lorem_ipsum"), ("c4", "curly_bracket"), ("gopher_quality", "min_words")} <= reasons
    assert ("url", "blocked_domain:blocked") in reasons


def test_a_document_has_what_the_later_stages_read(filtered):
    first, _, third = lines(filtered / "docs.jsonl")
    assert "\n".join(prose(1)[:2]).split("\n")[0] in first["text"] and "Imprint" not in first["text"]
    assert first["id"] == "urn:uuid:mixed-0" and first["source"] == "mixed.warc.gz"
    assert first["url"] == "https://pages.example/kept/1" and first["title"] == "On small things"
    assert first["language"] == "en" and first["language_score"] > 0.65
    assert "jane.roe" not in third["text"]  # personal data


def test_a_duplicate_names_the_document_that_it_repeats(filtered):
    repeats = [reject for reject in lines(filtered / "rejects.jsonl") if "repeats" in reject]
    assert [reject["step"] for reject in repeats] == ["exact_duplicates", "near_duplicates"]
    assert {reject["repeats"] for reject in repeats} == {"urn:uuid:mixed-0"}
    assert repeats[0]["score"] == 1 and 0.8 < repeats[1]["score"] < 1


def test_nothing_is_lost_on_the_way(filtered):
    manifest = json.loads((filtered / "docs.jsonl.manifest.json").read_text())
    summary = json.loads((filtered / "summary.json").read_text())
    funnel = manifest["results"]["funnel"]
    documents, rejects = lines(filtered / "docs.jsonl"), lines(filtered / "rejects.jsonl")
    assert summary["records"] == funnel[0]["in"] == len(mixed_pages()) + 1 == len(documents) + len(rejects)
    assert summary["documents"] == funnel[-1]["kept"] == len(documents)
    for step, following in pairwise(funnel):
        assert step["kept"] == following["in"]
    for step in funnel:
        assert step["in"] == step["kept"] + sum(step["dropped"].values())
        told = [reject["reason"] for reject in rejects if reject["step"] == step["step"]]
        assert step["dropped"] == {reason: told.count(reason) for reason in told}
    assert summary["dropped"] == {step["step"]: sum(step["dropped"].values()) for step in funnel if step["dropped"]}
    assert manifest["stage"] == "crawl-filter" and len(manifest["inputs"][0]["sha256"]) == 64
    assert manifest["options"]["recipe"]["c4"]["min_sentences"] == 5
    shown = (filtered / "stderr").read_text()
    told = [line.split() for line in shown.splitlines()]
    assert shown.startswith("recipe fineweb with changes from flags\nstep ") and "\x1b" not in shown
    assert any(line[:2] == ["read", "15"] for line in told) and ["lorem_ipsum", "1"] in [line[:2] for line in told]
    names = {path.name for path in filtered.iterdir()} - {"summary.json", "stderr"}
    assert names == {"docs.jsonl", "docs.jsonl.manifest.json", "rejects.jsonl"}


# ---- the same bytes


@pytest.fixture(scope="module")
def many(crawl, llmkit) -> Path:
    out = crawl / "many"
    out.mkdir()
    command = ["crawl-filter", crawl / "many.warc.gz", "--workers", "1", "-o", out / "docs.jsonl"]
    done = llmkit(*command, "--rejects", out / "rejects.jsonl", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    return out


def same(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in ("docs.jsonl", "rejects.jsonl"))


def test_the_same_bytes_with_any_number_of_workers(crawl, many, llmkit, tmp_path):
    assert len(lines(many / "docs.jsonl")) == 45
    command = ["crawl-filter", crawl / "many.warc.gz", "--workers", "3", "-o", tmp_path / "docs.jsonl"]
    done = llmkit(*command, "--rejects", tmp_path / "rejects.jsonl")
    assert done.returncode == 0, done.stderr
    assert same(many, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_and_leaves_no_incomplete_output(crawl, many, llmkit, tmp_path, number):
    archive = crawl / "many.warc.gz"
    more = ["-o", tmp_path / "docs.jsonl", "--rejects", tmp_path / "rejects.jsonl"]
    state = tmp_path / "docs.jsonl.state"
    with subprocess.Popen([*LLMKIT, archive, *more, "--workers", "2"], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (state.exists() and state.stat().st_size > 10_000):
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    if number == signal.SIGKILL:
        assert process.returncode == -number and not (tmp_path / "docs.jsonl").exists()
    else:
        assert process.returncode == 130 and "the same command with --resume continues" in said.splitlines()[-1]
        assert "Traceback" not in said and list(tmp_path.iterdir()) == [state]
    for words, message in (
        ([archive], "an unfinished run; --resume continues it"),
        ([archive, "--resume", "--skip", "c4"], "another run: recipe.steps was"),
        ([crawl / "mixed.warc.gz", "--resume"], "not what the unfinished run read"),
    ):
        refused = llmkit("crawl-filter", *words, *more)
        assert refused.returncode == 2 and message in refused.stderr
    done = llmkit("crawl-filter", archive, *more, "--resume", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "already done" in done.stderr and same(many, tmp_path)
    assert not list(tmp_path.glob("*.partial*")) and not state.exists()
    again = llmkit("crawl-filter", archive, *more, "--resume")
    assert again.returncode == 0 and "already finished" in again.stderr and same(many, tmp_path)
    other = llmkit("crawl-filter", crawl / "mixed.warc.gz", *more, "--resume")
    assert other.returncode == 2 and "another run: inputs was" in other.stderr
    assert json.loads(again.stdout)["documents"] == json.loads(done.stdout)["documents"]
    other = llmkit("crawl-filter", archive, *more, "--resume", "--skip", "c4")
    assert other.returncode == 2 and "another run: recipe.steps was" in other.stderr


# ---- pipes


def test_the_reader_of_the_pipe_may_go(crawl):
    command = f"set -o pipefail; {' '.join(LLMKIT)} {crawl}/many.warc.gz --workers 2 --quiet | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 141 and done.stderr == ""
    assert json.loads(done.stdout)["url"] == "https://many.example/0"


def test_stdin_gives_what_the_file_gives(crawl, many):
    with open(crawl / "many.warc.gz", "rb") as handle:
        done = subprocess.run([*LLMKIT, "-", "--workers", "2"], stdin=handle, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    urls = [json.loads(line)["url"] for line in done.stdout.splitlines()]
    assert urls == [document["url"] for document in lines(many / "docs.jsonl")]


@pytest.mark.parametrize("flag", ["-o", "--rejects"])
def test_a_folder_that_is_read_takes_no_output(llmkit, tmp_path, flag):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.html").write_text("<p>one</p>")
    elsewhere = [] if flag == "-o" else ["-o", tmp_path / "out.jsonl"]
    done = llmkit("crawl-filter", tmp_path / "web", flag, tmp_path / "web" / "new.jsonl", *elsewhere)
    assert done.returncode == 2 and "new.jsonl: is inside the input" in done.stderr
    assert [path.name for path in (tmp_path / "web").iterdir()] == ["a.html"]


def test_warc_and_jsonl_together_are_one_input(crawl, filtered, llmkit, tmp_path):
    """Duplicates are found across files; the document of the earlier file is kept."""
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as handle:
        first = lines(filtered / "docs.jsonl")[0]
        handle.write(json.dumps({"text": first["text"], "source": "books"}) + "\n")
        handle.write(json.dumps({"text": "\n".join(prose(50)), "source": "books"}) + "\n")
    arguments = [crawl / "mixed.warc.gz", tmp_path / "more.jsonl.gz", "--blocklist", crawl / "blocked"]
    done = llmkit("crawl-filter", *arguments, "-o", tmp_path / "docs.jsonl", "--rejects", tmp_path / "rejects.jsonl")
    assert done.returncode == 0, done.stderr
    documents, rejects = lines(tmp_path / "docs.jsonl"), lines(tmp_path / "rejects.jsonl")
    assert documents[:-1] == lines(filtered / "docs.jsonl")
    assert documents[-1]["source"] == "books" and documents[-1]["id"] == f"{tmp_path}/more.jsonl.gz:2"
    assert (rejects[-1]["step"], rejects[-1]["repeats"]) == ("exact_duplicates", "urn:uuid:mixed-0")


def test_limit_counts_pages(crawl, many, llmkit):
    for workers in ("1", "2"):
        short = llmkit("crawl-filter", crawl / "many.warc.gz", "--limit", "7", "--workers", workers)
        assert short.stdout.splitlines() == (many / "docs.jsonl").read_text().splitlines()[:7]


# ---- the recipe


def test_a_printed_recipe_is_read_back_and_changes_nothing(crawl, filtered, llmkit, tmp_path):
    printed = llmkit("crawl-filter", "--dry-run", "-o", "docs.jsonl", cwd=tmp_path)
    assert printed.returncode == 0 and "[gopher_repetition]" in printed.stdout
    assert "recipe fineweb\n" in printed.stderr and "near_duplicates" in printed.stderr and not list(tmp_path.iterdir())
    refused = llmkit("crawl-filter", "--dry-run", "-o", filtered / "docs.jsonl")
    assert refused.returncode == 2 and "docs.jsonl: already exists" in refused.stderr
    (tmp_path / "recipe.toml").write_text(printed.stdout)
    again = llmkit("crawl-filter", "--recipe", tmp_path / "recipe.toml", "--dry-run")
    assert again.stdout == printed.stdout
    command = ["crawl-filter", crawl / "mixed.warc.gz", "--blocklist", crawl / "blocked"]
    assert llmkit(*command, "--recipe", tmp_path / "recipe.toml").stdout == (filtered / "docs.jsonl").read_text()


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(llmkit, tmp_path):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (tmp_path / "r.toml").write_text('[language]\nlanguages = ["de", "fr"]\nmin_score = 0.3\n[c4]\nmin_sentences = 2\n')
    arguments = ["--recipe", tmp_path / "r.toml", "--language", "de", "--skip", "url,pii"]
    printed = tomllib.loads(llmkit("crawl-filter", *arguments, "--dry-run").stdout)
    assert printed["language"] == {"languages": ["de"], "min_score": 0.3}
    assert printed["c4"]["min_sentences"] == 2 and printed["c4"]["min_words_per_line"] == 3
    assert "pii" not in printed["steps"] and "url" not in printed["steps"] and "c4" in printed["steps"]


def test_steps_can_be_chosen(crawl, llmkit, tmp_path):
    everything = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--only", "extract")
    documents = [json.loads(line) for line in everything.stdout.splitlines()]
    assert len(documents) == sum(page.url.split("/")[3] != "read" for page in mixed_pages())
    assert "language" not in documents[0] and "jane.roe" in everything.stdout
    german = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--language", "de,fr")
    assert [json.loads(line)["language"] for line in german.stdout.splitlines()] == ["de"]
    no_c4 = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--skip", "c4,pii")
    urls = [json.loads(line)["url"] for line in no_c4.stdout.splitlines()]
    assert "https://pages.example/c4/curly" in urls and "jane.roe" in no_c4.stdout
    (tmp_path / "r.toml").write_text("[pii]\nmode = 'drop'\n")
    dropped = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--recipe", tmp_path / "r.toml")
    assert "kept/3" not in dropped.stdout and "kept/2" in dropped.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[gopher_qualty]\n", "unknown key 'gopher_qualty'; did you mean 'gopher_quality'?"),
        ("[c4]\nmin_sentence = 3\n", "[c4]: unknown key 'min_sentence'; did you mean 'min_sentences'?"),
        ("[c4]\nmin_sentences = 'few'\n", "[c4]: min_sentences: expected a whole number or none, found 'few'"),
        ("[c4]\nremove_citations = 1\n", "expected true or false, found 1"),
        ("[language]\nlanguages = 'en'\n", "expected a list of strings, found 'en'"),
        ("[language]\nmin_score = nan\n", "expected a number or none, found nan"),
        ("[pii]\nmode = 'hide'\n", "expected one of redact, drop, found 'hide'"),
        ("steps = ['url', 'lang']\n", "r.toml: steps: unknown step 'lang'; did you mean 'language'?"),
        ("steps = ['url', 5]\n", "r.toml: steps: expected a string, found ['url', 5]"),
        ("[extract]\nextractor = 5\n", "r.toml: [extract]: extractor: expected a string, found 5"),
        ("[extract]\nthreshold = '0.5'\n", "[extract]: threshold: expected a number or none, found '0.5'"),
        ("[extract]\nthreshold = 7\n", "r.toml: [extract]: threshold: expected at most 1 or none, found 7"),
        ("[language]\nmin_score = 1.5\n", "[language]: min_score: expected at most 1 or none, found 1.5"),
        ("[near_duplicates]\nmin_similarity = 70\n", "[near_duplicates]: min_similarity: expected at most 1, found 70"),
        ("[contamination]\nmin_score = 80\n", "[contamination]: min_score: expected at most 1, found 80"),
        ("[fineweb]\nmax_short_line_fraction = 67\n", "max_short_line_fraction: expected at most 1 or none, found 67"),
        (
            "[language]\nlanguages = ['xx']\n",
            "r.toml: [language]: languages: expected codes such as en or de, found 'xx'",
        ),
        ("[language]\nlanguages = ['en', 'EN']\n", "found 'EN'; did you mean en?"),
        ("[url]\nbanned_words = ['']\n", "r.toml: [url]: banned_words: expected text, found ['']"),
        (
            "[gopher_quality]\nmin_words = 9\nmax_words = 5\n",
            "r.toml: [gopher_quality]: min_words: expected at most max_words, 5, found 9",
        ),
        (
            "[gopher_quality]\nmin_mean_word_length = 11\n",
            "min_mean_word_length: expected at most max_mean_word_length",
        ),
        ("[near_duplicates]\nbands = 0\n", "r.toml: [near_duplicates]: expected 1 to 254 bands of 1 to 64 rows"),
        ("[gopher_quality]\nmin_words = -5\n", "[gopher_quality]: min_words: expected at least 0 or none, found -5"),
        (f"[gopher_quality]\nmin_words = {10**30}\n", "[gopher_quality]: min_words: expected at most 9,223,372,036"),
        ("[own]\nfilters = ['py:nowhere.py:keep']\n", "[own] filters: expected a file nowhere.py"),
        ("[url]\nblocklists = ['nowhere.txt']\n", "nowhere.txt: expected a readable file"),
        ("c4 = 3\n", "c4: expected a table [c4], found a number"),
        ("[c4\n", "not TOML"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(crawl, llmkit, tmp_path, content, message):
    (tmp_path / "r.toml").write_text(content)
    done = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--recipe", tmp_path / "r.toml", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_texts_that_were_extracted_once_are_filtered_as_in_a_full_run(crawl, llmkit, tmp_path):
    loose = ["--recipe", "loose.toml"]
    (tmp_path / "loose.toml").write_text("[gopher_quality]\nmin_words = 5\n[c4]\nmin_sentences = 1\n")
    archive, once = crawl / "mixed.warc.gz", ["--only", "url,extract", "--blocklist", crawl / "blocked"]
    full = llmkit("crawl-filter", archive, "--blocklist", crawl / "blocked", *loose, cwd=tmp_path)
    assert llmkit("crawl-filter", archive, *once, "-o", "texts.jsonl", cwd=tmp_path).returncode == 0
    again = llmkit("crawl-filter", "texts.jsonl", *loose, cwd=tmp_path)
    rows = [[json.loads(line) for line in done.stdout.splitlines()] for done in (full, again)]
    assert rows[0] == rows[1] and len(rows[0]) > 3


# ---- explain


def explained(llmkit, crawl: Path, url: str) -> tuple[dict, str]:
    done = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--blocklist", crawl / "blocked", "--explain", url)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_explain_tells_what_became_of_a_page(crawl, filtered, llmkit):
    told, table = explained(llmkit, crawl, "https://pages.example/kept/1")
    assert told["kept"] and told["steps"][-1] == {"step": "near_duplicates", "verdict": "kept"}
    assert told["text"] == lines(filtered / "docs.jsonl")[0]["text"] and "kept" in table
    told, table = explained(llmkit, crawl, "https://pages.example/c4/lorem")
    assert (told["kept"], told["step"], told["reason"]) == (False, "c4", "lorem_ipsum")
    assert [row["step"] for row in told["steps"]][-2:] == ["gopher_quality", "c4"]
    assert told["steps"][-2]["measures"]["words"] > 50 and "dropped by c4: lorem_ipsum" in table
    told, _ = explained(llmkit, crawl, "https://pages.example/near_duplicates/1")
    assert (told["step"], told["repeats"]) == ("near_duplicates", "urn:uuid:mixed-0")
    told, _ = explained(llmkit, crawl, "https://pages.example/read/pdf")
    assert told["step"] == "read" and told["reason"]


def test_explain_finds_records_that_are_not_pages(llmkit, tmp_path):
    broken = '{"text": "abc"}\n{"broken\n{"id": "bare", "url": "http://n.example/"}\n'
    (tmp_path / "in.jsonl").write_text(broken)
    for wanted, reason in (("in.jsonl:2", "bad_json"), ("bare", "no_text"), ("http://n.example/", "no_text")):
        done = llmkit("crawl-filter", "in.jsonl", "--explain", wanted, "-o", "docs.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["reason"] == reason and f"dropped by read: {reason}" in done.stderr
        assert "--explain: nothing is written to docs.jsonl" in done.stderr and not (tmp_path / "docs.jsonl").exists()


def test_explain_says_when_there_is_no_such_page(crawl, llmkit):
    done = llmkit("crawl-filter", crawl / "mixed.warc.gz", "--explain", "https://nowhere.example/")
    assert done.returncode == 2 and "no page with URL or id" in done.stderr and done.stdout == ""


# ---- bad input


def monsters() -> dict[str, bytes]:
    article = html("Monster", prose(9))
    before, after = article.split("</article>")
    return {
        "one line": html("Line", [" ".join(prose(11))]).replace("\n", "").encode(),
        "deep": (before + "<div>" * 10_000 + "deep" + "</div>" * 10_000 + after).encode(),
        "bytes": bytes(range(256)) * 400,
        "mojibake": html("Straße", ["Die Fähre überquert täglich den Fluß."] * 9).encode().decode("cp1252").encode(),
        "wrong charset": html("Wrong", prose(12)).encode("utf-16"),
        "fifty megabytes": (before + "<p>" + "word " * 10_000_000 + "</p>" + after).encode(),
        "empty": b"",
        "nul": article.replace("ferry", "fer\0ry").encode(),
        "surrogates": (before + "<p>&#xD800;&#xDFFF; half a pair</p>" + after).encode(),
    }


def test_no_page_stops_the_run(llmkit, tmp_path):
    pages = [Record(f"https://monsters.example/{name}".replace(" ", "-"), body) for name, body in monsters().items()]
    write_warc(
        tmp_path / "monsters.warc.gz", [*pages, Record("https://monsters.example/last", html("Last", prose(77)))]
    )
    done = llmkit(
        "crawl-filter", tmp_path / "monsters.warc.gz", "-o", tmp_path / "d.jsonl", "--rejects", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    documents, rejects = lines(tmp_path / "d.jsonl"), lines(tmp_path / "r")
    assert documents[-1]["url"] == "https://monsters.example/last"
    assert len(documents) + len(rejects) == len(pages) + 2
    assert all(reject["reason"] for reject in rejects)
    assert [reject["reason"] for reject in rejects if reject.get("url", "").endswith("/deep")] == ["too_deep"]
    huge = [reject for reject in rejects if reject["reason"] == "too_large"]
    assert [(reject["step"], reject["source"]) for reject in huge] == [("read", "monsters.warc.gz")]
    assert "https://monsters.example/one-line" in [document["url"] for document in documents]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.warc.gz"], "missing.warc.gz"),
        (["missing.warc.gz", "-o", "docs.jsonl"], "expected a readable file: no such file or directory\n"),
        (["in.jsonl", "--only", "extract,c4", "--skip", "c4"], "both name c4"),
        (["in.jsonl", "--only", "extrac"], "--only: unknown step 'extrac'; did you mean 'extract'?"),
        (["in.jsonl", "--precision"], "--precision"),
        (["in.jsonl", "--rejects", "-"], "--rejects: expected a file"),
        (["in.jsonl", "-o", "a", "--rejects", "a"], "expected different files"),
        (["in.jsonl", "-o", "in.jsonl"], "is an input and would be lost"),
        (["in.jsonl", "--resume"], "--resume: needs the --out"),
        (["in.jsonl", "--blocklist", "nowhere"], "nowhere"),
        (["in.jsonl", "--recipe", "nowhere.toml"], "nowhere.toml: cannot read the recipe"),
        (["in.jsonl", "--workers", "0"], "--workers: expected at least 1"),
        *(
            (["in.jsonl", "--only", "pii", flag, value], f"{flag}: needs the step {step}, which is skipped")
            for flag, value, step in (
                ("--not-in", "in.jsonl", "contamination"),
                ("--classifier", "m.bin:good>=0.5", "classifier"),
                ("--blocklist", "in.jsonl", "url"),
                ("--language", "de", "language"),
                ("--extractor", "fast", "extract"),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_user_errors_are_one_line_and_leave_nothing(llmkit, tmp_path, arguments, message):
    write(tmp_path / "in.jsonl", {"text": "\n".join(SENTENCES)})
    done = llmkit("crawl-filter", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("llmkit: error: ") and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


# ---- bad files and records


def test_a_bad_file_at_the_end_does_not_end_the_run(llmkit, tmp_path):
    for name in "abc":
        rows = ({"text": f"{name} {number}"} for number in range(3))
        write(tmp_path / f"{name}.jsonl", *rows, '{"text": null}', '{"x": NaN}')
    (tmp_path / "z.jsonl").write_bytes(b"")
    files = sorted(tmp_path.glob("*.jsonl"))
    done = llmkit("crawl-filter", *files, "-o", tmp_path / "out", "--only", "exact_duplicates")
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "out")) == 9
    assert "bad_file" in done.stderr and "z.jsonl: no JSON lines: the file is empty" in done.stderr
    assert f"skipped: {files[0]}:4: no_text" in done.stderr and f"{files[0]}:5: bad_json" in done.stderr


def test_a_strict_run_ends_at_a_bad_file_and_what_was_done_stays(llmkit, tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", {"text": f"the {name}"})
    (tmp_path / "z.jsonl").write_bytes(b"")
    command = ["-o", tmp_path / "out", "--only", "exact_duplicates", "--workers", "1"]
    ended = llmkit("crawl-filter", *sorted(tmp_path.glob("*.jsonl")), *command, "--strict")
    assert ended.returncode == 2 and "z.jsonl: no JSON lines: the file is empty" in ended.stderr
    assert f"the same command with --resume continues ({tmp_path}/out.state)" in ended.stderr
    (tmp_path / "z.jsonl").write_text('{"text": "the last"}\n')
    done = llmkit("crawl-filter", *sorted(tmp_path.glob("*.jsonl")), *command, "--resume")
    assert done.returncode == 0, done.stderr
    assert "2 parts already done" in done.stderr
    assert len(lines(tmp_path / "out")) == 4


def test_a_finished_run_is_none_of_an_input_that_has_changed(llmkit, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one"}\n')
    command = ("--only", "pii", "-o", tmp_path / "out.jsonl", "--resume")
    assert llmkit("crawl-filter", f"{tmp_path}/in/", *command).returncode == 0
    for folder in (f"{tmp_path}/in/", f"{tmp_path}/in"):
        again = llmkit("crawl-filter", folder, *command)
        assert again.returncode == 0 and "already finished" in again.stderr
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "two"}\n')
    other = llmkit("crawl-filter", f"{tmp_path}/in/", *command)
    assert other.returncode == 2 and "a.jsonl has changed since; start over with --force" in other.stderr
    assert lines(tmp_path / "out.jsonl")[0]["text"] == "one"


def test_an_input_in_which_all_is_bad_is_an_error(llmkit, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n' * 3)
    done = llmkit("crawl-filter", tmp_path / "x.jsonl", "-o", tmp_path / "out")
    assert done.returncode == 2 and "expected records with `html` or `text`, found 3 no_text" in done.stderr
    assert os.listdir(tmp_path) == ["x.jsonl"]  # no state either


def test_a_run_killed_before_its_manifest_is_an_unfinished_one(llmkit, tmp_path, monkeypatch):
    """The output is already in place, but the run counts as unfinished."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "one"}\n')
    command = ("crawl-filter", "a.jsonl", "--only", "pii", "-o", "docs/")
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    start = f"import llmkit.stages.crawl_filter as stage, runpy; stage.write_manifest = lambda *_, **__: exec({kill!r})"
    code = f"{start}; runpy.run_module('llmkit', run_name='__main__')"
    killed = subprocess.run([sys.executable, "-c", code, *command[:]], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and os.path.exists("docs")
    again = llmkit(*command)
    assert again.returncode == 2 and ".state: an unfinished run; --resume continues it" in again.stderr
    assert llmkit(*command, "--resume").returncode == 0
    assert sorted(os.listdir()) == ["a.jsonl", "docs", "docs.manifest.json"]


def test_comments_of_a_list_are_passed_over(llmkit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "one"}\n')
    Path("list").write_text("# what to read\n\na.jsonl\n")
    done = llmkit("crawl-filter", "--list", "list", "--only", "pii", "-o", "out.jsonl")
    assert done.returncode == 0 and json.loads(done.stdout)["records"] == 1
    assert "skipped" not in done.stderr
    inputs = json.loads(Path("out.jsonl.manifest.json").read_text())["inputs"]
    assert [(item["path"], len(item["sha256"])) for item in inputs] == [("list", 64), ("a.jsonl", 64)]


def test_a_folder_that_cannot_be_written_is_named(llmkit):
    done = llmkit("crawl-filter", "-", "--only", "pii", "-o", "/proc/d.jsonl", stdin='{"text": "one"}\n')
    assert done.returncode == 2 and "error: /proc/d.jsonl.state: cannot be written: " in done.stderr


def test_documents_and_rejects_are_packed_by_their_names(llmkit, tmp_path):
    command = ["crawl-filter", "-", "--only", "pii", "--rejects", tmp_path / "r.jsonl.gz"]
    done = llmkit(*command, "-o", tmp_path / "d.jsonl.gz", stdin='{"text": "one"}\n[]\n')
    assert done.returncode == 0, done.stderr
    for name, line in (("d.jsonl.gz", b'"text":"one"'), ("r.jsonl.gz", b'"reason":"bad_json"')):
        assert line in gzip.decompress((tmp_path / name).read_bytes())
    done = llmkit("crawl-filter", "-", "--only", "pii", "-o", tmp_path / "d.parquet", stdin='{"text": "one"}\n')
    assert done.returncode == 0, done.stderr
    assert parquet.read_table(tmp_path / "d.parquet")["text"].to_pylist() == ["one"]
    refused = llmkit("crawl-filter", "-", "-o", tmp_path / "d.arrow", stdin='{"text": "one"}\n')
    assert refused.returncode == 2 and "d.arrow: .arrow is not supported" in refused.stderr


def test_a_trailing_slash_writes_a_folder_of_parquet(llmkit, tmp_path):
    """The next command reads the folder, and its manifest has this one's as an ancestor."""
    write_warc(tmp_path / "a.warc.gz", mixed_pages())
    docs, text = tmp_path / "docs", (tmp_path / "*.warc.gz")
    command = ("crawl-filter", text, "--skip", "gopher_quality,fineweb", "-o", f"{docs}/")
    done = llmkit(*command)
    assert done.returncode == 0, done.stderr
    assert os.listdir(docs) == ["part-00000.parquet"]
    assert sorted(os.listdir(tmp_path)) == ["a.warc.gz", "docs", "docs.manifest.json"]
    rows = parquet.read_table(docs).to_pylist()  # reads all files of a folder as Parquet
    assert len(rows) == json.loads(done.stdout)["documents"] > 0
    manifest = json.loads((tmp_path / "docs.manifest.json").read_bytes())
    assert [entry["path"] for entry in manifest["inputs"]] == [str(tmp_path / "a.warc.gz")]
    assert "already exists" in llmkit(*command).stderr and llmkit(*command, "--force").returncode == 0
    trained = llmkit("train-bpe", docs, "--vocab-size", "320", "-o", tmp_path / "tok")
    assert trained.returncode == 0 and json.loads(trained.stdout)["documents"] == len(rows)
    made = json.loads((tmp_path / "tok" / "manifest.json").read_bytes())
    assert made["ancestors"][made["inputs"][0]["manifest_sha256"]]["stage"] == "crawl-filter"
    shown = json.loads(llmkit("report", docs, "--json").stdout)
    assert shown["runs"][0]["stage"] == "crawl-filter"
    refused = llmkit("crawl-filter", text, "-o", docs, "--force")
    assert refused.returncode == 2 and f"found a folder; for a folder write {docs}/" in refused.stderr


def test_a_file_name_that_is_not_utf8_does_not_end_the_run(llmkit, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / os.fsdecode(b"\xff.jsonl")).write_text('{"text": "one"}\n{"text": 1}\n')
    done = llmkit("crawl-filter", tmp_path / "web", "-o", tmp_path / "out", "--only", "exact_duplicates")
    assert done.returncode == 0, done.stderr
    assert [document["source"] for document in lines(tmp_path / "out")] == ["?.jsonl"]
