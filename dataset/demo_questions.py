"""Composes questions as people type them: a relation's core in a frame, with opening, closing and slips of typing.

A phrasing file holds the cores of each relation, frames_<language>.txt the ways of asking that all relations share. A
whole kind of asking marked "unseen" there enters no training row: the score on it tells what another wording finds.
"""

import random
import re
import zlib
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from dataset.demo_templates import FACTS_DIR, Item, Relation, finish, render

PLAIN, OPENED, CLOSED, SLIPPED, MUDDLED, IN_WORDS = 0.2, 0.2, 0.12, 0.25, 0.1, 0.2  # shares of the questions
ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
FEW = 8  # wordings of a split
DIGITS_ZH = "零一二三四五六七八九"


class Frames(NamedTuple):
    """What all relations of a language share; a kind of asking is (name, letter of its cores, frames)."""

    kinds: list[tuple[str, str, list[str]]]
    unseen: list[tuple[str, str, list[str]]]
    openings: list[str]
    closings: list[str]
    texts: list[str]
    fillers: list[str]
    words: dict[str, list[str]]


@cache
def read_frames(language: str) -> Frames:
    """The frames of dataset/facts/frames_<language>.txt."""
    sections: dict[str, list[str]] = {}
    for line in (FACTS_DIR / f"frames_{language}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            frames = sections[line[1:-1]] = []
        elif line and not line.startswith("#"):
            frames.append(line)
    shared = [sections.pop(name, []) for name in ("opening", "closing", "text", "filler")]
    lists = dict(line.split(" ", 1) for line in sections.pop("words", []))
    words = {name: words.split(", ") for name, words in lists.items()}
    kinds = [(*header.rsplit(" ", 1), frames) for header, frames in sections.items()]
    seen, unseen = ([kind for kind in kinds if kind[0].startswith("unseen ") == new] for new in (False, True))
    return Frames(seen, unseen, *shared, words)


def framed(core: str, frame: str) -> str:
    """A core in a frame; a topic's core is the word for what is asked, or "subject | word"."""
    subject, bar, word = core.rpartition(" | ")
    return frame.replace("{q}", core).replace("{s}", subject if bar else "{s}").replace("{w}", word)


NO_WORDING = re.compile(r"[^\w{}+×]")


def bare(template: str) -> str:
    """The wording alone, without marks, spaces and capitals."""
    return NO_WORDING.sub("", template).lower()


def is_kept_out(template: str) -> bool:
    """Whether training never sees this wording: one in eight, whatever its marks."""
    return zlib.crc32(bare(template).encode()) % 8 == 0


@cache
def all_ways(relation: Relation) -> list[tuple[int, list[str], list[str]]]:
    """Of each kind of asking: its cores, its wordings for training, those that are kept out."""
    kinds = []
    for _, letter, frames in [*read_frames(relation.language).kinds, ("whole", "Q", ["{q}"])]:
        split: tuple[list[str], list[str]] = ([], [])
        for core in relation.cores.get(letter, ()):
            for frame in frames:
                wording = framed(core, frame)
                split[is_kept_out(wording)].append(wording)
        kinds.append((len(relation.cores.get(letter, ())), *split))
    return kinds


@cache
def ways_of_asking(relation: Relation, held_out: bool) -> tuple[list[str], list[float]]:
    """All wordings of one split with their cumulative weights: a kind of asking comes up by the number of its cores.

    Held out are the wordings that are kept out of training, and H lines where a relation has few (small talk).
    """
    templates: list[str] = []
    weights: list[float] = []
    for cores, *split in all_ways(relation):
        kind = split[held_out]
        templates += kind
        weights += [cores / max(len(kind), 1)] * len(kind)
    if held_out and len(templates) < FEW:
        templates += relation.held_out
        weights += [1] * len(relation.held_out)
    return templates, list(accumulate(weights))


def ask(item: Item, rng: random.Random, *, held_out: bool = False) -> str:
    """A question for the item as somebody might type it, in a wording of the training rows or in a held-out one.

    A fifth of the training questions is plain: so a fact is learned soon, and the ways of asking from the others.
    """
    plain, (templates, cumulative) = plain_ways(item.relation), ways_of_asking(item.relation, held_out)
    while True:
        if plain and not held_out and rng.random() < PLAIN:
            question = finish(rng.choice(plain).format(**item.slots), item.relation.language)
        else:
            question = dress(fill(*rng.choices(templates, cum_weights=cumulative), item, rng), item, rng)
        if not gives_away(question, item.answer):
            return question


def gives_away(question: str, answer: str) -> bool:
    """Whether a question happens to have the answer among its words ("I forgot the past tense of forget")."""
    if answer.casefold() not in question.casefold():
        return False
    if not answer.isascii():
        return len(answer) > 1
    flags = re.IGNORECASE if len(answer) > 2 else 0
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])", question, flags) is not None


@cache
def plain_ways(relation: Relation) -> list[str]:
    """The first cores of a relation in the first frame of their kind."""
    first = {letter: frames[0] for _, letter, frames in reversed(read_frames(relation.language).kinds)}
    plain = [
        framed(core, first[letter])
        for letter in "DIN"
        for core in relation.cores.get(letter, ())[:2]
        if letter in first
    ]
    trained = set(ways_of_asking(relation, held_out=False)[0])
    return [text for text in plain if text in trained]


def ask_unseen(item: Item, rng: random.Random) -> tuple[str, str]:
    """(kind, question) in a kind of asking, or in a wording of its own (H), that no training row has."""
    cores = item.relation.cores | {"H": item.relation.held_out}
    kinds = [*read_frames(item.relation.language).unseen, ("unseen wording", "H", ["{q}"])]
    name, letter, frames = rng.choice([kind for kind in kinds if cores.get(kind[1])])
    question = fill(framed(rng.choice(cores[letter]), rng.choice(frames)), item, rng)
    return name.removeprefix("unseen "), finish(question, item.relation.language)


def fill(template: str, item: Item, rng: random.Random) -> str:
    """The slots filled; the numbers of a sum or product sometimes in words."""
    slots = item.slots
    if "x" in slots and not re.search("[+×=*]", template) and rng.random() < IN_WORDS:
        slots = slots | {name: number_in_words(int(slots[name]), item.relation.language) for name in "xy"}
    return with_words(template, item.relation.language, rng).format(**slots)


def with_words(text: str, language: str, rng: random.Random) -> str:
    """A random word of its list for every <list>."""
    return re.sub("<([a-z]+)>", lambda match: rng.choice(read_frames(language).words[match[1]]), text)


def tell(text: str, item: Item, rng: random.Random) -> str:
    """A sentence of running text that tells the item, sometimes with words of introduction."""
    return rng.choice(read_frames(item.relation.language).texts).replace("{q}", render(text, item))


def dress(question: str, item: Item, rng: random.Random) -> str:
    """Opening, closing and slips of typing around a question, each in a share of the cases."""
    language = item.relation.language
    if item.relation.name.startswith("chat."):
        return slip(question, item, rng) if rng.random() < SLIPPED else question
    frames, space = read_frames(language), " " if language == "en" else ""

    def one_of(texts: list[str]) -> str:
        while True:
            text = with_words(rng.choice(texts), language, rng)
            if item.answer.casefold() not in text.casefold():
                return text

    if rng.random() < OPENED:
        opening = one_of(frames.openings)
        keep = opening[-1] in ".!?" or question.startswith(("I ", "I'", "US ", *item.slots.values()))
        question = opening + space + (question if keep else question[0].lower() + question[1:])
    if question[-1] in ".?!。？！" and rng.random() < CLOSED:
        question += space + one_of(frames.closings)
    if rng.random() < MUDDLED:
        question = muddle(question, item, rng)
    question = finish(question, language)
    return slip(question, item, rng) if rng.random() < SLIPPED else question


def muddle(question: str, item: Item, rng: random.Random) -> str:
    """A question as it is spoken: a filler somewhere, or a small word left out, never in the subject."""
    subjects = [match.span() for value in item.slots.values() for match in re.finditer(re.escape(value), question)]
    gaps = r"(?<=\w) (?=\w)" if item.relation.language == "en" else r"(?<=[^\W\d])(?=[^\W\d])"
    spots = [m.start() for m in re.finditer(gaps, question) if not any(a < m.start() < b for a, b in subjects)]
    if not spots:
        return question
    at = rng.choice(spots)
    if rng.random() < 0.6:
        return question[:at] + rng.choice(read_frames(item.relation.language).fillers) + question[at:]
    if item.relation.language == "zh":
        return question[:at] + question[at + 1 :] if not any(a <= at < b for a, b in subjects) else question
    rest = re.sub(r"^ [a-z']{1,5}(?= )", "", question[at:])
    return question if any(a <= at + 1 < b for a, b in subjects) else question[:at] + rest


def slip(question: str, item: Item, rng: random.Random) -> str:
    """A question typed carelessly: marks missing or doubled, English without capitals or with a mistyped word."""
    choice = rng.random()
    if choice < 0.4:
        return question.rstrip(".?!。？！")
    if choice < 0.5:
        return question + question[-1] * rng.randint(1, 2) if question[-1] in "?!？！" else question
    if item.relation.language == "zh":
        if choice < 0.75:
            return question.translate(str.maketrans("？，！", "?,!"))
        return re.sub("[，：]", " ", question) if choice < 0.9 else question.replace("，", "")
    if choice < 0.8:
        return question.lower()
    protected = {word.lower() for value in item.slots.values() for word in re.findall(r"\w+", value)}
    spots = [word for word in re.finditer(r"[a-z]{5,}", question) if word[0] not in protected]
    if not spots:
        return question
    word = rng.choice(spots)
    return question[: word.start()] + mistyped(word[0], rng) + question[word.end() :]


def mistyped(word: str, rng: random.Random) -> str:
    """A word with two neighbouring letters exchanged, or one missing or doubled; its first letter stays."""
    at = rng.randrange(1, len(word) - 1)
    middle = rng.choice((word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1]))
    return word[:at] + middle + word[at + 2 :]


def number_in_words(number: int, language: str) -> str:
    """A number from 0 to 99 in Chinese or English words."""
    tens, ones = divmod(number, 10)
    if language == "zh":
        head = "" if tens == 0 else "十" if tens == 1 else DIGITS_ZH[tens] + "十"
        return head + (DIGITS_ZH[ones] if ones or not tens else "")
    if number < 20:
        return ONES[number]
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
