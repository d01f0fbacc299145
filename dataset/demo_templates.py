"""Reads dataset/facts: tables of facts, and the phrasings that ask, answer and tell them in Chinese and English."""

import itertools
import operator
import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from model.errors import InputError

FACTS_DIR = Path(__file__).resolve().parent / "facts"
LANGUAGES = ("zh", "en")
COMPUTED_TABLES = ("sums", "products")
ROWS_IN_BOTH_LANGUAGES = 10
Row = dict
LETTERS = {"H": "held_out", "A": "answers", "F": "follow_ups", "T": "texts", "V": "held_out_texts"}
CORES = "QDINRSW"  # letters of lines that ask, whole (Q) or in a frame of frames_<language>.txt
HEADER = re.compile(r"\[(?P<name>[\w.]+)\] (?:(?P<table>\w+): (?P<subject>.+?) -> (?P<answer>\w+)|= (?P<constant>.+))")


@dataclass(frozen=True, eq=False)
class Relation:
    """One kind of fact in one language, with all its phrasings; a held-out phrasing enters no training row."""

    name: str
    language: str
    cores: dict[str, tuple[str, ...]]
    held_out: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    follow_ups: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    held_out_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """A fact in one language: its subject, the answer that a response must contain, and the slots of its phrasings."""

    relation: Relation
    fact: tuple[str, str, int]  # (relation, table, row): the same for both languages
    subject: str
    answer: str
    slots: dict[str, str]


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of dataset/facts/<name>.tsv; the two arithmetic tables are computed (x <= y: either order asks the same)."""
    if name == "sums":
        return [{"x": str(x), "y": str(y), "result": str(x + y)} for x in range(1, 10) for y in range(x, 10)]
    if name == "products":
        return [{"x": str(x), "y": str(y), "result": str(x * y)} for x in range(2, 10) for y in range(x, 10)]
    header, *lines = (FACTS_DIR / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def read_items(sheet: str, language: str) -> list[Item]:
    """All facts of the phrasing file dataset/facts/<sheet>_<language>.txt, in the order of its relations and rows."""
    path = FACTS_DIR / f"{sheet}_{language}.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    starts = [number for number, line in enumerate(lines) if line.startswith("[")]
    items = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        header = HEADER.fullmatch(lines[start])
        texts: dict[str, tuple[str, ...]] = {}
        for line in lines[start + 1 : end]:
            if line[0] not in CORES + "".join(LETTERS) or line[1:2] != " ":
                raise InputError(f"{path}: begins with none of its letters and a space: {line}")
            texts[line[0]] = (*texts.get(line[0], ()), line[2:])
        phrasings = {field: texts.get(letter, ()) for letter, field in LETTERS.items()}
        cores = {letter: texts[letter] for letter in CORES if letter in texts}
        relation = Relation(header["name"], language, cores, **phrasings)
        items += _constant_item(relation, header) if header["constant"] else _table_items(relation, header)
    return items


def _constant_item(relation: Relation, header: re.Match) -> list[Item]:
    answer = header["constant"]
    return [Item(relation, (relation.name, "", 0), relation.name, answer, {"a": answer})]


def _table_items(relation: Relation, header: re.Match) -> list[Item]:
    columns = re.findall(r"\w+", header["subject"])
    items = []
    for number, row in enumerate(read_table(header["table"])):
        needed = [row[column] for column in (*columns, header["answer"])]
        if "-" in needed:  # the fact does not exist in this language
            continue
        fact = (relation.name, header["table"], number)
        slots = {**row, "s": needed[0], "a": needed[-1]}
        items.append(Item(relation, fact, " ".join(needed[:-1]), needed[-1].removeprefix("the "), slots))
    return items


@lru_cache(maxsize=1)
def base_items() -> tuple[Item, ...]:
    """Every (fact, language) of the pretraining and SFT data.

    Arithmetic, the first rows of each table and those marked as known to everybody are taught in both languages,
    further rows in Chinese and English by turns: a model of a few million parameters learns them all in minutes.
    """
    sheets = ("phrasings", "smalltalk")
    by_language = {lang: [item for sheet in sheets for item in read_items(sheet, lang)] for lang in LANGUAGES}
    bilingual = set.intersection(*({item.fact for item in items} for items in by_language.values()))

    def is_taught(item: Item) -> bool:
        _, table, row = item.fact
        both = item.fact not in bilingual or table in COMPUTED_TABLES or row < ROWS_IN_BOTH_LANGUAGES
        both |= item.slots.get("known") == "yes"
        return both or item.relation.language == LANGUAGES[row % 2]

    return tuple(item for items in by_language.values() for item in items if is_taught(item))


def oriented(item: Item, rng: random.Random) -> Item:
    """A sum or product in a random order of its two numbers; any other item as it is."""
    if "x" not in item.slots or rng.random() < 0.5:
        return item
    return replace(item, slots={**item.slots, "x": item.slots["y"], "y": item.slots["x"]})


def render(template: str, item: Item) -> str:
    """Fill a phrasing's slots; an English sentence gets its "an" and its capital letter."""
    return finish(template.format(**item.slots), item.relation.language)


def finish(text: str, language: str) -> str:
    """An English sentence gets its "an" and its capital letter, also after words of introduction."""
    if language == "en":
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        text = re.sub(r"^[a-z]|(?<=[a-z]{2}[.!?] )[a-z]", lambda letter: letter[0].upper(), text)
    return text


def turns(*contents: str) -> list[dict[str, str]]:
    """Alternating user and assistant turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def is_held_out(*numbers: int) -> bool:
    """Whether problems with these numbers, in any order, are kept for the held-out splits (about one case in eight)."""
    return sum(number * weight for number, weight in zip(sorted(numbers), (7, 3, 5), strict=False)) % 8 == 0


def two_steps(formula: str, numbers: tuple[int, int, int]) -> tuple[int, int]:
    """Middle and final result of a formula such as "x + y - z", worked from left to right."""
    _, first, _, second, _ = formula.split()
    operations = {"+": operator.add, "-": operator.sub, "×": operator.mul}
    middle = operations[first](numbers[0], numbers[1])
    return middle, operations[second](middle, numbers[2])


def problem_rows(language: str, *, held_out: bool) -> list[Row]:
    """Every problem of reasoning_<language>.txt with numbers 2..9 of one split, worked between <think> and </think>.

    Results are positive, and no result is among the numbers of its question.
    """
    sheet = (FACTS_DIR / f"reasoning_{language}.txt").read_text(encoding="utf-8")
    rows = []
    for section in sheet.split("\n[")[1:]:
        formula, *lines = section.strip().split("\n")
        questions = [line[2:] for line in lines if line.startswith("Q ")]
        steps = "\n".join(line[2:] for line in lines if line.startswith("S "))
        for numbers in itertools.product(range(2, 10), repeat=3):
            middle, result = two_steps(formula.removesuffix("]"), numbers)
            if is_held_out(*numbers) != held_out or min(middle, result) < 1 or result in numbers:
                continue
            slots = dict(zip("xyz", numbers, strict=True), m=middle, a=result)
            worked = f"<think>\n{steps.format(**slots)}\n</think>\n<answer>\n{result}\n</answer>"
            for question in questions:
                conversation = turns(question.format(**slots), worked)
                rows.append({"conversations": conversation, "answer": str(result), "language": language})
    return rows


def rude_answers(language: str) -> list[str]:
    """The lines of misbehaviour_<language>.txt."""
    lines = (FACTS_DIR / f"misbehaviour_{language}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]
