"""The bad pages, a kind for each step of the recipe, and the pages with personal data."""

from __future__ import annotations

import html
import random
from collections.abc import Callable
from dataclasses import replace

from howtos import NUMBERS, THINGS
from pages import Page
from telling import Voice, chatter

SPAM_HOSTS = ("win-big-today.example", "best-pills-4u.example", "free-coins.example")  # in the blocklist
OTHER_LANGUAGES = {
    "de": (
        ("Der Bäcker", "Die Lehrerin", "Unser Nachbar", "Der alte Müller", "Das Kind", "Die Ärztin"),
        ("geht heute auf den Markt", "wartet am Hafen auf das Schiff", "hat gestern gelesen", "kommt nicht nach Hause",
         "sucht seit dem Morgen einen Schlüssel", "möchte ein neues Haus bauen", "kennt hier jeden Weg"),
        ("weil das Wetter schön ist", "und niemand weiß warum", "obwohl es schon spät war", "wenn die Glocke läutet"),
    ),
    "fr": (
        ("Le boulanger", "La maîtresse", "Notre voisin", "Le vieux meunier", "Cet enfant", "La femme du médecin"),
        ("va au marché ce matin", "attend le bateau dans le port", "a lu hier soir", "ne rentre pas à la maison",
         "cherche une clé depuis longtemps", "voudrait construire une maison", "connaît tous les chemins"),
        ("parce qu'il fait beau", "et personne ne sait pourquoi", "bien qu'il soit déjà tard", "quand la cloche sonne"),
    ),
    "es": (
        ("El panadero", "La maestra", "Nuestro vecino", "El viejo molinero", "Aquel niño", "La hija del médico"),
        ("va al mercado esta mañana", "espera el barco en el puerto", "leyó mucho ayer", "no vuelve a casa",
         "busca una llave desde hace tiempo", "quiere construir una casa nueva", "conoce todos los caminos"),
        ("porque hace buen tiempo", "y nadie sabe por qué", "aunque ya era tarde", "cuando suena la campana"),
    ),
}  # fmt: skip
CODE = ("Then write {{ open {name} }} and save it.", "Put {{ {name} }} at the top of the file.",
        "The third line says {{ size {n} }} and no more.", "End with {{ stop at {n} }} on a line alone.")  # fmt: skip
MENU_WORDS = ("Hats", "Coats", "Boots", "Lamps", "Chairs", "Tables", "Plates", "Cups", "Spoons", "Books", "Maps",
              "Clocks", "Rings", "Ropes", "Sails", "Nets", "Tools", "Toys", "Seeds", "Teas")  # fmt: skip
KINDS_OF = ("Old", "New", "Blue", "Warm", "Small", "Heavy", "Cheap", "Fine", "Strong", "Used", "Round", "Plain")
FOR_WHOM = ("for sailors", "of the best", "with a name", "to be worn", "that last", "and a bag", "from the hills",
            "in a box", "for the rain", "have come back")  # fmt: skip
SELLING = ("Win big today with one click and never work again.", "Our pills make you young in seven days.",
           "Free coins for the first hundred visitors.", "Doctors do not want you to know this.",
           "Only today you get two for the price of one.", "Click here before it is too late.")  # fmt: skip


def _prose(sentences: int, rng: random.Random) -> list[str]:
    voice = Voice(rng)
    said = [chatter(voice) for _ in range(sentences)]
    return [" ".join(said[at : at + 4]) for at in range(0, len(said), 4)]


def _article(paragraphs: list[str], title: str) -> str:
    body = "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs)
    head = f"<!doctype html><html><head><title>{title}</title></head>"
    return f"{head}<body><main><h1>{title}</h1>{body}</main></body></html>"


def blocked_host(rng: random.Random) -> str:
    """Return good English for a spam host: only the blocklist catches it."""
    said = _prose(14, rng)
    return _article([rng.choice(SELLING), *said, rng.choice(SELLING)], "A special offer")


def other_language(rng: random.Random) -> str:
    """Return German, French or Spanish."""
    who, does, why = OTHER_LANGUAGES[rng.choice(list(OTHER_LANGUAGES))]
    said = [f"{rng.choice(who)} {rng.choice(does)}, {rng.choice(why)}." for _ in range(14)]
    return _article([" ".join(said[at : at + 4]) for at in range(0, 14, 4)], said[0])


def gibberish(rng: random.Random) -> str:
    """Return random letters that are not words in any language."""
    word = lambda: "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=rng.randint(3, 11)))  # noqa: E731
    said = [" ".join(word() for _ in range(rng.randint(6, 14))).capitalize() + "." for _ in range(14)]
    return _article([" ".join(said[at : at + 3]) for at in range(0, 14, 3)], word())


def repeated(rng: random.Random) -> str:
    """Return a few sentences, repeated."""
    said = _prose(3, rng)
    return _article([" ".join(said) for _ in range(8)], "Again and again")


def too_short(rng: random.Random) -> str:
    """Return three sentences with fewer than fifty words."""
    return _article(_prose(3, rng), "A short note")


def few_sentences(rng: random.Random) -> str:
    """Return more than sixty words in only three sentences."""
    voice = Voice(rng)
    long = lambda: " and ".join(chatter(voice).rstrip(".") for _ in range(3)) + "."  # noqa: E731
    return _article([long(), long(), long()], "In one breath")


def numbers(rng: random.Random) -> str:
    """Return a table of numbers with a few words."""
    row = lambda: " ".join(f"{rng.uniform(0, 999):.2f}" for _ in range(8))  # noqa: E731
    lines = [f"Row {rng.choice(NUMBERS)} of the table: {row()}." for _ in range(14)]
    return _article([*_prose(2, rng), *lines], "Prices and figures")


def lorem_ipsum(rng: random.Random) -> str:
    """Return an English page with placeholder text."""
    filler = "Lorem ipsum dolor sit amet, and the rest of this page will be written next week."
    said = _prose(14, rng)
    return _article([*said[:2], filler, *said[2:]], "Under construction")


def code(rng: random.Random) -> str:
    """Return prose around source code."""
    lines = [rng.choice(CODE).format(n=rng.randint(2, 99), name=rng.choice(MENU_WORDS).lower()) for _ in range(4)]
    said = _prose(16, rng)
    return _article([part for pair in zip(said, [line for line in lines], strict=False) for part in pair],
                    "A program in ten minutes")  # fmt: skip


def link_list(rng: random.Random) -> str:
    """Return only short lines, as in a catalogue."""
    voice = Voice(rng)
    kinds = [f"{voice.pick(KINDS_OF)} {word.lower()} {voice.pick(FOR_WHOM)}" for word in rng.sample(MENU_WORDS, 20)]
    lines = [f"{line}." if number < 7 else line for number, line in enumerate(kinds)]
    return _article(lines, "The catalogue")


# Kind: its function, the steps that may drop it (it is made for the first), and why.
BAD: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...], str]] = {
    "blocked host": (blocked_host, ("url",), "its host is on the blocklist"),
    "other language": (other_language, ("language",), "not English"),
    "gibberish": (gibberish, ("language", "gopher_quality", "gopher_repetition"), "no words of any language"),
    "repetition": (repeated, ("gopher_repetition",), "three sentences eight times over"),
    "too short": (too_short, ("gopher_quality",), "fewer than 50 words"),
    "numbers": (numbers, ("gopher_quality", "gopher_repetition", "language"), "a table of figures"),
    "few sentences": (few_sentences, ("c4",), "three sentences"),
    "placeholder": (lorem_ipsum, ("c4",), "says lorem ipsum"),
    "program": (code, ("c4",), "has curly brackets"),
    "short lines": (link_list, ("fineweb", "gopher_repetition", "c4"), "a catalogue of short lines"),
}


def nearly(page: Page, rng: random.Random) -> Page:
    """Return a near copy of the page, with an additional sentence of chatter and a few changed words."""
    swaps = {"because": "since", "simple": "easy", "quite": "rather", "everybody": "everyone"}
    words = " \n ".join(page.paragraphs).split(" ")
    words = [swaps.get(word, word) for word in words]
    paragraphs = " ".join(words).split(" \n ")
    at = rng.randrange(len(paragraphs))
    paragraphs[at] = f"{paragraphs[at]} {chatter(Voice(rng))}"
    return replace(page, paragraphs=paragraphs)


def personal(page: Page, rng: random.Random) -> tuple[Page, list[str]]:
    """Return the page with an e-mail address and a telephone number, and the strings that must be replaced."""
    who = rng.choice(THINGS).split()[1]
    mail = f"{who}.{rng.choice(MENU_WORDS).lower()}{rng.randrange(99)}@mail.{rng.choice(MENU_WORDS).lower()}-post.org"
    phone = f"+44 20 7946 0{rng.randrange(100, 1000)}"
    line = f"Write to {mail} or call {phone} if you know more about this."
    return replace(page, paragraphs=[*page.paragraphs, line]), [mail, phone]
