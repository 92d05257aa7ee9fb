"""A scripted labeller: prompts a model through `llmkit serve` and picks the better of two answers by a rule.

    cd examples/labelling
    python label.py chat/ --prompts prompts.jsonl --collect judged.jsonl --guide guide.md --good '^Yes'

With playwright and Chromium (`pip install '.[browser]'`) it clicks in the page like a person; without them, or with
`--by http`, it sends the page's requests.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
Verdict = Callable[[str, str], int | None]  # from two answers to the index of the better, or None for a tie


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run a server and yield its URL."""
    command = [sys.executable, "-m", "llmkit", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit(line + process.stderr.read())
        try:
            yield address[0]
        finally:
            process.terminate()


def in_the_page(url: str, prompts: Sequence[str], verdict: Verdict, settings: dict[str, int]) -> list[int | None]:
    """Send each prompt in a new conversation, and click on the better of two answers or on a tie."""
    from playwright.sync_api import sync_playwright

    verdicts = []
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.goto(url)
        page.click("#open-settings")
        for name, value in settings.items():
            page.fill(f"[name={name}]", str(value))
        page.click("#settings button.main")
        page.fill("#labeller", "script")
        page.check("#two")
        for prompt in prompts:
            page.click("#new")
            page.fill("#text", prompt)
            page.press("#text", "Enter")
            page.wait_for_selector("#judge button[data-better]:enabled")
            one, other = (
                "".join(card.locator(".prose").all_inner_texts()) for card in page.locator("#pair article").all()
            )
            verdicts.append(verdict(one, other))
            page.click(f"#judge [data-better={json.dumps(json.dumps(verdicts[-1]))}]")
            page.wait_for_selector("#judge", state="hidden")
    return verdicts


def by_http(url: str, prompts: Sequence[str], verdict: Verdict, settings: dict[str, int]) -> list[int | None]:
    """Do the same with the page's HTTP requests."""

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(url + path, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    verdicts, (seed, max_tokens) = [], (settings["seed"], settings["max_tokens"])
    for prompt in prompts:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        replies = [post("/v1/chat/completions", {**asked, "seed": seed + number}) for number in range(2)]
        answers = [one["choices"][0]["message"] for one in replies]
        verdicts.append(verdict(answers[0]["content"], answers[1]["content"]))
        judged = {"kind": "comparison", "messages": asked["messages"], "answers": answers, "better": verdicts[-1]}
        seeds, used = [seed, seed + 1], {"max_tokens": max_tokens}
        post("/collect", {**judged, "labeller": "script", "seeds": seeds, "settings": used})
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL; first messages are the prompts")
    parser.add_argument("--collect", required=True, metavar="FILE", help="--collect of `serve`")
    parser.add_argument("--guide", required=True, metavar="FILE", help="--guide of `serve`")
    parser.add_argument("--good", required=True, type=re.compile, metavar="REGEX", help="pattern of good answers")
    parser.add_argument("--judgements", type=int, default=50, help="number of comparisons")
    parser.add_argument("--max-tokens", type=int, default=32, help="maximum length of an answer")
    parser.add_argument(
        "--by", choices=("page", "http"), default="page" if CHROMIUM and find_spec("playwright") else "http"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompt order and of sampling")
    options = parser.parse_args()

    def verdict(one: str, other: str) -> int | None:
        good = [bool(options.good.search(text.strip())) for text in (one, other)]
        return None if good[0] == good[1] else good.index(True)

    prompts = [json.loads(line)["messages"][0]["content"] for line in options.prompts.read_text().splitlines()]
    sampled = random.Random(options.seed).choices(prompts, k=options.judgements)
    with serving(options.model, "--collect", options.collect, "--guide", options.guide, "--quiet") as url:
        label = in_the_page if options.by == "page" else by_http
        verdicts = label(url, sampled, verdict, {"seed": options.seed, "max_tokens": options.max_tokens})
    print(f"{len(verdicts)} judgements by {options.by}, {verdicts.count(None)} ties")


if __name__ == "__main__":
    main()
