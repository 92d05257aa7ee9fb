"""Every feature of the page of `llmkit serve`, in a real browser with a real server.

Needs playwright (`pip install '.[browser]'`) and Chromium on the PATH. Screenshots go to $LLMKIT_SCREENSHOTS, if set.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonl
import pytest
import tiny
from served import Server, served

from llmkit.formats.conversations import read_conversation
from llmkit.io.records import Row
from llmkit.model.folder import save_model
from llmkit.tokenizer.chat import CHAT_SPECIALS
from llmkit.tokenizer.encoding import load_tokenizer

FILES = Path(__file__).parent.parent.parent / "llmkit" / "serving" / "page"
browsed = pytest.mark.slow
SAYS = (
    "<b>Hi</b><script>x()</script>"  # no letter may follow two others: each token of a certain model has one successor
)
# elements whose text has less contrast with its background than WCAG 2.2 requires (4.5)
FAINT = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const linear = (value) => value <= 10.31 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if ((colour[3] ?? 1) > 0.5) return colour;
    }
  };
  const shown = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()) && !node.closest("option");
  const contrast = (node) => {
    const [one, other] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  return [...document.querySelectorAll("body *")].filter((node) => shown(node) && contrast(node) < 4.5)
    .map((node) => [contrast(node), node.outerHTML.slice(0, 90)]);
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea")]
  .filter((node) => !["aria-label", "aria-labelledby"].some((name) => node.getAttribute(name)))
  .filter((node) => !node.labels?.length && !node.textContent.trim() || node.matches("select") && !node.labels.length)
  .map((node) => node.outerHTML.slice(0, 90))"""


def save_certain(folder: Path, *said: str) -> Path:
    """Write an assistant that always answers with these strings, special tokens included."""
    tiny.save_assistant(folder)
    tokenizer = load_tokenizer(folder)
    ids = [
        one
        for text in said
        for one in ([tokenizer.specials[text]] if text in CHAT_SPECIALS else tokenizer.encode(text))
    ]
    end = tokenizer.specials["<|im_end|>"]
    model = tiny.make_model(vocab_size=257 + len(CHAT_SPECIALS), eos_token_id=(tiny.END, end), context=8192)
    save_model(tiny.certain(model, tokenizer.specials["<|im_sep|>"], *ids), folder)
    return folder


def save_broken(folder: Path) -> Path:
    """Write an assistant that generates invalid UTF-8 until its context is full."""
    tiny.save_assistant(folder)
    tokenizer = load_tokenizer(folder)
    byte, end = tokenizer.token_bytes.index(b"\x80"), tokenizer.specials["<|im_end|>"]
    model = tiny.make_model(vocab_size=257 + len(CHAT_SPECIALS), eos_token_id=(tiny.END, end), context=64)
    save_model(tiny.certain(model, tokenizer.specials["<|im_sep|>"], byte, byte), folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    folders = (
        tiny.save_assistant(root / "chat"),
        save_certain(root / "says", "World.", "<|im_end|>"),
        save_certain(root / "script", "<i>&", "<|im_end|>"),
        save_certain(root / "calls", "<|calc_start|>", "1+2", "<|calc_end|>", "<|result_end|>", "sum!", "<|im_end|>"),
        save_certain(root / "endless", "ab", "a"),
        save_broken(root / "broken"),
        tiny.save_folder(root / "base"),  # it has no tool tokens, and gets none
    )
    with served(*folders, "--tools", "calc") as server:
        yield server


class Browsed:
    """The page of a server in a new browser context; `asked` has its request bodies by path."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.page, self.url = self.context.new_page(), url
        self.said: list[str] = []
        self.asked: list[tuple[str, Any]] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", self._take)
        self.page.goto(url)
        self.until("document.querySelector('#model').options.length || !document.querySelector('#alert').hidden")

    def _take(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            assert request.url.startswith(self.url + "/")
            self.asked.append(
                (request.url.removeprefix(self.url), request.post_data_json if request.post_data else None)
            )

    def until(self, expression: str) -> None:
        """Wait until JavaScript is true; Playwright's own waiting uses eval, which the page's CSP forbids."""
        for _ in range(1000):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(10)
        raise AssertionError(expression)

    def sent(self, path: str) -> Any:
        """Return the body of the last request to a path."""
        return [body for name, body in self.asked if name == path][-1]

    def pick(self, model: str) -> None:
        self.page.select_option("#model", model)

    def rest(self) -> None:
        """Wait until no generation is running."""
        self.page.wait_for_selector("#stop", state="hidden")

    def ask(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.press("#text", "Enter")
        self.rest()

    def press(self, does: str, turn: int = -1) -> None:
        """Click a button below a turn."""
        turns = self.page.locator("#turns > li")
        turns.nth(turn % turns.count()).locator(f"[data-does={does}]").click()
        self.rest()

    def turns(self) -> list[str]:
        return self.page.locator("#turns .body").all_inner_texts()

    def tokens(self) -> Any:
        """Switch to the token view; return the tokens' locator."""
        self.page.click("#as-tokens")
        self.page.wait_for_selector(".token")
        return self.page.locator(".token")


@pytest.fixture
def opened(browser, server) -> Iterator[Browsed]:
    browsed = Browsed(browser, server.url)
    yield browsed
    browsed.context.close()
    assert browsed.said == []


def test_the_files_are_small_and_hold_no_script_or_style_inline() -> None:
    texts = {path.name: path.read_text() for path in FILES.iterdir()}
    assert set(texts) == {"index.html", "app.js", "style.css"}
    assert sum(len(text.encode()) for text in texts.values()) < 60_000
    assert sum(text.count("\n") for text in texts.values()) <= 900
    page = texts["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=\"app\.js\" defer></script>)", page)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", texts["app.js"]
    )
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg|over https", "", "".join(texts.values()))


@browsed
def test_an_answer_arrives_is_regenerated_and_the_branches_switch(opened: Browsed) -> None:
    opened.pick("says")
    opened.ask("Hi")
    assert opened.turns() == ["Hi", "World."]
    opened.pick("chat")
    opened.page.click("#open-settings")
    opened.page.fill("[name=max_tokens]", "5")
    opened.page.fill("[name=seed]", "7")
    opened.page.keyboard.press("Escape")
    opened.press("again")
    assert opened.sent("/v1/chat/completions")["seed"] == 8  # the second answer to the question
    assert opened.page.locator(".count").inner_text() == "2/2" and "token limit" in opened.turns()[1]
    opened.press("left")
    assert opened.turns() == ["Hi", "World."] and opened.page.locator(".count").inner_text() == "1/2"
    assert opened.page.evaluate("document.activeElement.dataset.does") == "left"


@browsed
def test_a_turn_is_edited_in_a_new_branch(opened: Browsed) -> None:
    opened.pick("says")
    for text in ("One", "Two"):
        opened.ask(text)
    opened.press("edit", 0)
    assert (
        opened.page.input_value("#edited") == "One"
        and opened.page.locator("#edit-title").inner_text() == "Your message"
    )
    opened.page.fill("#edited", "Three")
    opened.page.click("#save")
    opened.rest()
    assert opened.turns() == ["Three", "World."]
    opened.press("left", 0)
    assert opened.turns() == ["One", "World.", "Two", "World."]
    opened.press("edit", 1)
    opened.page.fill("#edited", "Better.")
    opened.page.click("#save")
    assert opened.turns() == ["One", "Better."]
    opened.ask("Next")
    assert [one["content"] for one in opened.sent("/v1/chat/completions")["messages"]] == ["One", "Better.", "Next"]


@browsed
def test_settings_shape_the_request(opened: Browsed) -> None:
    opened.pick("chat")
    opened.page.click("#open-settings")
    opened.page.fill("#system", "Be brief.")
    values = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 3, "seed": 11}
    for name, value in values.items():
        opened.page.fill(f"[name={name}]", str(value))
    opened.page.fill("[name=stop]", "###| END")
    opened.page.click("#settings button.main")
    opened.ask("Hi")
    sent = opened.sent("/v1/chat/completions")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    fields = {"model": "chat", "stream": True, "return_token_ids": True, "stop": ["###", "END"], "messages": messages}
    assert sent == values | fields
    opened.page.reload()
    opened.page.click("#open-settings")
    assert opened.page.input_value("[name=temperature]") == "0.5" and opened.page.input_value("#system") == ""
    opened.page.click("#defaults")
    opened.page.click("#settings button.main")
    opened.page.click("#list button.wide")
    opened.page.click("#open-settings")
    assert opened.page.input_value("[name=temperature]") == "" and opened.page.input_value("#system") == "Be brief."


@browsed
def test_a_stop_keeps_what_has_come(opened: Browsed) -> None:
    opened.pick("endless")
    opened.page.fill("#text", "Go")
    opened.page.press("#text", "Enter")
    opened.until("document.querySelectorAll('#turns .body')[1]?.innerText.length > 5")
    opened.page.keyboard.press("Escape")
    opened.rest()
    assert re.fullmatch(r"(ab)+a?\s+Stopped\.", opened.turns()[1])
    opened.page.fill("#text", "Again")
    opened.page.press("#text", "Enter")
    opened.until("document.querySelectorAll('#turns .body')[3]?.innerText.length > 5")
    opened.page.click("#stop")
    opened.rest()
    assert len(opened.turns()) == 4 and opened.turns()[3].endswith("Stopped.")


@browsed
def test_a_server_that_dies_during_an_answer_is_reported(browser, tmp_path) -> None:
    with served(save_certain(tmp_path / "endless", "ab", "a")) as server:
        opened = Browsed(browser, server.url)
        opened.page.fill("#text", "Go")
        opened.page.press("#text", "Enter")
        opened.until("document.querySelectorAll('#turns .body')[1]?.innerText.length > 5")
        server.process.send_signal(signal.SIGINT)
        opened.page.wait_for_timeout(500)
        server.process.send_signal(signal.SIGINT)  # the second signal ends running requests
        server.process.wait(30)
        opened.rest()
        assert "llmkit serve" in opened.page.locator("#complaint").inner_text()
        assert re.fullmatch(r"(ab)+a?\s+Stopped\.", opened.turns()[1])
        opened.context.close()


@browsed
def test_conversations_stay_and_go_out_as_records_of_sft(opened: Browsed) -> None:
    opened.pick("says")
    opened.ask("First")
    opened.page.click("#new")
    opened.ask("Second, \u2028 of another")
    opened.pick("base")
    opened.page.fill("#paper", "A text.")
    with opened.page.expect_download() as download:
        opened.page.click("#export-all")
    lines = Path(download.value.path()).read_bytes().splitlines()
    records = [read_conversation(Row(json.loads(line), "all", 1)) for line in lines]
    said = [conversation.said for conversation in records]
    assert sorted(said) == ["A text.", "First\nWorld.", "Second, \u2028 of another\nWorld."]
    with opened.page.expect_download() as download:
        opened.page.click("#export")
    assert json.loads(Path(download.value.path()).read_text()) == {"text": "A text."}
    opened.page.reload()
    opened.page.locator("#list button.wide").last.click()
    assert opened.turns() == ["First", "World."]
    opened.page.on("dialog", lambda dialog: dialog.accept())
    opened.page.locator("#list li").last.hover()
    opened.page.locator("#list [data-does=bin]").last.click()
    assert opened.turns() == [] and opened.page.locator("#list li").count() == 2
    opened.page.reload()
    assert opened.page.locator("#list li").count() == 2


@browsed
def test_a_conversation_deleted_while_it_is_answered_stays_deleted(opened: Browsed) -> None:
    opened.pick("endless")
    opened.page.fill("#text", "Go on")
    opened.page.press("#text", "Enter")
    opened.page.wait_for_selector("#list li")
    opened.page.on("dialog", lambda dialog: dialog.accept())
    opened.page.locator("#list li").last.hover()
    opened.page.locator("#list [data-does=bin]").last.click()
    opened.rest()
    assert opened.page.locator("#list li").count() == 0
    opened.page.reload()
    assert opened.page.locator("#list li").count() == 0


@browsed
def test_full_storage_is_reported_and_ends_nothing(opened: Browsed) -> None:
    opened.page.evaluate(
        "try { for (let n = 23; n; n--) for (;;) localStorage.setItem(Math.random(), 'x'.repeat(2 ** n)); } catch {}"
    )
    opened.page.evaluate("try { for (;;) localStorage.setItem(Math.random(), ''); } catch {}")
    opened.pick("says")
    opened.ask("Hi")
    assert opened.turns() == ["Hi", "World."] and "storage is full" in opened.page.locator("#complaint").inner_text()


@browsed
def test_an_unanswered_message_is_sent_again(opened: Browsed) -> None:
    opened.pick("says")
    opened.page.route("**/v1/chat/completions", lambda route: route.abort())
    opened.ask("Hi")
    assert "llmkit serve" in opened.page.locator("#complaint").inner_text() and opened.turns() == ["Hi"]
    opened.page.unroute("**/v1/chat/completions")
    opened.press("again")
    assert opened.turns() == ["Hi", "World."] and not opened.page.locator("#alert").is_visible()
    assert [text for text in opened.said if "ERR_FAILED" not in text] == []
    opened.said.clear()


@browsed
def test_a_conversation_of_a_missing_model_continues_with_one_of_its_kind(opened: Browsed) -> None:
    kept = {"model": "gone", "system": "", "nodes": {}, "chosen": {}, "updated": 1}
    items = {"chats": ["one", "two"], "chat.one": kept | {"id": "one", "text": "Once"}}
    items["chat.two"] = kept | {"id": "two", "text": ""}
    for name, item in items.items():
        opened.page.evaluate("(item) => localStorage.setItem(...item)", [f"llmkit.{name}", json.dumps(item)])
    opened.page.reload()
    opened.page.wait_for_selector("#model option", state="attached")
    opened.page.locator("#list button.wide").get_by_text("Once").click()
    assert opened.page.input_value("#model") == "base" and opened.page.input_value("#paper") == "Once"
    opened.page.locator("#list button.wide").get_by_text("New conversation").click()
    assert opened.page.input_value("#model") == "chat" and not opened.page.locator("#paper").is_visible()


@browsed
def test_a_message_is_copied(browser, server) -> None:
    opened = Browsed(browser, server.url, permissions=["clipboard-read", "clipboard-write"])
    opened.pick("script")
    opened.ask("Hi")
    opened.press("copy")
    opened.until("document.querySelector('#status').textContent === 'Copied'")
    assert opened.page.evaluate("navigator.clipboard.readText()") == "<i>&"
    opened.context.close()


@browsed
def test_tokens_are_those_that_the_model_sees(opened: Browsed, server: Server) -> None:
    opened.pick("says")
    opened.ask("Hi")
    shown = opened.tokens()
    request = {
        "model": "says",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "World."}],
    }
    _, cut = server.post("/tokenize", {**request, "add_generation_prompt": False, "return_token_strs": True})
    scored = server.client.completions.create(model="says", prompt=cut["tokens"], echo=True, logprobs=1, max_tokens=0)
    assert shown.all_inner_texts() == cut["token_strs"]
    shares = [
        one and float(one.removeprefix("<").removesuffix("%"))
        for one in shown.evaluate_all("all => all.map(one => one.title)")[1:]
    ]
    expected = [100 * 2.718281828459045**one for one in scored.choices[0].logprobs.token_logprobs[1:]]
    assert shares == pytest.approx(expected, rel=0.06, abs=0.011)
    special = shown.evaluate_all("all => all.map(one => one.classList.contains('special'))")
    learnt = shown.evaluate_all("all => all.map(one => one.classList.contains('learnt'))")
    assert special == cut["special"] and learnt == cut["trained"]
    assert shown.nth(-1).get_attribute("class").split() == ["token", "p0", "special", "learnt"]
    assert "p5" in shown.nth(1).get_attribute("class").split()


@browsed
def test_arrows_go_over_the_tokens_and_another_one_is_chosen(opened: Browsed) -> None:
    opened.pick("says")
    opened.ask("Hi")
    shown, keyboard = opened.tokens(), opened.page.keyboard
    shown.first.focus()
    active = "[document.activeElement.dataset.at, document.activeElement.innerText]"
    keyboard.press("ArrowRight")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowUp")
    keyboard.press("ArrowLeft")
    assert opened.page.evaluate(active) == ["0", "<|im_start|>"]
    keyboard.press("End")
    for _ in range(3):
        keyboard.press("ArrowLeft")
    assert opened.page.evaluate(active)[1] == "l"
    (at, _) = opened.page.evaluate(active)
    keyboard.press("Enter")
    opened.page.wait_for_selector("#odds:visible")
    assert opened.page.locator("#odds-list li").count() == 10
    assert opened.page.evaluate("document.activeElement.ariaLabel") == "l, 100%"
    keyboard.press("Escape")
    assert not opened.page.locator("#odds").is_visible() and opened.page.evaluate(active)[1] == "l"
    keyboard.press("Enter")
    opened.page.wait_for_selector("#odds:visible")
    opened.page.locator("#odds-list button").nth(1).focus()
    keyboard.press("ArrowUp")
    keyboard.press("ArrowUp")  # wraps from the first to the last
    keyboard.press("ArrowUp")
    chosen = opened.page.evaluate("document.activeElement.innerText").split()[0]
    keyboard.press("Enter")
    opened.page.wait_for_selector("#turns .count:visible")
    opened.rest()
    assert opened.page.locator(".count").inner_text() == "2/2"
    assert len(opened.sent("/v1/completions")["prompt"]) == int(at) + 1
    assert opened.turns()[1].startswith("Wor" + chosen) or len(chosen) > 1  # invalid bytes have names
    opened.press("left")
    assert opened.turns() == ["Hi", "World."]


@browsed
def test_an_answer_is_scored_by_its_own_tokens(opened: Browsed, server: Server) -> None:
    opened.pick("broken")
    opened.ask("Hi")
    text = opened.page.locator("#turns .assistant .prose").inner_text()
    assert set(text) == {"\N{REPLACEMENT CHARACTER}"}  # if tokenized again, three bytes each
    shown = opened.tokens().all_inner_texts()
    sent = opened.sent("/v1/completions")["prompt"]
    models = server.post("/v1/models", None)[1]["data"]
    assert len(shown) == len(sent) == next(one["max_model_len"] for one in models if one["id"] == "broken")
    assert shown[-4:] == ["<0x80>"] * 4 and opened.page.locator("#alert").is_hidden()
    opened.page.locator(".token").nth(-3).click()
    opened.page.wait_for_selector("#odds:visible")
    opened.page.locator("#odds-list button").nth(1).click()
    opened.page.wait_for_selector("#turns .count:visible")
    opened.rest()
    assert opened.sent("/v1/completions")["prompt"][:-1] == sent[:-3]


@browsed
def test_the_user_s_tokens_show_alternatives_and_take_none(opened: Browsed) -> None:
    opened.pick("chat")
    opened.ask("Hi, there! How do you do?")
    shown = opened.tokens()
    unlikely = shown.evaluate_all("all => all.findIndex((one) => one.classList.contains('p5'))")
    shown.nth(unlikely).click()
    opened.page.wait_for_selector("#odds:visible")
    assert opened.page.locator("#odds-list button").count() == 11  # the present token is not among the ten likeliest
    assert opened.page.locator("#odds-list button:enabled").count() == 0
    opened.page.click("#close-odds")
    opened.page.locator(".token").first.click()
    opened.page.wait_for_selector("#odds:visible")
    assert "without a probability" in opened.page.locator("#odds-about").inner_text()


@browsed
def test_calls_and_results_are_shown_in_place(opened: Browsed) -> None:
    opened.pick("calls")
    opened.ask("How much?")
    parts = opened.page.locator("#turns .assistant .call, #turns .assistant .prose").all_inner_texts()
    assert [re.sub(r"\s+", " ", part) for part in parts] == ["calc 1+2", "result 3", "sum!"]
    shown = opened.tokens()
    texts = shown.all_inner_texts()
    learnt = shown.evaluate_all("all => all.map(one => one.classList.contains('learnt'))")
    assert "".join(texts).endswith("<|calc_start|>1+2<|calc_end|><|result_start|>3<|result_end|>sum!<|im_end|>")
    masked = "".join(text for text, flag in zip(texts, learnt, strict=True) if not flag)
    assert masked.endswith("<|im_sep|><|result_start|>3<|result_end|>")
    # after another token in the call: it is called, answered, and generation continues
    shown.nth(texts.index("<|calc_start|>")).click()
    opened.page.wait_for_selector("#odds:visible")
    opened.page.locator("#odds-list button").first.click()
    opened.page.wait_for_selector("#turns .count:visible")
    opened.rest()
    parts = opened.page.locator("#turns .assistant .call, #turns .assistant .prose").all_inner_texts()
    assert [re.sub(r"\s+", " ", part) for part in parts] == ["calc 1+2", "result 3", "sum!"]
    opened.ask("And now?")
    content = opened.sent("/v1/chat/completions")["messages"][1]["content"]
    assert content == [
        {"type": "calc", "text": "1+2"},
        {"type": "result", "text": "3"},
        {"type": "text", "text": "sum!"},
    ]


@browsed
def test_a_base_model_continues_a_text(opened: Browsed) -> None:
    opened.pick("base")
    paper = opened.page.locator("#paper")
    assert paper.is_visible() and not opened.page.locator("#text").is_visible()
    paper.fill("Once")
    opened.page.click("#open-settings")
    opened.page.fill("[name=max_tokens]", "20")
    opened.page.keyboard.press("Escape")
    paper.press("Control+Enter")
    opened.rest()
    first = paper.input_value()
    assert first.startswith("Once") and len(first) > 4
    opened.page.click("#again")
    opened.rest()
    assert paper.input_value().startswith("Once") and paper.input_value() != first
    shown = opened.tokens()
    assert shown.first.inner_text() == "<|endoftext|>" and shown.count() > 5
    shown.nth(2).click()
    opened.page.wait_for_selector("#odds:visible")
    opened.page.locator("#odds-list button").nth(3).click()
    opened.page.wait_for_selector("#paper:visible")
    opened.rest()
    assert paper.input_value().startswith("O") and not paper.input_value().startswith("Once")
    assert len(opened.sent("/v1/completions")["prompt"]) == 3


@browsed
def test_a_text_is_tokenized_live_by_two_tokenizers(opened: Browsed) -> None:
    opened.pick("says")
    opened.page.click("#open-cut")
    opened.page.fill("#cut-text", "naïve \u202e ok\n<|im_end|>")
    opened.page.wait_for_selector("section:first-child .piece")
    columns = opened.page.locator("#cuts section")
    assert columns.count() == 2 and columns.locator("select").evaluate_all("all => all.map(one => one.value)") == [
        "says",
        "chat",
    ]
    pieces = columns.first.locator(".piece").all_inner_texts()
    assert pieces[:4] == ["n", "a", "<0xC3>", "<0xAF>"] and "<|im_end|>" not in pieces  # text is never a special token
    columns.last.locator("select").select_option("base")
    opened.page.fill("#cut-text", "x" * 5000)
    counts = "[...document.querySelectorAll('#cuts .hint')].map((one) => one.innerText)"
    opened.until(f"{counts}.every((text) => text.includes('5,000 tokens, 1.00 characters each; the first 3,000'))")
    assert columns.first.locator(".piece").count() == 3000
    opened.page.keyboard.press("Escape")
    assert opened.page.evaluate("document.activeElement.id") == "open-cut"


GUIDE = "# What is good\n\nHonest first, then helpful.\n- No <b>flattery</b>\n\n## Ties\n\nWhere you would not care.\n"


@pytest.fixture
def labelled(browser, tmp_path) -> Iterator[tuple[Browsed, Path]]:
    """The page of a server with --collect, and the folder of the collected files."""
    (tmp_path / "guide.md").write_text(GUIDE)
    models = save_certain(tmp_path / "says", "World.", "<|im_end|>"), tiny.save_assistant(tmp_path / "chat")
    with served(*models, "--collect", tmp_path / "judged.jsonl", "--guide", tmp_path / "guide.md") as server:
        opened = Browsed(browser, server.url)
        opened.page.fill("#labeller", "Ada")
        yield opened, tmp_path
        opened.context.close()
        assert opened.said == []


@browsed
def test_people_say_which_answers_are_good_and_which_is_better(labelled: tuple[Browsed, Path], llmkit) -> None:
    opened, folder = labelled
    page = opened.page
    opened.ask("One")
    opened.press("up")
    page.wait_for_selector(".assistant [data-does=up][aria-pressed=true]")
    opened.press("down")
    page.wait_for_selector(".assistant [data-does=down][aria-pressed=true]")
    opened.press("edit", 1)
    assert "Honest first" in page.locator("#edit .guide").inner_text() and page.locator("#edit h3").count() == 2
    page.fill("#edited", "Wonderful.")
    page.click("#save")
    page.wait_for_selector("#edit", state="hidden")
    assert opened.turns() == ["One", "Wonderful."]
    assert not page.locator(".assistant [data-does=up]").count()  # a person's answer cannot be judged as the model's
    thumbs = jsonl.lines(folder / "judged.conversations.jsonl")
    assert [(one["kind"], one.get("label"), one["labeller"]) for one in thumbs] == [
        ("thumb", True, "Ada"),
        ("thumb", False, "Ada"),
        ("rewrite", True, "Ada"),
    ]
    assert thumbs[2]["messages"][-1]["content"] == "Wonderful."
    opened.pick("chat")
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "6")
    page.keyboard.press("Escape")
    page.check("#two")
    for key, presses in (("left", 0), ("tie", 1), ("right", 2)):
        opened.ask(f"Which, {key}?")
        page.wait_for_selector("#judge button:enabled")
        opened.until("document.activeElement.dataset.better === '0'")
        answers = page.locator("#pair .body").all_inner_texts()
        for _ in range(presses):
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#judge", state="hidden")
        assert opened.turns()[-1] == answers[key == "right"]
    assert page.locator("#turns .count").last.inner_text() == "2/2"
    left, tie, right = [one for one in jsonl.lines(folder / "judged.preferences.jsonl") if one["kind"] == "comparison"]
    assert left["chosen"] != left["rejected"] and tie["ranking"] == [1, 1] and right["labeller"] == "Ada"
    assert len(set(right["seeds"])) == 2 and right["settings"] == {"max_tokens": 6} and right["model"] == "chat"
    page.reload()
    assert page.input_value("#labeller") == "Ada" and page.is_checked("#two")
    page.click("#open-guide")
    assert page.locator("#guide .guide").inner_text().splitlines()[0] == "What is good"
    made = llmkit("train-reward", folder / "chat", "--data", folder / "judged.preferences.jsonl", "--dry-run")
    assert made.returncode == 0, made.stderr


@browsed
def test_a_comparison_with_the_answer_that_is_there_may_be_skipped(labelled: tuple[Browsed, Path]) -> None:
    opened, folder = labelled
    opened.ask("One")
    opened.press("pair")
    opened.page.wait_for_selector("#judge button:enabled")
    opened.page.click("#skip")
    assert opened.turns() == ["One", "World."] and opened.page.locator(".count").inner_text() == "1/2"
    opened.press("pair")
    opened.page.wait_for_selector("#judge button:enabled")
    opened.press("edit", 0)  # away from the comparison
    opened.page.fill("#edited", "Two")
    opened.page.click("#save")
    opened.rest()
    assert opened.turns() == ["Two", "World."] and not opened.page.locator("#judge").is_visible()
    assert not (folder / "judged.preferences.jsonl").exists()


@browsed
def test_a_judgement_that_is_not_saved_is_reported(labelled: tuple[Browsed, Path]) -> None:
    opened, folder = labelled
    opened.ask("One")
    (folder / "judged.conversations.jsonl").mkdir()
    opened.press("up")
    opened.page.wait_for_selector("#alert:visible")
    assert "not saved" in opened.page.locator("#complaint").inner_text()
    assert opened.page.locator("[aria-pressed=true][data-does=up]").count() == 0
    opened.said.clear()  # Chromium's message about a failed request


HOSTILE = {
    "markup": "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>{{7*7}}${7*7}",
    "separators": "one\u2028two\u2029three\x85four",
    "terminal": "\x1b[31mred\x1b]0;title\x07\x00end",
    "directions": "\u202egnp.exe \u2066\u2067abc\u2069",
    "fences": "```html\n<b>code</b>\n```\n```\nopen",
}


@browsed
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_run_nothing_and_stay_as_they_are(opened: Browsed, kind: str) -> None:
    text = HOSTILE[kind]
    opened.pick("script")
    opened.ask(text)
    sent = opened.sent("/v1/chat/completions")["messages"][0]["content"]
    assert sent == text
    assert opened.turns()[1] == "<i>&" and opened.page.locator("#turns i, #turns img, #turns script").count() == 0
    opened.tokens()
    assert opened.page.evaluate("window.ran") is None
    assert opened.page.locator("#list bdi").first.inner_text() != ""
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 1280


@browsed
def test_a_megabyte_is_refused_by_the_server_and_held_by_the_page(opened: Browsed) -> None:
    opened.pick("says")
    opened.page.evaluate("document.querySelector('#text').value = 'word '.repeat(200000) + 'end'")
    opened.page.press("#text", "Enter")
    opened.page.wait_for_selector("#alert:visible")
    assert [text for text in opened.said if "400 (Bad Request)" not in text] == []  # Chromium's message
    opened.said.clear()
    assert "context" in opened.page.locator("#complaint").inner_text()
    assert len(opened.turns()) == 1 and opened.turns()[0].endswith("Show 980,003 more characters")
    opened.page.click("#turns button.plain")
    assert opened.turns()[0].endswith("word end")
    opened.press("edit", 0)
    opened.page.fill("#edited", "Short.")
    opened.page.click("#save")
    opened.rest()
    assert opened.turns() == ["Short.", "World."]


@browsed
def test_a_key_is_requested_and_kept_for_the_tab(browser, tmp_path) -> None:
    (tmp_path / "keys").write_text("secret\n")
    with served(save_certain(tmp_path / "says", "World.", "<|im_end|>"), "--api-key-file", tmp_path / "keys") as server:
        opened = Browsed(browser, server.url)
        opened.page.wait_for_selector("#settings:visible")
        assert opened.page.evaluate("document.activeElement.name") == "key"
        opened.page.keyboard.type("secret")
        opened.page.keyboard.press("Enter")
        opened.page.wait_for_selector("#model option", state="attached")
        opened.ask("Hi")
        assert opened.turns() == ["Hi", "World."]
        opened.page.reload()
        opened.page.wait_for_selector("#model option", state="attached")
        assert "secret" not in opened.page.evaluate("JSON.stringify(localStorage)")
        opened.context.close()


@browsed
def test_the_keyboard_alone_holds_a_conversation(opened: Browsed) -> None:
    keyboard = opened.page.keyboard
    opened.pick("says")
    opened.page.evaluate("document.activeElement.blur()")
    keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    keyboard.press("Enter")
    keyboard.type("One")
    keyboard.press("Shift+Enter")
    keyboard.type("Two")
    keyboard.press("Enter")
    opened.rest()
    assert opened.sent("/v1/chat/completions")["messages"][0]["content"] == "One\nTwo"
    assert opened.page.locator("#status").inner_text() == "World."  # announced to screen readers once, when complete
    for _ in range(3):
        keyboard.press("Shift+Tab")
    assert opened.page.evaluate("document.activeElement.dataset.does") in ("copy", "again", "edit")
    outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@browsed
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_fits_is_legible_and_names_its_controls(browser, server, width: int, scheme: str) -> None:
    opened = Browsed(
        browser, server.url, viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    page, shots = opened.page, os.environ.get("LLMKIT_SCREENSHOTS")

    def check(name: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == width, name
        assert page.evaluate(FAINT) == [] and page.evaluate(NAMELESS) == [], name
        if shots:
            page.screenshot(path=f"{shots}/serve-{width}-{scheme}-{name}.png")

    check("empty")
    opened.pick("calls")
    opened.ask("How much is one and two?")
    check("chat")
    opened.tokens().last.click()
    page.wait_for_selector("#odds:visible")
    check("tokens")
    page.click("#close-odds")
    page.click("#open-settings")
    check("settings")
    page.keyboard.press("Escape")
    if width < 800:
        page.click("#open-side")
        check("list")
    page.click("#open-cut")
    page.fill("#cut-text", "Any text at all")
    page.wait_for_selector(".piece")
    check("cut")
    assert opened.said == []
    opened.context.close()
