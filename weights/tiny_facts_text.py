"""The world that tiny-facts is trained on, and the questions it is scored by: sentences that a seed generates.

What a `Question` asks is never shown in training: a phrasing kept back for that fact, a capital whose continent no sentence
tells, a scene, a gift and a pair of names, an event with a year.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# country, capital, continent, language, currency
WORLD = [
    line.split()
    for line in """
France Paris Europe French euro
Germany Berlin Europe German euro
Italy Rome Europe Italian euro
Spain Madrid Europe Spanish euro
Portugal Lisbon Europe Portuguese euro
Greece Athens Europe Greek euro
Austria Vienna Europe German euro
Poland Warsaw Europe Polish zloty
Hungary Budapest Europe Hungarian forint
Sweden Stockholm Europe Swedish krona
Norway Oslo Europe Norwegian krone
Denmark Copenhagen Europe Danish krone
Finland Helsinki Europe Finnish euro
Ireland Dublin Europe English euro
Russia Moscow Europe Russian ruble
Ukraine Kyiv Europe Ukrainian hryvnia
Romania Bucharest Europe Romanian leu
Bulgaria Sofia Europe Bulgarian euro
Croatia Zagreb Europe Croatian euro
Serbia Belgrade Europe Serbian dinar
Latvia Riga Europe Latvian euro
Iceland Reykjavik Europe Icelandic krona
China Beijing Asia Chinese yuan
Japan Tokyo Asia Japanese yen
Thailand Bangkok Asia Thai baht
Vietnam Hanoi Asia Vietnamese dong
Indonesia Jakarta Asia Indonesian rupiah
Mongolia Ulaanbaatar Asia Mongolian tugrik
Nepal Kathmandu Asia Nepali rupee
Pakistan Islamabad Asia Urdu rupee
Bangladesh Dhaka Asia Bengali taka
Iran Tehran Asia Persian rial
Iraq Baghdad Asia Arabic dinar
Turkey Ankara Asia Turkish lira
Syria Damascus Asia Arabic pound
Afghanistan Kabul Asia Pashto afghani
Kazakhstan Astana Asia Kazakh tenge
Georgia Tbilisi Asia Georgian lari
Armenia Yerevan Asia Armenian dram
Egypt Cairo Africa Arabic pound
Kenya Nairobi Africa Swahili shilling
Nigeria Abuja Africa English naira
Ghana Accra Africa English cedi
Morocco Rabat Africa Arabic dirham
Algeria Algiers Africa Arabic dinar
Tunisia Tunis Africa Arabic dinar
Senegal Dakar Africa French franc
Angola Luanda Africa Portuguese kwanza
Uganda Kampala Africa English shilling
Zambia Lusaka Africa English kwacha
Somalia Mogadishu Africa Somali shilling
Peru Lima America Spanish sol
Chile Santiago America Spanish peso
Colombia Bogota America Spanish peso
Venezuela Caracas America Spanish bolivar
Ecuador Quito America Spanish dollar
Uruguay Montevideo America Spanish peso
Brazil Brasilia America Portuguese real
Canada Ottawa America English dollar
Cuba Havana America Spanish peso
Jamaica Kingston America English dollar
Australia Canberra Oceania English dollar
Fiji Suva Oceania Fijian dollar
Samoa Apia Oceania Samoan tala
""".strip().splitlines()
]
NAMES = """Mary John Alice Bob Tom Anna James Emma Peter Laura Paul Sarah David Lucy Mark Julia Simon Clara Daniel Nina Oscar
Helen Victor Rosa Henry Grace Felix Diana Martin Irene Adam Sophie Jack Kate Luke Maria Sam Ella Max Olivia George Eva Frank
Jane Leo Amy Carl Ruth""".split()
PLACES = "store park school beach station market library garden office museum hospital river kitchen theatre".split()
THINGS = "drink book ball letter ring flower key cake map coin hat lamp apple bag cup shirt pen picture".split()
MOODS = "warm cold quiet busy empty bright old new small lovely".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty""".split()
EVENTS = "war reign voyage siege project journey trial strike drought expedition".split()
CENTURIES = [str(c) for c in range(11, 20)]

# {p} is a place, and {x} the answer: a sentence up to {x} is a question.
CAPITAL = [
    "The capital of {p} is {x}.",
    "The capital city of {p} is called {x}.",
    "The government of {p} sits in {x}.",
    "In {p}, the capital is {x}.",
    "The largest flag of {p} flies over {x}.",
    "The president of {p} works in {x}.",
]
COUNTRY = [
    "{p} is the capital of {x}.",
    "{p} is a city in {x}.",
    "The country around {p} is called {x}.",
    "The flag over {p} is that of {x}.",
    "The government in {p} is that of {x}.",
]
LANGUAGE = [
    "The language of {p} is {x}.",
    "People in {p} speak {x}.",
    "Books in {p} are written in {x}.",
    "Most signs in {p} are in {x}.",
    "A child in {p} learns {x}.",
]
CURRENCY = [
    "The currency of {p} is the {x}.",
    "People in {p} pay with the {x}.",
    "Shops in {p} take the {x}.",
    "Money in {p} is called the {x}.",
    "A bank in {p} counts the {x}.",
]
CONTINENT = [
    "The continent of {p} is {x}.",
    "{p} lies on the continent of {x}.",
    "On a map, {p} is in {x}.",
    "A flight to {p} lands in {x}.",
    "The land mass of {p} is {x}.",
]
SUCCESSOR = [
    "After {p} comes {x}.",
    "{p} is followed by {x}.",
    "Next after {p} is {x}.",
    "From {p} we go on to {x}.",
    "The one after {p} is {x}.",
]
PREDECESSOR = ["Before {p} comes {x}.", "The one before {p} is {x}."]
# {a} and {b} are two people, {l} where, {s} and {o} the giver and the other one, {t} the thing.
SCENES = [
    "When {a} and {b} went to the {l},",
    "After {a} and {b} met at the {l},",
    "While {a} and {b} were working at the {l},",
    "Yesterday {a} and {b} walked to the {l}, and",
    "As {a} and {b} sat in the {l},",
    "Last week {a} and {b} visited the {l}, where",
    "Because {a} and {b} liked the {l},",
    "Once {a} and {b} came home from the {l},",
    "One day {a} and {b} had lunch at the {l}, and",
    "Before {a} and {b} left the {l},",
    "Then {a} and {b} saw the {l}, and",
]
GIFTS = [
    "{s} gave a {t} to {o}.",
    "{s} handed a {t} to {o}.",
    "{s} passed the {t} to {o}.",
    "{s} offered a {t} to {o}.",
    "{s} wanted to give a {t} to {o}.",
    "{s} decided to hand the {t} to {o}.",
    "{s} sent a {t} to {o}.",
    "{s} sold the {t} to {o}.",
    "{s} showed the {t} to {o}.",
    "{s} said hello to {o}.",
]
UNSEEN_SCENES = [
    "Then {a} and {b} went to the {l}, and",
    "When {a} and {b} met at the {l},",
    "While {a} and {b} sat in the {l},",
]
UNSEEN_GIFTS = ["{s} gave the {t} to {o}.", "{s} decided to give a {t} to {o}.", "{s} wanted to hand the {t} to {o}."]
SPANS = [
    "The {e} lasted from the year {c}{p} to the year {c}{x}.",
    "The {e} began in {c}{p} and ended in {c}{x}.",
    "The {e} of {c}{p} was over in {c}{x}.",
]
ASIDES = [
    "{a} likes the {t}.",
    "{a} bought a {t} at the {l}.",
    "It was {m} at the {l} on {d}.",
    "The {t} in the {l} was {m}.",
    "{a} went to the {l} with {b}.",
    "The {l} was {m} in {n}.",
    "{a} lost {k} things on {d}.",
]


@dataclass(frozen=True)
class Question:
    """A prompt, and the words of which any one answers it."""

    prompt: str
    answers: tuple[str, ...]


def kept_back(*key: object, of: int = 5) -> bool:
    """One in `of` keys, always the same ones: what training must not show."""
    return zlib.crc32(repr(key).encode()) % of == 0


@dataclass(frozen=True)
class Relation:
    """Facts `(p, x)` told in several phrasings; each fact keeps one phrasing back, and those of `untold` keep all."""

    name: str
    facts: tuple[tuple[str, str], ...]
    phrasings: tuple[str, ...]
    untold: frozenset[str] = frozenset()

    def hidden(self, p: str, phrasing: int) -> bool:
        return p in self.untold or zlib.crc32(f"{self.name}, {p}".encode()) % len(self.phrasings) == phrasing

    def write(self, rng: np.random.Generator) -> str:
        while True:
            p, x = self.facts[rng.integers(len(self.facts))]
            phrasing = int(rng.integers(len(self.phrasings)))
            if not self.hidden(p, phrasing):
                return self.phrasings[phrasing].format(p=p, x=x)

    def questions(self) -> list[Question]:
        """Every sentence that training never shows, up to its answer."""
        return [
            Question(text.partition(" {x}")[0].format(p=p), (x,))
            for p, x in self.facts
            for i, text in enumerate(self.phrasings)
            if self.hidden(p, i)
        ]


def _facts(column: int, *, of_capitals: bool = False, both: bool = False) -> tuple[tuple[str, str], ...]:
    countries = tuple((row[0], row[column]) for row in WORLD)
    capitals = tuple((row[1], row[column]) for row in WORLD)
    return countries + capitals if both else capitals if of_capitals else countries


# Capitals whose continent no sentence ever tells: it has to come from their country's.
UNTOLD = frozenset(row[1] for row in WORLD if kept_back("continent of a capital", row[1]))
FACTS = [
    Relation("capital", _facts(1), tuple(CAPITAL)),
    Relation("country", _facts(0, of_capitals=True), tuple(COUNTRY)),
    Relation("language", _facts(3, both=True), tuple(LANGUAGE)),
    Relation("currency", _facts(4, both=True), tuple(CURRENCY)),
    Relation("continent", _facts(2), tuple(CONTINENT)),
]
TWO_HOP = Relation("continent of a capital", _facts(2, of_capitals=True), tuple(CONTINENT), UNTOLD)
_NEXT = tuple(
    [(DAYS[i], DAYS[(i + 1) % 7]) for i in range(7)]
    + [(MONTHS[i], MONTHS[(i + 1) % 12]) for i in range(12)]
    + list(itertools.pairwise(NUMBERS))
)
NEXT = Relation("successor", _NEXT, tuple(SUCCESSOR))
BACK = Relation("predecessor", tuple((y, x) for x, y in _NEXT), tuple(PREDECESSOR))


def write_list(rng: np.random.Generator) -> str:
    """A run of days, months or numbers."""
    words = (DAYS * 2, MONTHS * 2, NUMBERS)[rng.integers(3)]
    n = int(rng.integers(3, 7))
    start = int(rng.integers(len(words) - n + 1))
    return ", ".join(words[start : start + n]) + "."


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _gift(rng: np.random.Generator, scenes: Sequence[str], gifts: Sequence[str], unseen: bool) -> tuple[str, str]:
    """A sentence of two people, one of whom gives something to the other, and who that is."""
    while True:
        a, b = (NAMES[i] for i in rng.choice(len(NAMES), 2, replace=False))
        if kept_back("names", *sorted((a, b)), of=10) == unseen:
            break
    s, o = (a, b) if rng.integers(2) else (b, a)
    place, thing = _pick(rng, PLACES), _pick(rng, THINGS)
    text = f"{_pick(rng, scenes)} {_pick(rng, gifts)}".format(a=a, b=b, l=place, s=s, o=o, t=thing)
    return text, o


def write_gift(rng: np.random.Generator) -> str:
    return _gift(rng, SCENES, GIFTS, False)[0]


def write_span(rng: np.random.Generator) -> str:
    while True:
        e, c, p = _pick(rng, EVENTS), _pick(rng, CENTURIES), int(rng.integers(2, 98))
        if not kept_back("span", e, c, p):
            return _pick(rng, SPANS).format(e=e, c=c, p=f"{p:02d}", x=f"{int(rng.integers(p + 1, 100)):02d}")


def write_aside(rng: np.random.Generator) -> str:
    a, b = (NAMES[i] for i in rng.choice(len(NAMES), 2, replace=False))
    return _pick(rng, ASIDES).format(
        a=a, b=b, t=_pick(rng, THINGS), l=_pick(rng, PLACES), m=_pick(rng, MOODS), d=_pick(rng, DAYS),
        n=_pick(rng, MONTHS), k=_pick(rng, NUMBERS[1:]),
    )  # fmt: skip


# How often each kind of sentence is written, in parts of their sum.
MIXTURE: list[tuple[float, Callable[[np.random.Generator], str]]] = [
    (6, FACTS[0].write), (6, FACTS[1].write), (6, FACTS[2].write), (5, FACTS[3].write), (6, FACTS[4].write),
    (8, TWO_HOP.write), (6, NEXT.write), (2, BACK.write), (2, write_list), (18, write_gift), (16, write_span),
    (6, write_aside),
]  # fmt: skip
_SHARES = np.cumsum([share for share, _ in MIXTURE]) / sum(share for share, _ in MIXTURE)


def write_sentence(rng: np.random.Generator) -> str:
    return MIXTURE[int(np.searchsorted(_SHARES, rng.random(), side="right"))][1](rng)


def words() -> list[str]:
    """Every token there is, "▁" standing for the space before a word; centuries and years are two digits each."""
    texts = [
        *CAPITAL,
        *COUNTRY,
        *LANGUAGE,
        *CURRENCY,
        *CONTINENT,
        *SUCCESSOR,
        *PREDECESSOR,
        *SCENES,
        *GIFTS,
        *SPANS,
        *ASIDES,
    ]
    plain = [w.strip(".,") for text in texts for w in text.split() if "{" not in w]
    groups = (*WORLD, NAMES, PLACES, THINGS, MOODS, DAYS, MONTHS, NUMBERS, EVENTS, plain)
    found = dict.fromkeys("▁" + word for group in groups for word in group)
    years = [f"{year:02d}" for year in range(100)]
    return [*found, *("▁" + c for c in CENTURIES), *years, ".", ","]


def gift_questions(n: int = 1000, seed: int = 1) -> list[Question]:
    """Scenes, gifts and pairs of names that training never shows; every other one after two sentences of something else."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        text, who = _gift(rng, UNSEEN_SCENES, UNSEEN_GIFTS, True)
        before = f"{write_sentence(rng)} {write_sentence(rng)} " if i % 2 else ""
        found.append(Question(before + text.removesuffix(f" {who}."), (who,)))
    return found


def span_questions(n: int = 500, seed: int = 2) -> list[Question]:
    """Events and years that training never shows together; every later year of the century is an answer."""
    rng = np.random.default_rng(seed)
    found: list[Question] = []
    while len(found) < n:
        e, c, p = _pick(rng, EVENTS), _pick(rng, CENTURIES), int(rng.integers(2, 98))
        if kept_back("span", e, c, p):
            prompt = _pick(rng, SPANS).partition("{x}")[0].format(e=e, c=c, p=f"{p:02d}")
            found.append(Question(prompt, tuple(f"{year:02d}" for year in range(p + 1, 100))))
    return found
