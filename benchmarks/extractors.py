"""Our extractors compared with others on the same pages of WARC files: pages per CPU second.

    pip install trafilatura lxml_html_clean    # optional: another row
    python benchmarks/extractors.py crawl/*.warc.gz --pages 250 --rounds 5

All take turns in one process on one thread, from the bytes of a page to its main text, charset detection included.
Ratios are medians over the rounds, of CPU seconds, so that other load on the machine matters little.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from llmkit.crawl.extract.main_text import Extractor
from llmkit.crawl.extract.markup import utf8_html
from llmkit.crawl.page import Page
from llmkit.crawl.read.frames import Reader
from llmkit.crawl.read.pages import page_of
from llmkit.errors import UserError


def contenders() -> dict[str, Callable[[Page], object]]:
    """Return the extractors to time, by name; ours first."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    def bare_resiliparse(page: Page) -> str:
        tree = HTMLTree.parse_from_bytes(utf8_html(page.html or b"", page.content_type), "utf-8")
        return extract_plain_text(tree, main_content=True)

    def of(name: str) -> Callable[[Page], object]:
        extractor = Extractor(name)
        return lambda page: extractor.extract(page.html or b"", page.content_type, page.url)

    found = {"llmkit, model": of("model"), "llmkit, fast": of("fast"), "resiliparse": bare_resiliparse}
    try:
        found["trafilatura"] = of("trafilatura")
    except UserError as error:
        print(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", metavar="WARC")
    parser.add_argument("--pages", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pages = [page for page in map(page_of, Reader(options.archives)) if isinstance(page, Page) and page.html]
    pages = random.Random(0).sample(pages, min(options.pages, len(pages)))
    timed = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(options.rounds + 1):  # the first round loads the models
        for name, extract in timed.items():
            start = time.process_time()
            for page in pages:
                extract(page)
            if number:
                seconds[name].append(time.process_time() - start)
    ours = seconds["llmkit, model"]
    print(f"{len(pages)} pages, {options.rounds} rounds\n")
    print("| | pages/CPU s | speed of llmkit's model to it |\n|---|--:|--:|")
    for name, theirs in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"| {name} | {len(pages) / statistics.median(theirs):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
