"""Web pages and WARC files for tests: prose that the filters keep, and pages that each step drops."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

SENTENCES = """
The ferry left the harbour a little before seven, and most of the passengers were still asleep on the benches.
A good compost heap needs air, so turn it with a fork every second week during the summer.
My grandfather kept his letters in a biscuit tin that smelled of tobacco and old coins.
Copper pans heat quickly, which is why so many pastry cooks will not work with anything else.
The council voted to repair the bridge, but nobody could say where the money would come from.
In the dry months the river shrinks to a chain of pools where herons stand all day.
She learned to repair bicycles by taking her own apart and finding two screws left over.
The museum owns a map from 1612 on which half of the coast is drawn from rumour.
When the bread comes out of the oven, tap its base and listen for a hollow sound.
Nobody had told the new teacher that the bell rang twice on Fridays.
The telescope was built by three amateurs who ground the mirror in a garage over one winter.
If the soil is heavy clay, dig in sand before you plant the bulbs.
He wrote the first chapter on a train and lost it in the station at Basel.
The old mill still turns once a year, when the whole village comes to see it.
A wool blanket dries best in the shade, laid flat over two lines.
The lighthouse keeper wrote down every ship that passed, even those that did not answer him.
Our guide carried a thermos of tea and a rope that he hoped not to use.
The theatre closed in spring because the roof let in more water than the stage could bear.
You can tell the age of a hedge by counting the kinds of shrub in thirty paces.
The clock in the square is four minutes late, and people here have agreed to live by it.
On the second day we met a shepherd who asked for news of the city and little else.
The recipe calls for saffron, although turmeric will give the colour for a fraction of the price.
After the flood the school moved into the town hall, where lessons went on between weddings.
Bees will leave a hive that smells of paint, so let new wood stand outside for a month.
The choir practised in a cold church and sang much faster than the composer had wished.
Engineers measured the crack each morning and found that it opened when the sun came round.
Her shop sells buttons, and only buttons, from a cabinet with nine hundred drawers.
The path climbs through beech woods and comes out above a quarry full of green water.
They painted the boat in the colours of a football club that none of them supported.
Snow fell early that year and caught the apples before anyone had picked them.
A violin left in a warm room will speak differently by the evening.
The baker gave the children the broken biscuits, and so some biscuits were broken on purpose.
Before the railway came, salt was carried over this pass on the backs of mules.
The editor crossed out the last paragraph and said that the story had ended earlier.
To keep herbs fresh, stand them in water as you would with flowers.
A stone with a hole in it hangs over the door to keep the cows from sickness.
Our neighbour predicted the weather from the height at which the swallows flew.
The court heard that the painting had hung upside down for eleven years.
Sharpen the chisel first; nearly every accident in the workshop begins with a blunt edge.
The last speaker of the dialect was a woman who talked to her hens in it.
""".strip().split("\n")


def prose(seed: int, sentences: int = 16) -> list[str]:
    """Return English paragraphs of four sentences each; different seeds have little in common."""
    chosen = random.Random(seed).sample(SENTENCES, sentences)
    chosen = [sentence.replace(" a ", f" a {WORDS[(seed + at) % len(WORDS)]} ") for at, sentence in enumerate(chosen)]
    return [" ".join(chosen[start : start + 4]) for start in range(0, sentences, 4)]


WORDS = tuple("small grey quiet famous second old distant broken silver cheerful forgotten".split())  # noqa: SIM905


def html(title: str, paragraphs: Iterable[str], extra: str = "") -> str:
    """Return a typical page: menu, article, footer."""
    menu = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in ("Home", "News", "Archive", "About us"))
    body = "".join(f"<p>{paragraph}</p>\n" for paragraph in paragraphs)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        f'<nav class="menu"><ul>{menu}</ul></nav><article class="post"><h1>{title}</h1>\n{body}{extra}</article>'
        '<footer class="footer"><a href="/imprint">Imprint</a> <a href="/contact">Contact</a></footer></body></html>'
    )


@dataclass
class Record:
    """A record for an archive."""

    url: str
    body: str | bytes
    content_type: str = "text/html; charset=utf-8"
    status: str = "200 OK"
    kind: str = "response"


def write_warc(path: Path, records: Iterable[Record]) -> Path:
    """Write a compressed archive that starts with a warcinfo record; ids and dates depend only on the position."""
    with open(path, "wb") as handle:
        writer = WARCWriter(handle, gzip=True)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "tests"}))
        for number, record in enumerate(records):
            name = f"<urn:uuid:{path.name.split('.')[0]}-{number}>"
            fields = {"WARC-Record-ID": name, "WARC-Date": "2026-01-01T00:00:00Z"}
            body = record.body.encode() if isinstance(record.body, str) else record.body
            http = StatusAndHeaders(record.status, [("Content-Type", record.content_type)], protocol="HTTP/1.1")
            headers = {"http_headers": http} if record.kind == "response" else {}
            payload = io.BytesIO(body)
            one = writer.create_warc_record(record.url, record.kind, payload, warc_headers_dict=fields, **headers)
            writer.write_record(one)
    return path


GERMAN = [
    "Der Zug hielt an einem kleinen Bahnhof, an dem seit Jahren niemand mehr ausgestiegen war.",
    "Im Garten hinter dem Haus standen drei alte Apfelbäume, die jeden Herbst reichlich trugen.",
    "Die Lehrerin erzählte den Kindern von einer Insel, auf der es keine Uhren gab.",
    "Am Abend saßen wir vor der Hütte und hörten, wie das Wasser über die Steine lief.",
    "Er reparierte das Dach mit Brettern, die er am Strand gefunden hatte.",
    "Niemand wusste, wem das Fahrrad gehörte, das an der Mauer lehnte.",
    "Die Bäckerin öffnete früh, damit die Fischer vor der Ausfahrt noch Brot kaufen konnten.",
    "Nach dem Regen roch die ganze Straße nach Linden und nassem Staub.",
]


def mixed_pages() -> list[Record]:
    """Return pages of which each step drops one or two; the path of the URL names the expected outcome."""
    first = prose(1)
    edited = [first[0].replace("the ", "that ", 1), *first[1:]]
    site = "https://pages.example"
    return [
        Record(f"{site}/kept/1", html("On small things", first)),
        Record(f"{site}/read/request", b"GET / HTTP/1.1\r\n\r\n", kind="request"),
        Record(f"{site}/kept/2", html("On more things", prose(2))),
        Record(f"{site}/language/german", html("Am See", [" ".join(GERMAN[:4]), " ".join(GERMAN[4:])])),
        Record(f"{site}/exact_duplicates/1", html("On small things", first)),
        Record(f"{site}/near_duplicates/1", html("On small things", edited)),
        Record(f"{site}/gopher_quality/short", html("Short", [" ".join(SENTENCES[:2])])),
        Record(f"{site}/gopher_repetition/same", html("Again", [prose(3)[0]] * 9)),
        Record(f"{site}/read/pdf", b"%PDF-1.4 nothing to see", content_type="application/pdf"),
        Record(f"{site}/read/gone", html("Gone", prose(4)), status="404 Not Found"),
        Record(f"{site}/c4/lorem", html("Soon", [*prose(5), "Lorem ipsum dolor sit amet, consectetur elit."])),
        Record(f"{site}/c4/curly", html("Code", [*prose(6), "function start() { return the_value_of_it; }"])),
        Record(f"{site}/kept/3", html("Write to us", [*prose(7), "Write to jane.roe@mail.example.com if you know."])),
        Record("http://www.casino.blocked.example/url/1", html("Play", prose(8))),
    ]
