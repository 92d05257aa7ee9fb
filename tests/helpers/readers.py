"""Every function of the package that parses text from models, servers or the web, by name, as a function of that text.

Readers of bounded texts (a URL, an expression, a query) get the full text, so that the bound is tested, too. EXEMPT
lists the modules that apply regular expressions only to text of the user or of llmkit.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError

Reader = Callable[[str], Any]
EXEMPT = {
    "llmkit.config",  # options
    "llmkit.crawl.filters.classifier",  # an option
    "llmkit.crawl.recipe",
    "llmkit.data.identity",  # an option
    "llmkit.data.overlap",  # words one by one
    "llmkit.generation.chat",  # typed input
    "llmkit.generation.terminal",  # the same
    "llmkit.text.answer_spans",  # tested through matching
    "llmkit.training.trainer",  # file names
    "llmkit.evaluation.evaluator",  # runs of white space
    "llmkit.evaluation.tasks",  # an option
    "llmkit.export.gguf_file",  # a name
    "llmkit.io.files",  # the user's URLs
    "llmkit.io.hub",  # the same
    "llmkit.io.remote",  # the same
    "llmkit.io.run_folder",  # steps of checkpoints
    "llmkit.model.folder",  # two words of a model's config.json
    "llmkit.serving.app",  # the port in a Host header
    "llmkit.stages.serve",  # an option
    "llmkit.tools.user_code",  # the user's docstrings
}


def octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def crawl_readers() -> dict[str, Reader]:
    from selectolax.lexbor import LexborHTMLParser

    from llmkit.crawl.dedup import duplicates
    from llmkit.crawl.extract import features, markup
    from llmkit.crawl.extract.main_text import Extractor
    from llmkit.crawl.filters import personal_data, quality, urls
    from llmkit.crawl.page import Frame
    from llmkit.crawl.read import frames as framing
    from llmkit.crawl.read import pages
    from llmkit.text import language, words

    by_model, fast, blocklist = cache(Extractor), cache(lambda: Extractor("fast")), cache(urls.UrlFilter)

    def frames(kind: str) -> Reader:
        def read(text: str) -> None:
            head = {"warc.gz": b"\x1f\x8b\x08\x00", "arc": b""}.get(kind, b"")
            for _, data in framing.Records(framing.Window(io.BytesIO(head + text.encode("latin-1", "replace"))), kind):
                if isinstance(data, bytes) and kind == "warc":
                    pages.page_of(Frame("a.warc", "warc", 0, data))

        return read

    def record(text: str) -> None:
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + octets(text)
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {len(http)}\r\nContent-Type: application/http\r\n\r\n"
        )
        pages.page_of(Frame("a.warc", "warc", 0, head.encode() + http))

    def formulas(text: str) -> None:
        html = (
            b'<math alttext=""></math><script type="math/tex">'
            + octets(text[:1000])
            + b"</script><math>"
            + octets(text)
        )
        with suppress(markup.PageLimitError):
            markup.check_size(html)
            markup.inline_formulas(LexborHTMLParser(html), html)

    def extracted(extractor: Callable[[], Extractor]) -> Reader:
        def read(text: str) -> None:
            with suppress(markup.PageLimitError):
                extractor().extract(b"<html><body><p>" + octets(text))

        return read

    return {
        "limits.check_size": lambda text: suppressed(lambda: markup.check_size(octets(text)), markup.PageLimitError),
        "features.name_words": features.name_words,
        "c4": lambda text: quality.c4(words.Split(text), quality.C4()),
        "charset.utf8_html of a header": lambda text: markup.utf8_html(b"a", text),
        "charset.utf8_html": lambda text: markup.utf8_html(octets(text)),
        "charset.utf8_html of utf-16": lambda text: markup.utf8_html(text.encode("utf-16-le", "surrogatepass")),
        "extract by the model": extracted(by_model),
        "extract fast": extracted(fast),
        "fineweb": lambda text: quality.fineweb_quality(words.Split(text), quality.FineWebQuality()),
        "framing of warc": frames("warc"),
        "framing of warc.gz": frames("warc.gz"),
        "framing of warc with a long head": lambda text: frames("warc")(
            f"WARC/1.0\r\nWARC-Type: response\r\nA: {text}\r\nContent-Length: 0\r\n\r\n"
        ),
        "framing of arc": frames("arc"),
        "gopher.gopher_quality": lambda text: quality.gopher_quality(words.Split(text), quality.GopherQuality()),
        "gopher.gopher_repetition": lambda text: quality.gopher_repetition(
            words.Split(text), quality.GopherRepetition()
        ),
        "language.identify": language.identify,
        "markup.article_body": lambda text: markup.article_body(
            b'<script type="application/ld+json">' + octets(json.dumps({"articleBody": text})) + b"</script>"
        ),
        "markup.article_body of JSON": lambda text: markup.article_body(
            b'articleBody<script type="application/ld+json">' + octets(text)
        ),
        "markup.inline_formulas": formulas,
        "markup.inline_formulas of a script": lambda text: markup.inline_formulas(
            LexborHTMLParser(script := b'<script type="math/mml">' + octets(text) + b"</script>"), script
        ),
        "markup.plain_html": lambda text: markup.plain_html(b"<?xml shadowroot" + octets(text)),
        "markup.visible": markup.visible,
        "minhash": lambda text: duplicates.signatures([text.encode("utf-8", "replace").decode()]),
        "personal_data.find": personal_data.find,
        "personal_data.redact": personal_data.redact,
        "reading of a line": lambda text: pages.page_of(Frame("a.jsonl", "jsonl", 1, b"{" + octets(text))),
        "urls.reason of a host": lambda text: blocklist().reason("http://" + text),
        "urls.reason of a path": lambda text: blocklist().reason("http://a.example/" + text),
        "urls.split_url": urls.split_url,
        "pages.decoded": lambda text: pages.decoded(octets(text), {"content-encoding": "gzip"}, 1 << 30),
        "pages.fields_of": lambda text: pages.fields_of(b"HTTP/1.1 200\r\n" + octets(text)),
        "pages.looks_like_html": lambda text: pages.looks_like_html(octets(text)),
        "pages.page_of": record,
        "pages.without_chunks": lambda text: pages.without_chunks(octets(text)),
        "words": lambda text: (words.Split(text).words, words.Split(text).paragraphs, words.Split(text).script),
        "words.count_sentences": words.count_sentences,
    }


def data_readers() -> dict[str, Reader]:
    from llmkit import display
    from llmkit.formats import conversations, preferences, problems, questions
    from llmkit.io import jsonl
    from llmkit.io.records import Row
    from llmkit.probing import question_rules
    from llmkit.report import page, records

    def row(**value: Any) -> Row:
        return Row(value, "a.jsonl", 1)

    def passage(text: str) -> question_rules.Passage:
        return question_rules.Passage(text, "a", "a.jsonl:1")

    return {
        "conversations": lambda text: conversations.read_conversation(row(prompt=text, completion=text)),
        "conversations of messages": lambda text: conversations.read_conversation(
            row(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": text}])
        ),
        "display.printable": display.printable,
        "display.redacted": display.redacted,
        "display.redacted of a URL": lambda text: display.redacted(f"search:http://a.example/?{text}"),
        "display.redacted of URLs": lambda text: display.redacted(f"a://{text}"),
        "passages.cut_passages": lambda text: list(question_rules.cut_passages(text)),
        "preferences of transcripts": lambda text: preferences.read_comparison(
            row(chosen=f"\n\nHuman: {text}\n\nAssistant: a", rejected=f"\n\nHuman: {text}\n\nAssistant: b")
        ),
        "preferences of texts": lambda text: preferences.read_comparison(row(chosen=f"{text} a", rejected=f"{text} b")),
        "problems": lambda text: problems.read_problem(row(question=text, answer=text)),
        "problems.last_boxed": problems.last_boxed,
        "question_writer": lambda text: question_rules.write_questions(passage(text), 5, 0),
        "question_rules.sentences": lambda text: list(question_rules.sentences(text)),
        "questions": lambda text: questions.read_question(row(question=text, answer=text)),
        "questions of a context": lambda text: questions.read_question(row(context=text, answer="a")),
        "report excerpts": lambda text: records._excerpt(
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
            "conversations",
            1,
        ),
        "report page.clean": page.clean,
        "jsonl.json_rows": lambda text: list(jsonl.json_rows(io.BufferedReader(io.BytesIO(octets(text))), "a.jsonl")),
        "jsonl.json_rows of an array": lambda text: list(
            jsonl.json_rows(io.BufferedReader(io.BytesIO(b"[" + octets(text))), "a.json")
        ),
        "jsonl.read_text": lambda text: jsonl.read_text(io.BytesIO(octets(text)), "a.txt"),
    }


def reply_readers() -> dict[str, Reader]:
    from llmkit.formats.questions import Question
    from llmkit.generation import requests, served_models
    from llmkit.probing import judges, refusals
    from llmkit.reward_model import evaluation
    from llmkit.text import matching, normalize
    from llmkit.tools import calc, search

    judge = matching.MatchJudge()

    def stopped(text: str) -> str:
        matcher = requests.StopMatcher([text[:1000] + "\0", "\n\nUser:", "1 1 1 2"])
        return "".join(matcher.push(text[at : at + 3]) for at in range(0, len(text), 3)) + matcher.finish()

    def calculated(text: str) -> None:
        with suppress(calc.CalculationError):
            calc.calculate(text)

    folder = tempfile.TemporaryDirectory()  # lives as long as the reader that uses it

    @cache
    def index() -> search.SearchIndex:
        path = Path(folder.name, "docs.jsonl")
        path.write_text('{"title": "A", "text": "Ada was 1 of a few."}\n')
        return search.SearchIndex(str(path))

    def searched(text: str) -> None:
        """Search as if the engine had answered with this text."""
        body = json.dumps({"results": [{"title": text, "content": text}]}).encode()

        class Answer(io.BytesIO):
            def open(self, *rest: Any, **named: Any) -> Answer:
                return self

        call = type("Call", (), {"opener": Answer(body)})()
        search.SearchEngine("http://localhost/")._ask(call, "a", 3)

    return {
        "calc": calculated,
        "calc of a call": lambda text: calculated(f"max({text})"),
        "judges.read_verdict": judges.read_verdict,
        "judges.read_verdict of one": lambda text: judges.read_verdict(f"VERDICT: right{text}"),
        "matching of a response": lambda text: judge(text, "Who is it?", ["Ada Lovelace", "1 1"]),
        "matching with an answer": lambda text: judge("It is Ada 1.", "Who is it?", [text]),
        "matching with itself": lambda text: judge(f"{text} a", text, [f"{text} b"]),
        "normalize.words": normalize.words,
        "markdown of an answer": evaluation.MARKDOWN.findall,
        "refusals.language_of": lambda text: refusals.language_of(Question(text, ("a",), text, "", "who", "", "a:1")),
        "search a query": lambda text: index().search(text),
        "search an engine's answer": searched,
        "search.cut_passages": lambda text: list(search.cut_passages(text)),
        "served a message": served_models.text_of,
        "served_models.shortened": served_models.shortened,
        "stopping": stopped,
        "thoughts": lambda text: judges.THOUGHTS.sub("", text),
        "thoughts that end": lambda text: judges.THOUGHTS.sub("", f"<think>{text}</think> Yes."),
    }


def writing_readers() -> dict[str, Reader]:
    from llmkit.formats.conversations import message
    from llmkit.generation.requests import Completion
    from llmkit.writing import judge, keep, prompts, writer
    from llmkit.writing.draft import Draft

    def draft(text: str) -> Draft:
        return Draft(0, (message("user", text), message("assistant", text)))

    answer = cache(lambda: writer.Writer(type("Model", (), {"tokenizer": None, "tools": None})(), None, "", seed=0))  # type: ignore[arg-type]
    return {
        "drafts": lambda text: keep.Keeper().check(draft(text)),
        "drafts of a language": lambda text: keep.Keeper().check(replace(draft(text), language="en")),
        "drafts with stray marks": keep.STRAY.findall,
        "drafts' features": lambda text: keep.features(draft(text.encode("utf-8", "replace").decode()).messages),
        "writing: a judge's scores": judge.read_scores,
        "writing: lists": prompts.read_list,
        "writing: messages": prompts.read_message,
        "writing: quoted messages": lambda text: prompts.read_message(f'"{text}"'),
        "writing: answers": lambda text: answer()._answer(
            Completion(f"<think>{text}</think> {text}", [], "stop", [], [], [], []), True
        ),
    }


def reward_readers() -> dict[str, Reader]:
    from llmkit.formats.problems import read_problem
    from llmkit.io.records import Row
    from llmkit.rewards import code, final_answer, numbers, verifiers

    def verified(verifier: str, **record: Any) -> Reader:
        problem = read_problem(Row({"prompt": "What is it?", "verifier": verifier, **record}, "a.jsonl", 1))
        reward = verifiers.VerifierReward()
        return lambda text: reward._judge(problem, text)

    return {
        "code.code_of": lambda text: code.code_of(text, ["f"]),
        "code.code_of a block": lambda text: code.code_of(f"```python\n{text}", ["f"]),
        "code.defines": lambda text: code.defines(text, "f"),
        "latex": lambda text: (
            verifiers.SPACES.sub("", text),
            verifiers.BASE.findall(text),
            verifiers.LEFT_OPEN.findall(text),
        ),
        "numbers.last_number": numbers.last_number,
        "numbers.only_number": numbers.only_number,
        "numbers.whole_number": numbers.whole_number,
        "final_answer.chosen": lambda text: final_answer.chosen(text, [("A", "one"), ("B", "two")]),
        "final_answer.says": lambda text: final_answer.says(text, "one"),
        "numbers.announced_number": numbers.announced_number,
        "final_answer.after_thinking": final_answer.after_thinking,
        "final_answer.final": final_answer.final,
        "final_answer.tagged": final_answer.tagged,
        "verifier choice": verified("choice", answer="B", choices=["one", "two"]),
        "verifier exact": verified("exact", answer="one"),
        "verifier gsm8k": verified("gsm8k", answer="#### 5"),
        "verifier match": verified("match", answer="Ada Lovelace"),
        "verifier number": verified("number", answer="1/3"),
    }


def schema_readers() -> dict[str, Reader]:
    from llmkit.rewards import constraints

    def met(schema: dict[str, Any]) -> Reader:
        return lambda text: list(constraints.start_checking()((json.dumps(schema), text)))

    as_text, as_object = met({"type": "string", "pattern": "^[a-z ]+$", "maxLength": 10}), met({"type": "object"})
    items = met({"type": "array", "items": {"type": "integer"}, "uniqueItems": True})
    return {
        "json-schema": as_object,
        "json-schema of a string": lambda text: as_text(json.dumps(text)),
        "json-schema of a block": lambda text: as_object(f"```json\n{text}```"),
        "json-schema of different items": lambda text: items(json.dumps(list(range(len(text) // 16)))),
        "json-schema of keys": lambda text: as_object(json.dumps({f"{at}": text[:8] for at in range(len(text) // 16)})),
    }


def tokenizer_readers() -> dict[str, Reader]:
    from tiny import save_tokenizer

    from llmkit.formats.conversations import message
    from llmkit.tokenizer import calls, corpus, patterns, templates
    from llmkit.tokenizer.chat import CHAT_SPECIALS
    from llmkit.tokenizer.encoding import load_tokenizer

    @cache
    def tokenizer() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(Path(folder), *CHAT_SPECIALS)
            return load_tokenizer(folder)

    def counted(name: str) -> Reader:
        def read(text: str) -> None:
            counter = corpus.PieceCounter(patterns.find_pattern(name))
            counter.add(octets(text.encode("utf-8", "replace").decode()) + corpus.END)
            counter.result()

        return read

    def streamed(text: str) -> None:
        stream = tokenizer().stream()
        for token in tokenizer().encode(text.encode("utf-8", "replace").decode()):
            stream.push([token])
        stream.finish()

    def plain(text: str) -> None:
        for _ in corpus.plain_text(
            io.BufferedReader(io.BytesIO(octets(text))), "a.txt", patterns.find_pattern("llama3")
        ):
            pass

    def chatted(text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        templates.chat_format(tokenizer()).encode([message("user", text), message("assistant", text)])

    return {
        "tokenizer of a chat": chatted,
        "tokenizer streaming": streamed,
        "pieces gpt2": counted("gpt2"),
        "pieces gpt4": counted("gpt4"),
        "pieces llama3": counted("llama3"),
        "corpus.plain_text": plain,
        "templates.portable_template": templates.portable_template,
        "calls": lambda text: [form.read(start + text) for form in calls.FORMS for start in form.openers],
    }


def suppressed(call: Callable[[], Any], *errors: type[BaseException]) -> None:
    with suppress(*errors):
        call()


PARTS = (crawl_readers, data_readers, reply_readers, writing_readers, reward_readers, schema_readers, tokenizer_readers)
REFUSALS = (LlmkitError, ValueError)  # exceptions that a reader may raise; TypeError and the like are bugs


@cache
def readers() -> dict[str, Reader]:
    return {name: reader for part in PARTS for name, reader in part().items()}
