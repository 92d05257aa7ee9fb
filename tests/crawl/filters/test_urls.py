"""Blocklists in their usual formats, and the URLs that they match."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest

from llmkit.crawl.filters.urls import UrlFilter, UrlRules
from llmkit.errors import UserError

NOTHING = UrlRules(own_blocklist=False)
GAMBLING = [
    *("https://casino.example/", "http://www.casino.example", "https://play.now.casino.example/x?y#z"),
    *("HTTPS://Casino.EXAMPLE:8443/x", "https://user:secret@casino.example/", "casino.example", "//casino.example./x"),
    *("https://slots.example/", "https://bücher.example/", "https://xn--bcher-kva.example/", "http://203.0.113.9/x"),
    "http://3405803785/",  # the same address as a single number
]
HARMLESS = [
    *("http://blog.example/casinos-of-old", "http://blog.example/", "http://notcasino.example/", "http://example/"),
    *("http://casino.example.org/", "http://9.203.0.113.9/", "http://elsewhere.example/?to=https://casino.example/"),
    *("", None, "http://[::1/", "not a url at all", "http://" + "a." * 100_000, "http://x.example/" + "a/" * 100_000),
    "\x00\ud800://%ff%fe",
]


@pytest.fixture
def ut1(tmp_path: Path) -> Path:
    folder = tmp_path / "ut1"
    (folder / "gambling").mkdir(parents=True)
    (folder / "gambling" / "domains").write_text("casino.example\nbücher.example\n203.0.113.9\nwww.slots.example\n")
    (folder / "gambling" / "urls").write_text("blog.example/casino/\nwww.home.example/~bet?id=7\n")
    (folder / "malware").mkdir()
    (folder / "malware" / "domains.gz").write_bytes(gzip.compress(b"# a comment\nbad.example\ncasino.example\n"))
    (folder / "cc-by.note").write_text("Licence of the list.")
    return folder


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        *((url, "blocked_domain:gambling") for url in GAMBLING),
        ("http://bad.example/", "blocked_domain:malware"),
        ("http://blog.example/casino/", "blocked_url:gambling"),
        ("http://www.blog.example/Casino/page.html", "blocked_url:gambling"),
        ("http://blog.example/%63asino?x=1", "blocked_url:gambling"),
        ("http://home.example/~bet?id=7&x", "blocked_url:gambling"),
        *((url, None) for url in HARMLESS),
    ],
)
def test_a_url_matches_the_list(ut1: Path, url: str | None, reason: str | None) -> None:
    filter = UrlFilter([ut1], NOTHING)
    assert filter.reason(url) == pickle.loads(pickle.dumps(filter)).reason(url) == reason


def test_a_hosts_file_plain_or_gzipped(tmp_path: Path) -> None:
    text = (
        "# ads\r\n127.0.0.1 localhost\r\n::1 localhost ip6-localhost\r\n"
        "0.0.0.0 ads.example www.track.example # both\r\n0.0.0.0\tTABS.example\r\n"
        "\r\nplain.example\r\npages.example/ad/\r\n"
    )
    (tmp_path / "ads").write_text(text)
    (tmp_path / "ads2.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "ads.csv").write_text(text)  # a list, not a table, despite its name
    for name, category in (("ads", "ads"), ("ads2.gz", "ads2"), ("ads.csv", "ads.csv")):
        filter = UrlFilter([tmp_path / name], NOTHING)
        for host in ("ads.example", "x.ads.example", "track.example", "tabs.example", "plain.example"):
            assert filter.reason(f"https://{host}/x") == f"blocked_domain:{category}"
        assert filter.reason("https://pages.example/ad/1") == f"blocked_url:{category}"
        for host in ("localhost", "example", "pages.example", "0.0.0.0"):
            assert filter.reason(f"https://{host}/x") is None


def test_an_invalid_list_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "prose").write_text("fine.example\nThis is no list of domains.\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a.example\n" * 1000)[:-20])
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text("# nothing\n\n")
    (tmp_path / "words").write_text("casino\n*.wild.example\n||blocked.example^\n")
    (tmp_path / "hollow" / "adult").mkdir(parents=True)
    (tmp_path / "hollow" / "adult" / "domains").touch()
    for name, message in (
        ("prose", "prose:2: expected a domain, a URL or a hosts entry"),
        ("cut.gz", "cut.gz: damaged or truncated gzip"),
        ("picture", "found binary data"),
        ("missing", "missing: expected a readable file"),
        ("empty", "empty: expected a blocklist, or a folder with"),
        ("blank", "blank: expected domains or URLs, one per line, found none"),
        ("words", "words: expected domains or URLs, one per line, found none"),
        ("hollow", "hollow: expected domains or URLs, one per line, found none"),
        ("mis/sing", "mis/sing: expected a readable file: no such file or directory$"),
    ):
        with pytest.raises(UserError, match=message) as error:
            UrlFilter([tmp_path / name], NOTHING)
        assert "\n" not in str(error.value)


def test_lines_that_meet_no_address_are_counted(tmp_path: Path, ut1: Path, capsys) -> None:
    (tmp_path / "mixed").write_text(
        "127.0.0.1 localhost\ngood.example\ncasino\n*.wild.example\n||a.example^/x\n[::1]\nasked.example?x=1\n"
    )
    with (ut1 / "gambling" / "domains").open("a") as handle:
        handle.write("poker\n")
    filter = UrlFilter([tmp_path / "mixed", ut1], NOTHING, quiet=False)
    assert filter.reason("http://good.example/") == "blocked_domain:mixed" == filter.reason("http://[::1]/")
    assert filter.reason("http://asked.example/") == "blocked_domain:mixed"
    told = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    ends = "ignored 3 lines without a domain or URL", "ignored 1 line without a domain or URL"
    assert told == [f"{tmp_path}/mixed: {ends[0]}", f"{ut1}/gambling/domains: {ends[1]}"]


def test_words_alone_and_in_twos() -> None:
    rules = UrlRules(own_blocklist=False, banned_words=("Forbidden",), soft_banned_words=("red", "blue", "green"))
    filter = UrlFilter([], rules)
    assert filter.reason("https://a.example/a-forbidden_page") == "banned_word:custom"
    assert filter.reason("https://a.example/unforbidden") is None
    assert filter.reason("https://red.example/x") is None
    assert filter.reason("https://red.example/red/RED") is None
    assert filter.reason("https://red.example/%62lue.html") == "soft_banned_words:custom"
    three = UrlFilter([], UrlRules(False, (), ("red", "blue", "green"), 3))
    assert three.reason("https://red.example/blue") is None
    assert three.reason("https://red.example/blue?green") == "soft_banned_words:custom"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://www.pornhub.com/view?x=1", "blocked_domain:adult"),
        ("https://de.xhamster.com/", "blocked_domain:adult"),
        ("https://anything.xxx/", "blocked_domain:adult"),
        ("https://host.example/free-porn/7", "banned_word:adult"),
        ("https://host.example/naked-babes", "soft_banned_words:adult"),
        ("https://host.example/buy/viagra-cialis", "soft_banned_words:drugs"),
        ("https://host.example/casino-bonus", "soft_banned_words:gambling"),
        ("https://www.essex.example/analysis/cockpit-of-the-sussex-express", None),
        ("https://scunthorpe.example/cum-laude/middlesex-titles", None),
        ("https://school.example/sex-education", None),
        ("https://cars.example/ford-escort-1985", None),
        ("https://sports.example/super-bowl-xxx", None),
        ("https://health.example/viagra-side-effects", None),
        ("https://news.example/las-vegas-casino-fire", None),
        ("https://museum.example/naked-mole-rat", None),
        ("https://dictionary.example/wordpress/pornic-france", None),
    ],
)
def test_our_own_list_is_careful(url: str, kind: str | None) -> None:
    assert UrlFilter().reason(url) == kind


@pytest.mark.shared
def test_every_entry_of_real_lists_is_found_and_nothing_else(shared_data: Path) -> None:
    """121,000 domains and 20,000 URLs with 10 bytes each."""
    lists = shared_data / "web" / "blocklists"
    hosts = sorted((lists / "hosts").iterdir())
    filter = UrlFilter([lists / "ut1", *hosts], NOTHING)
    assert len(pickle.dumps(filter)) < 12 * 141_000
    domains = (lists / "ut1" / "gambling" / "domains").read_text().split()
    assert all(filter.reason(f"https://www.{domain}/") for domain in domains[::50])
    with gzip.open(lists / "ut1" / "malware" / "urls.gz", "rt", encoding="utf-8") as lines:
        assert all(filter.reason(f"https://{line.strip()}") for line in list(lines)[::100])
    assert not any(filter.reason(f"https://{domain.replace('.', '-')}.example.org/") for domain in domains[::50])
