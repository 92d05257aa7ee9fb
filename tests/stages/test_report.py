"""`llmkit report` as a user runs it: one page with the numbers of the files, and without active content."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest
from made_runs import attempt, judged, make_file_run, make_pipeline, make_run, probed, write_lines
from selectolax.lexbor import LexborHTMLParser

from llmkit.errors import UserError
from llmkit.report.charts import figure_text
from llmkit.stages.report import ReportConfig, run

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> list[Path]:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


def page_of(runs, out: Path, **options) -> LexborHTMLParser:
    given = tuple(str(one) for one in runs)
    run(ReportConfig(runs=given, out=str(out), force=True, quiet=True, **options))
    return LexborHTMLParser(out.read_text())


def figures_of(runs, out: Path, **options) -> dict:
    given = tuple(str(one) for one in runs)
    run(ReportConfig(runs=given, out=str(out), json=True, force=True, quiet=True, **options))
    return json.loads(out.read_text())


def numbers(page: LexborHTMLParser, section: str) -> list[float]:
    """Return the machine-readable numbers of a section, after checking them against the displayed text."""
    found = []
    for node in page.css(f"#{section} data"):
        value = json.loads(node.attributes["value"])
        assert node.text() in {figure_text(value, form) for form in ("", "share", "seconds", "short")}
        found.append(value)
    return found


def text_of(page: LexborHTMLParser, selector: str = "main") -> str:
    return " ".join(node.text() for node in page.css(selector))


# ---- the numbers


def test_the_numbers_of_the_page_are_those_of_the_json_and_of_the_files(pipeline, tmp_path):
    page, figures = page_of(pipeline, tmp_path / "r.html"), figures_of(pipeline, tmp_path / "r.json")
    docs, tok, base, _, before, _, judge, policy = pipeline

    expected = [value for one in figures["runs"] for value in one["key_figures"].values()]
    assert len(expected) > 25 and not set(expected) - set(numbers(page, "pipeline"))
    manifest = json.loads((base / "manifest.json").read_text())
    shown = next(one for one in figures["runs"] if one["path"] == str(base))
    assert manifest["results"] == shown["results"] and shown["key_figures"].items() <= manifest["results"].items()

    steps = json.loads(Path(f"{docs}.manifest.json").read_text())["results"]["funnel"]
    assert figures["funnels"][0]["steps"] == steps
    counts = [count for step in steps for count in (step["kept"], step["seconds"], *step["dropped"].values())]
    assert not set(counts) - set(numbers(page, "funnel"))

    report = json.loads((tok / "report.json").read_text())
    ours, gpt2 = figures["tokenizers"][0]["rows"]
    assert ours["bytes_per_token"] == report["sample"]["bytes_per_token"] and gpt2["vocab_size"] == 50257
    assert {2.1438, 1.9903, 2.323, 2.9, 3.1, 98114, 96, 1, 401} <= set(numbers(page, "tokenizer"))

    evaluation = json.loads((judge / "evaluation.json").read_text())
    assert figures["judges"][0]["rows"][0] == {"of": "held out", **evaluation["overall"]}
    flat = [value for row in figures["judges"][0]["rows"] for name, value in row.items() if isinstance(value, float)]
    assert not set([*flat, *evaluation["overall"]["accuracy_95"], 0.3105, -0.0421]) - set(numbers(page, "judge"))

    first = figures["probes"][0]
    assert (first["path"], first["questions"], first["known"], first["unknown"]) == (str(before), 3, 1, 2)
    assert first["by_kind"]["who"] == {"known": 0, "unknown": 2, "mixed": 0, "evasive": 0}
    assert figures["samples"][0]["path"] == str(policy / "rollouts.jsonl")


def test_the_curves_are_those_of_the_metrics(pipeline, tmp_path):
    page, figures = page_of(pipeline, tmp_path / "r.html"), figures_of(pipeline, tmp_path / "r.json")
    stages = [training["stage"] for training in figures["trainings"]]
    assert stages == ["pretrain", "sft", "train-reward", "rl"]
    for number, training in enumerate(figures["trainings"], 1):
        lines = [line for chart in training["charts"] for line in chart["lines"]]
        assert lines
        for line in lines:
            values = [value for _, value in line["points"]]
            assert (line["first"], line["last"]) == (values[0], values[-1])
            assert (line["lowest"], line["highest"]) == (min(values), max(values))
            assert {line[name] for name in ("first", "last", "lowest", "highest")} <= set(
                numbers(page, f"training-{number}")
            )
    loss = figures["trainings"][0]["charts"][0]["lines"][0]
    rows = [json.loads(line) for line in (pipeline[2] / "metrics.jsonl").read_text().splitlines()]
    assert loss["points"] == [[row["step"], row["loss"]] for row in rows if "loss" in row]
    hints = [node.text() for node in page.css("#training-1 rect.band title")]
    assert "step 1\ntraining 5.9375\nheld out 2.424 at step 60" in hints
    gold = next(chart for chart in figures["trainings"][3]["charts"] if chart["title"] == "Reward")["lines"]
    assert [(line["label"], line["first"], line["last"]) for line in gold][1:] == [
        ("held out", 0.9, 1.5),
        ("gold", 0.6, 0.125),
    ]
    assert "Once upon a time" in text_of(page, "#training-1 .said")


def test_two_reports_tell_what_has_changed(pipeline, tmp_path):
    changed = figures_of(pipeline, tmp_path / "r.json")["probe_changes"]
    assert (Path(changed["before"]).name, Path(changed["after"]).name) == ("before.jsonl", "after.jsonl")
    assert changed["questions"] == 3
    moved = {(old, new): n for old, row in changed["table"].items() for new, n in row.items() if n}
    assert moved == {("unknown", "evasive"): 1, ("unknown", "unknown"): 1, ("known", "known"): 1}
    page = page_of(pipeline, tmp_path / "r.html")
    rows = [[cell.text(strip=True) for cell in row.css("th, td")] for row in page.css("table.moves tbody tr")]
    assert ["unknown", "0", "0", "1", "1"] in rows  # known, mixed, unknown, evasive


def test_several_runs_of_a_stage_share_a_chart(pipeline, tmp_path):
    rows = [{"step": step, "loss": 5.0} for step in (1, 2)]
    other = make_run(tmp_path / "other", "pretrain", results={"loss": 5.0}, rows=rows)
    page = page_of([pipeline[2], other], tmp_path / "r.html")
    assert len(page.css("#training-1 .chart")) == 2  # loss, and bits per byte, which only one run has
    names = [node.text(strip=True) for node in page.css("#training-1 .chart")[0].css("tbody th")]
    # runs of the same second may be in either order
    # the common parent folder is removed from the names
    assert set(names) == {"base, training", "base, held out", f"{other}, training"}
    rows = [{"step": 1, "val_bits_per_byte": 2.0}]
    third = make_run(tmp_path / "third", "pretrain", results={}, rows=rows)
    figures = figures_of([pipeline[2], other, third], tmp_path / "r.json")
    folder = f"{pipeline[2].parent}/"
    numbered = {run["path"].removeprefix(folder): number for number, run in enumerate(figures["trainings"][0]["runs"])}
    page = page_of([pipeline[2], other, third], tmp_path / "r.html")
    for line in page.css("#training-1 .chart tbody tr"):  # a run has one colour in all charts
        path = line.css_first("th").text(strip=True).split(",")[0]
        assert f"s{numbered[path]}" in line.css_first("line").attributes["class"].split()


def test_the_page_opens_with_the_figures_that_matter(pipeline, tmp_path):
    effects = [
        {"stage": "sft", "figure": "says who it is", "value": 0.97, "against": "", "beside": None},
        {"stage": "rl", "figure": "right, digits sorted", "value": 0.9, "against": "before", "beside": 0.2625},
    ]
    scores = tmp_path / "effects.json"
    scores.write_text(json.dumps({"effects": effects}))
    given = [*pipeline, scores]
    page, figures = page_of(given, tmp_path / "r.html"), figures_of(given, tmp_path / "r.json")
    told = {(one["stage"], one["figure"]): one for one in figures["summary"]}
    assert told["crawl-filter", "documents kept"]["value"] == 848
    assert told["train-bpe", "bytes per token, of a sample"]["value"] == 2.1438
    assert told["pretrain", "bits per byte, held out"]["value"] == 1.5026
    assert told["train-reward", "judge's accuracy"]["interval"] == [0.7125, 0.9125]
    right, gold = told["rl", "right answers, held out"], told["rl", "gold reward, held out"]
    assert (right["before"], right["value"], gold["before"], gold["value"]) == (0.3, 0.875, 0.6, 0.125)
    assert told["probe-knowledge", "questions known"]["value"] == pytest.approx(1 / 3)
    assert page.css_first("main > section").attributes["id"] == "summary"
    shown = text_of(page, "#summary")
    assert all(text in shown for text in ("87.5%", "before: 30%", "1.5", "says who it is", "0.97", "before 0.263"))
    assert figures["scores"] == [{"path": str(scores), "effects": effects}]


def test_a_folder_common_to_all_is_named_once(pipeline, tmp_path):
    text = page_of(pipeline, tmp_path / "r.html").html
    assert text.count(str(pipeline[0].parent)) == 1
    assert all(f'<span class="path">{name}</span>' in text for name in ("docs.jsonl", "base", "policy"))
    shown = page_of([pipeline[-1]], tmp_path / "one.html").css_first(".graph").text()
    assert str(pipeline[0].parent) not in shown and "policy" in shown  # its ancestors were in the same folder
    records = [{"prompt": f"What is in {tmp_path}/x?", "completion": "cat a/b", "finish_reason": "stop"}]
    files = [write_lines(tmp_path / name, records) for name in ("one.jsonl", "two.jsonl")]
    assert f"What is in {tmp_path}/x?" in text_of(page_of(files, tmp_path / "r.html"), "#records")


def test_a_noisy_loss_is_smoothed_and_a_single_point_has_no_frame(pipeline, tmp_path):
    page = page_of(pipeline, tmp_path / "r.html")
    chart = page.css_first("#training-1 .chart")
    raw, bold = (node.attributes["d"] for node in chart.css("path.training"))
    assert "raw" in chart.css("path.training")[0].attributes["class"] and raw != bold
    assert raw.count("L") == bold.count("L") == 59
    assert [node.text() for node in chart.css("text.axis")] == ["nats per token", "step"]
    assert "moving average" in text_of(chart, ".small")
    assert page.css("#training-2 .plot") == [] and numbers(page, "training-2")[-4:] == [0.4] * 4
    files = [row.attributes["data-file"] for row in page.css("#records tbody tr")]
    several = len(set(files))  # one record of each file comes first
    assert several > 2 and files[:several] == [str(number + 1) for number in range(several)]


# ---- the graph


def test_metrics_without_a_manifest_are_reported(pipeline, tmp_path):
    for name in ("base", "bare"):
        make_run(tmp_path / name, "pretrain", results={}, rows=[{"step": 1, "loss": 2.0}])
        (tmp_path / name / "manifest.json").unlink()
    (tmp_path / "base" / "config.json").write_text("{}")
    notes = figures_of([pipeline[1], tmp_path], tmp_path.with_suffix(".json"))["notes"]
    assert sorted(note.removeprefix(f"{tmp_path}/") for note in notes) == [
        "bare: expected manifest.json next to metrics.jsonl, found none; give the folder as the run left it",
        "base: metrics.jsonl without manifest.json: the origin of the model is unknown",
    ]
    with pytest.raises(UserError, match=r"bare: expected manifest\.json next to metrics\.jsonl"):
        figures_of([tmp_path / "bare"], tmp_path / "r.json")


def test_the_graph_has_every_ancestor(pipeline, tmp_path):
    chat, policy = pipeline[3], pipeline[-1]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    tuned = make_run(tmp_path / "tuned", "sft", tmp_path / "foreign", tmp_path / "gone", chat, results={})
    figures = figures_of([tuned, policy, tmp_path / "foreign"], tmp_path / "r.json")
    state = {Path(one["path"]).name: one["state"] for one in figures["runs"]}
    assert state == {
        "tok": "told",
        "base": "told",
        "chat": "told",
        "judge": "told",
        "policy": "finished",
        "foreign": "foreign",
        "gone": "foreign",
        "tuned": "finished",
    }
    path = {one["name"]: Path(one["path"]).name for one in figures["runs"]}
    parents = {path[one["name"]]: [path[parent] for parent in one["parents"]] for one in figures["runs"]}
    assert parents["tuned"] == ["foreign", "gone", "chat"] and parents["policy"] == ["chat", "judge"]
    assert parents["judge"] == ["chat"] and parents["base"] == ["tok"] and parents["tok"] == []
    place = {name: number for number, name in enumerate(parents)}
    assert all(place[parent] < place[child] for child in parents for parent in parents[child])
    page = page_of([tuned, policy, tmp_path / "foreign"], tmp_path / "r.html")
    badges = [node.text(strip=True) for node in page.css(".node.foreign .badge")]
    assert badges == ["no manifest: not made by llmkit, or missing"] * 2
    (tok,) = (name for name, place in path.items() if place == "tok")
    assert page.css_first(f"#{tok} .command").text() == "llmkit train-bpe in.jsonl -o tok/"


def test_a_policy_alone_leads_back_to_the_crawl(tmp_path):
    crawl = write_lines(tmp_path / "crawl.warc.gz", ["WARC/1.0"])
    funnel = [{"step": "read", "in": 3, "kept": 2, "dropped": {"warcinfo": 1}, "seconds": 0.5}]
    results = {"documents": 2, "funnel": funnel}
    docs = make_file_run(
        tmp_path / "docs.jsonl", "crawl-filter", [{"text": "A."}], inputs=[str(crawl)], results=results
    )
    inputs = [str(docs)]
    tok = make_run(tmp_path / "tok", "train-bpe", inputs=inputs, results={})
    base = make_run(tmp_path / "base", "pretrain", tok, inputs=inputs, results={})
    chat = make_run(tmp_path / "chat", "sft", base, results={})
    taught = {"inputs": [str(docs)], "parents": [str(chat)], "results": {"questions": 1}}
    refusals = make_file_run(tmp_path / "refusals.jsonl", "probe-knowledge", [{"messages": []}], **taught)
    careful = make_run(tmp_path / "careful", "sft", chat, inputs=[str(refusals)], results={})
    policy = make_run(tmp_path / "policy", "rl", careful, results={})

    figures = figures_of([policy], tmp_path / "r.json")
    runs = {Path(one["path"]).name: one for one in figures["runs"]}
    path = {one["name"]: name for name, one in runs.items()}
    assert {name: [path[parent] for parent in one["parents"]] for name, one in runs.items()} == {
        "docs.jsonl": [],
        "tok": ["docs.jsonl"],
        "base": ["tok", "docs.jsonl"],
        "chat": ["base"],
        "refusals.jsonl": ["chat", "docs.jsonl"],
        "careful": ["chat", "refusals.jsonl"],
        "policy": ["careful"],
    }
    told = runs["docs.jsonl"]
    assert (told["stage"], told["state"], told["inputs"][0]["path"]) == ("crawl-filter", "told", str(crawl))
    assert figures["funnels"][0]["steps"] == funnel
    page = page_of([policy], tmp_path / "r.html")
    assert page.css_first(f"#{told['name']} .stage").text() == "crawl-filter"

    # an input that is also an argument is the same node
    everything = [docs, tok, base, chat, refusals, careful, policy]
    states = [one["state"] for one in figures_of(everything, tmp_path / "r.json")["runs"]]
    assert states == ["finished"] * 7
    # another crawl with the same documents: the existing file
    make_file_run(docs, "crawl-filter", [{"text": "A."}], results={"documents": 1})
    states = [one["state"] for one in figures_of(everything, tmp_path / "r.json")["runs"]]
    assert states == ["finished"] * 7


def test_the_refusals_of_a_probe_are_between_two_assistants(pipeline, tmp_path):
    chat = pipeline[3]
    report = write_lines(tmp_path / "probe.jsonl", [probed("Who?", "no")])
    taught = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I don't know."}]}]
    results = {"questions": 1, "unknown": 1, "refusals": 1}
    details = {"options": {"report": "probe.jsonl"}, "parents": [str(chat)]}
    refusals = make_file_run(tmp_path / "refusals.jsonl", "probe-knowledge", taught, results=results, **details)
    inputs = [{"path": "refusals.jsonl", "bytes": refusals.stat().st_size}]
    careful = make_run(tmp_path / "careful", "sft", chat, inputs=inputs, results={})
    figures = figures_of([chat, careful, report, refusals], tmp_path / "r.json")
    runs = {Path(one["path"]).name: one for one in figures["runs"]}
    assert runs["careful"]["parents"] == [runs["chat"]["name"], runs["refusals.jsonl"]["name"]]
    assert "probe.jsonl" not in runs and figures["probes"][0]["unknown"] == 1


def test_an_unfinished_run_is_shown(pipeline, tmp_path):
    chat = pipeline[3]
    work = tmp_path / "policy.partial"
    (work / "state").mkdir(parents=True)
    identity = {"MODEL": str(chat), "--algo": "grpo", "--group": 8}
    (work / "state" / "run.json").write_text(json.dumps({"identity": identity, "notes": None}))
    (work / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n{"step": 2, "rew')
    figures = figures_of([chat, work], tmp_path / "r.json")
    shown = next(one for one in figures["runs"] if one["state"] == "unfinished")
    assert shown["stage"] == "rl" and shown["parents"] == [
        one["name"] for one in figures["runs"] if one["path"] == str(chat)
    ]
    assert figures["trainings"][-1]["charts"][0]["lines"][0]["points"] == [[1, 0.25]]
    assert figures["notes"] == [f"{work}/metrics.jsonl: left out the last line, which is truncated"]


# ---- untrusted text


def test_nothing_that_was_given_can_act_on_the_page(tmp_path):
    folder = tmp_path / "<script>alert(2)<"
    rows = [{"step": 1, "reward": 1.0, f"reward/{EVIL}": 0.5, "reward/other": 0.5, "loss": 1.0}]
    rows.append({"step": 1, "sample": EVIL})
    make_run(
        folder, "rl", results={"steps": 1, EVIL: 2}, options={"system": EVIL, EVIL: [EVIL]}, rows=rows, command=EVIL
    )
    write_lines(
        folder / "rollouts.jsonl", [{**attempt(1, 0, EVIL, 1.0), "prompt": "</td></table>\x00\u202e", "answer": EVIL}]
    )
    (folder / "evaluation.json").write_text(json.dumps({"overall": judged(), "by_source": {EVIL: judged()}}))
    probe = write_lines(tmp_path / "probe.jsonl", [{**probed(EVIL, "yes", EVIL), "judgements": [EVIL]}])
    sources = {"bytes_per_token": 1.5, "bytes_per_token_by_source": {EVIL: 1.5, "b": 1.0}}
    report = {"bytes_per_token": 1.5, "sample": sources, "longest_tokens": [{"token": EVIL, "count": 1}]}
    (tmp_path / "report.json").write_text(json.dumps({**report, "compared": {EVIL: sources}}))
    page = page_of([folder, probe, tmp_path / "report.json"], tmp_path / "out.html", title=EVIL)

    assert len(page.css("script")) == 1 and "alert" not in page.css_first("script").text()
    assert not page.css("img, iframe, object, embed, link, base, form[action], [src], [style]")
    for node in page.css("*"):
        assert not [name for name in node.attributes if name.startswith("on")], node.html
        assert node.attributes.get("href", "#").startswith("#")
    assert page.css_first("h1").text() == EVIL == page.css_first("title").text()
    for section in ("pipeline", "tokenizer", "training-1", "judge", "probe", "samples"):
        assert EVIL in text_of(page, f"#{section}"), section
    assert "</td></table>\\x00\\u202e" in text_of(page, "#samples .in")


def test_the_page_is_whole_without_a_network_and_may_do_nothing_else(pipeline, tmp_path):
    page = page_of(pipeline, tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 300_000
    policy = page.css_first("meta[http-equiv=Content-Security-Policy]").attributes["content"]
    sources = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.css_first(name).text().encode()).digest()).decode()
        assert sources[f"{name}-src"] == f"'sha256-{digest}'"
    assert sources["default-src"] == sources["base-uri"] == sources["form-action"] == "'none'"
    assert not re.search(r"https?://(?!example\.org/)|url\(|@import", page.html)  # URLs of documents are only text


def test_the_page_can_be_read_by_all(pipeline, tmp_path):
    page = page_of(pipeline, tmp_path / "r.html")
    assert page.css_first("html").attributes["lang"] == "en"
    assert [len(page.css(name)) for name in ("h1", "header", "nav", "main", "footer")] == [1] * 5
    ids = [node.attributes["id"] for node in page.css("[id]")]
    assert len(ids) == len(set(ids))
    targets = {node.attributes["href"][1:] for node in page.css("a[href]")}
    targets |= {node.attributes["aria-labelledby"] for node in page.css("section")}
    assert targets <= set(ids) and len(targets) > 15
    for table in page.css("table"):
        heads = table.css("th")
        assert heads and all(head.attributes.get("scope") in ("row", "col") for head in heads)
    for drawing in page.css("svg"):
        hidden = "true" in (drawing.attributes.get("aria-hidden"), drawing.parent.attributes.get("aria-hidden"))
        assert hidden or "legend" in drawing.parent.parent.attributes["class"] or drawing.attributes["aria-label"]
    for region in page.css("[role=region]"):
        assert region.attributes["aria-label"] and region.attributes["tabindex"] == "0"
    levels = [int(node.tag[1]) for node in page.css("h1, h2, h3, h4")]
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme):
    style = (Path(__file__).parents[2] / "llmkit" / "report" / "templates" / "page.css").read_text()
    part = style.split("@media (prefers-color-scheme: dark)")[scheme == "dark"]
    colour = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part.split("* {")[0]))

    def luminance(value: str) -> float:
        parts = (int(value[place : place + 2], 16) / 255 for place in (1, 3, 5))
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for name, least in {"ink": 7, "soft": 4.5, "accent": 4.5, **{f"c{number}": 3 for number in range(6)}}.items():
        for ground in ("paper", "sheet"):
            light, dark = sorted((luminance(colour[name]), luminance(colour[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (scheme, name, ground)


# ---- large and damaged inputs


def test_long_files_are_sampled_evenly_and_the_page_says_so(tmp_path):
    folder = make_run(tmp_path / "long", "rl", results={"steps": 20_000})
    filler = "x" * 1000
    write_lines(folder / "rollouts.jsonl", [attempt(step, step, f"{step} {filler}", 1.0) for step in range(20_000)])
    page, figures = page_of([folder], tmp_path / "r.html"), figures_of([folder], tmp_path / "r.json")
    shown = figures["samples"][0]
    steps = [row["step"] for row in shown["rows"]]
    gaps = [after - before for before, after in pairwise(steps)]
    assert (shown["records"], shown["shown"], steps[0], steps[-1]) == (20_000, 40, 0, 19_999)
    assert max(gaps) < 2 * min(gaps)
    assert "40 of 20,000 rollouts" in text_of(page, "#samples .inputs")
    folder = make_run(
        tmp_path / "base", "pretrain", results={}, rows=({"step": n, "loss": n % 7} for n in range(30_000))
    )
    page, figures = page_of([folder], tmp_path / "r.html"), figures_of([folder], tmp_path / "r.json")
    line = figures["trainings"][0]["charts"][0]["lines"][0]
    assert (line["values"], line["lowest"], line["highest"]) == (30_000, 0, 6) and len(line["points"]) == 240
    gaps = [after[0] - before[0] for before, after in pairwise(line["points"])]
    assert max(gaps) < 2 * min(gaps)
    assert "240 of 30,000 values are drawn, evenly spaced" in text_of(page, ".chart .small")


def test_a_page_of_large_runs_stays_under_a_megabyte(tmp_path):
    files = []
    for number in range(12):
        said = [{"prompt": "p", "completion": f"{line} " + "<&>" * 400, "finish_reason": "stop"} for line in range(300)]
        files.append(write_lines(tmp_path / f"c{number}.jsonl", said))
    page = page_of(files, tmp_path / "r.html", records=300)
    assert (tmp_path / "r.html").stat().st_size < 1_000_000
    assert "--json has all" in text_of(page, "#notes")
    assert len(figures_of(files, tmp_path / "r.json", records=300)["samples"][0]["rows"]) == 300


def test_damaged_lines_and_values_are_counted(tmp_path):
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        "nonsense",
        "[1]",
        {"loss": 1.0},
        {"step": 3, "loss": 1.5},
    ]
    folder = make_run(tmp_path / "base", "pretrain", results={"loss": None})
    write_lines(folder / "metrics.jsonl", rows)
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "lo')
    (folder / "report.json").write_text("{")
    fine = {"completion": "fine", "finish_reason": "stop"}
    said = write_lines(tmp_path / "said.jsonl", [fine, {"text": "of another kind"}, '{"completion": "cu'])
    page, figures = page_of([folder, said], tmp_path / "r.html"), figures_of([folder, said], tmp_path / "r.json")
    line = figures["trainings"][0]["charts"][0]["lines"][0]
    assert line["points"] == [[1, 2.0], [3, 1.5]] and line["not_finite"] == 1
    assert "1 value was not finite" in text_of(page, ".chart .small")
    notes = "\n".join(figures["notes"])
    assert "metrics.jsonl: left out the last line" in notes and "left out 2 lines, the first" in notes
    assert "left out 1 row without a step" in notes and "report.json:1: expected JSON" in notes
    assert "said.jsonl: 2 of 3 sampled lines left out: not completions" in notes
    assert all(note.replace(f"{tmp_path}/", "") in text_of(page, "#notes") for note in figures["notes"])


@pytest.mark.parametrize(
    ("stage", "file", "place", "value"),
    [
        ("pretrain", "manifest.json", ("inputs", 0, "bytes"), [1]),
        ("pretrain", "manifest.json", ("parents",), {"path": "tok"}),
        ("pretrain", "manifest.json", ("parents", 0, "manifest_sha256"), "gone"),
        ("pretrain", "manifest.json", ("parents", 0, "manifest_sha256"), ["gone"]),
        ("pretrain", "manifest.json", ("ancestors",), ["gone"]),
        ("pretrain", "manifest.json", ("results",), None),
        ("pretrain", "manifest.json", ("created",), 7),
        ("pretrain", "manifest.json", ("options",), ["a"]),
        ("pretrain", "manifest.json", ("results", "funnel"), [{"in": 1, "kept": 1, "dropped": {}, "seconds": 0}]),
        ("train-bpe", "report.json", ("compared", "gpt2"), None),
        ("train-bpe", "report.json", ("longest_tokens", 0), {}),
        ("train-reward", "evaluation.json", ("overall", "accuracy_95"), [0.5]),
        ("train-reward", "evaluation.json", ("overall", "accuracy_95", 0), [0.5]),
        ("train-reward", "evaluation.json", ("by_source",), [1]),
        ("train-reward", "evaluation.json", ("biases", "length"), 0.5),
    ],
)
def test_values_of_unexpected_types_still_make_a_page(tmp_path, stage, file, place, value):
    made = {
        json.loads((run / "manifest.json").read_text())["stage"]: run for run in make_pipeline(tmp_path) if run.is_dir()
    }
    content = json.loads((made[stage] / file).read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (made[stage] / file).write_text(json.dumps(content))
    page = page_of([made[stage]], tmp_path / "r.html")
    assert page.css("#pipeline .node")


def test_a_folder_of_runs_is_replaced_by_its_runs(pipeline, tmp_path):
    runs = figures_of([pipeline[0].parent], tmp_path / "r.json")["runs"]
    names = ["docs.jsonl", "tok", "base", "chat", "judge", "policy", "before.jsonl", "after.jsonl"]
    assert sorted(Path(one["path"]).name for one in runs) == sorted(names)
    stages = [one["stage"] for one in runs if one["state"] == "finished"]
    assert stages == ["crawl-filter", "train-bpe", "pretrain", "sft", "train-reward", "rl"]


def test_broken_links_in_a_folder_of_runs_are_ignored(tmp_path):
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs" / "base", "pretrain", results={"loss": 1.5})
    for name, target in (("gone", "nowhere"), ("loop.jsonl", "loop.jsonl")):
        (tmp_path / "runs" / name).symlink_to(target)
    (found,) = figures_of([tmp_path / "runs"], tmp_path / "r.json")["runs"]
    assert Path(found["path"]).name == "base"


def test_a_folder_that_may_not_be_read_is_noted(tmp_path, monkeypatch):
    (tmp_path / "runs" / "locked").mkdir(parents=True)
    make_run(tmp_path / "runs" / "base", "pretrain", results={"loss": 1.5})
    stat = os.stat

    def refuse(path, **details):  # to root every folder is open
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **details)

    monkeypatch.setattr(os, "stat", refuse)
    figures = figures_of([tmp_path / "runs"], tmp_path / "r.json")
    assert len(figures["runs"]) == 1 and "locked" in figures["notes"][0] and "permission denied" in figures["notes"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "found nothing"),
        ("empty", {}, "expected a run folder"),
        ("tool", {"manifest.json": '{"name": "app", "icons": []}'}, "expected a manifest of llmkit"),
        ("torn", {"manifest.json": '{"stage": "rl"'}, "expected JSON"),
        ("list", {"manifest.json": "[]"}, "expected a JSON object, found a list"),
        ("notes.txt", "hello", "expected a file written by a stage, found no JSON object per line"),
        ("data.jsonl", '{"a": 1}\n', "expected a file written by a stage, found a record with ['a']"),
        ("some.json", '{"a": 1}', "expected a manifest, evaluation.json, report.json or effects.json"),
    ],
)
def test_an_input_that_is_not_a_run_is_an_error_in_one_line(pipeline, tmp_path, name, content, message):
    place = tmp_path / name
    if isinstance(content, dict):
        place.mkdir()
        for inner, text in content.items():
            (place / inner).write_text(text)
    elif content is not None:
        place.write_text(content)
    with pytest.raises(UserError) as told:
        page_of([place], tmp_path / "r.html")
    assert message in str(told.value) and str(place) in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "r.html").exists()
    if content is not None:  # with a run it is a note
        notes = figures_of([pipeline[1], place], tmp_path / "r.json")["notes"]
        assert len(notes) == 1 and message in notes[0]


def test_the_command_line(pipeline, tmp_path, llmkit, capsys):
    tok, out = pipeline[1], tmp_path / "r.html"
    done = llmkit("report", tok, "-o", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"path": str(out), "bytes": out.stat().st_size, "runs": 1, "notes": []}
    with pytest.raises(UserError, match="already exists"):
        run(ReportConfig(runs=(str(tok),), out=str(out)))
    given = (str(pipeline[3]), str(pipeline[-1]))  # only their ancestors are shown
    summary = run(ReportConfig(runs=given, out=str(tmp_path / "two.html"), quiet=True))
    page = LexborHTMLParser((tmp_path / "two.html").read_text())
    assert summary is not None and summary.runs == 2 and text_of(page, ".lead").split()[:2] == ["2", "runs,"]
    run(ReportConfig(runs=(str(tok),), json=True))
    assert json.loads(capsys.readouterr().out) == figures_of([tok], tmp_path / "f.json")
    assert run(ReportConfig(runs=(str(tok),), out=str(tmp_path / "n.html"), dry_run=True)) is None
    assert "1 run and 0 files" in capsys.readouterr().err and not (tmp_path / "n.html").exists()
    (tmp_path / "n.html").write_text("")
    run(ReportConfig(runs=(str(tok),), out="-", quiet=True))
    assert capsys.readouterr().out.startswith("<!doctype html>")
    for options, message in (
        ({"runs": ()}, "RUN is missing"),
        ({}, "--out is required"),
        ({"out": str(tmp_path), "force": True}, "choose another place"),
        ({"out": str(tmp_path / "n.html"), "dry_run": True}, "already exists"),
        ({"out": str(tmp_path / "n.parquet")}, "expected a new file for the page, such as report.html"),
        ({"runs": (str(tmp_path / "f.json"),), "out": str(tmp_path / "f.json"), "force": True}, "expected a new file"),
        ({"json": True, "title": "Mine"}, "--title: has no effect with --json"),
    ):
        with pytest.raises(UserError, match=message):
            run(ReportConfig(**{"runs": (str(tok),), **options}))
