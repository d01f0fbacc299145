"""Composes questions as people type them: a relation's core in a frame, with opening, closing and slips of typing.

A phrasing file holds the cores of each relation, frames_<language>.txt the ways of asking that all relations share. A
whole kind of asking marked "unseen" there enters no training row: the score on it tells what another wording finds.
"""

import random
import re
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

from dataset.demo_templates import FACTS_DIR, Item, Relation, finish, render

OPENED, CLOSED, SLIPPED, IN_WORDS = 0.25, 0.15, 0.25, 0.3  # shares of the questions
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += ["seventeen", "eighteen", "nineteen"]
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
FEW = 8
DIGITS_ZH = "零一二三四五六七八九"


@dataclass(frozen=True)
class Kind:
    """A kind of asking: frames for the cores of one letter."""

    name: str
    letter: str
    frames: tuple[str, ...]

    @property
    def unseen(self) -> bool:
        return self.name.startswith("unseen")


WHOLE = Kind("whole", "Q", ("{q}",))


@dataclass(frozen=True)
class Frames:
    """What all relations of a language share."""

    kinds: tuple[Kind, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    texts: tuple[str, ...]


@lru_cache
def read_frames(language: str) -> Frames:
    """The frames of dataset/facts/frames_<language>.txt."""
    sections: dict[str, list[str]] = {}
    for line in (FACTS_DIR / f"frames_{language}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            frames = sections[line[1:-1]] = []
        elif line and not line.startswith("#"):
            frames.append(line)
    opening, closing, text = (tuple(sections.pop(name)) for name in ("opening", "closing", "text"))
    kinds = tuple(Kind(*header.rsplit(" ", 1), tuple(frames)) for header, frames in sections.items())
    return Frames(kinds, opening, closing, text)


@lru_cache(maxsize=None)
def ways_of_asking(relation: Relation, held_out: bool) -> tuple[list[tuple[Kind, str, str]], list[float]]:
    """All (kind, core, frame) of one split, and how often each comes up: a kind by its cores, its pairs alike.

    One pair in eight is kept out of training, and whole questions where a relation has few pairs (small talk).
    """
    kinds = [kind for kind in read_frames(relation.language).kinds if not kind.unseen]
    ways, weights = [], []
    for kind in [*kinds, WHOLE]:
        cores = relation.cores.get(kind.letter, ())
        pairs = [(kind, core, frame) for core in cores for frame in kind.frames]
        pairs = [pair for pair in pairs if (zlib.crc32("".join(pair[1:]).encode()) % 8 == 0) == held_out]
        ways += pairs
        weights += [len(cores) / max(len(pairs), 1)] * len(pairs)
    if held_out and len(ways) < FEW:
        ways += [(WHOLE, question, "{q}") for question in relation.held_out]
        weights += [1] * len(relation.held_out)
    return ways, weights


def ask(item: Item, rng: random.Random, *, held_out: bool = False) -> str:
    """A question for the item as somebody might type it, in a wording of the training rows or in a held-out one."""
    ways, weights = ways_of_asking(item.relation, held_out)
    (way,) = rng.choices(ways, weights)
    return dress(compose(*way, item, rng), item, rng)


def ask_unseen(item: Item, rng: random.Random) -> tuple[str, str]:
    """(kind, question) in a kind of asking, or a whole question, that no training row has."""
    kinds = [kind for kind in read_frames(item.relation.language).kinds if kind.unseen]
    kinds = [kind for kind in kinds if item.relation.cores.get(kind.letter)]
    kinds += [Kind("unseen whole", "H", ("{q}",))] * bool(item.relation.held_out)
    kind = rng.choice(kinds)
    cores = item.relation.held_out if kind.letter == "H" else item.relation.cores[kind.letter]
    question = compose(kind, rng.choice(cores), rng.choice(kind.frames), item, rng)
    return kind.name.removeprefix("unseen "), finish(question, item.relation.language)


def tell(text: str, item: Item, rng: random.Random) -> str:
    """A sentence of running text that tells the item, sometimes with words of introduction."""
    return rng.choice(read_frames(item.relation.language).texts).format(q=render(text, item))


def compose(kind: Kind, core: str, frame: str, item: Item, rng: random.Random) -> str:
    """A core in a frame, the slots filled; the numbers of a sum or product sometimes in words."""
    if "x" in item.slots and not re.search("[+×=*]", core) and rng.random() < IN_WORDS:
        words = {name: number_in_words(int(item.slots[name]), item.relation.language) for name in "xy"}
        item = replace(item, slots={**item.slots, **words})
    if kind.letter != "W":
        return frame.format(q=core.format(**item.slots))
    subject, bar, word = core.rpartition(" | ")
    return frame.format(s=(subject if bar else "{s}").format(**item.slots), w=word.format(**item.slots))


def dress(question: str, item: Item, rng: random.Random) -> str:
    """Opening, closing and slips of typing around a question, each in a share of the cases."""
    language = item.relation.language
    if item.relation.name.startswith("chat."):
        return slip(question, item, rng) if rng.random() < SLIPPED else question
    frames, space = read_frames(language), " " if language == "en" else ""
    if rng.random() < OPENED:
        opening = rng.choice(frames.openings)
        keep = opening[-1] in ".!?" or question.startswith(("I ", "I'", *item.slots.values()))
        question = opening + space + (question if keep else question[0].lower() + question[1:])
    if question[-1] in ".?!。？！" and rng.random() < CLOSED:
        question += space + rng.choice(frames.closings)
    question = finish(question, language)
    return slip(question, item, rng) if rng.random() < SLIPPED else question


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
