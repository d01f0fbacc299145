"""Questions that nobody could answer from the tables: invented subjects, the future, private matters, plain nonsense.

The model is to say that it does not know, in the language of the question. unknown_<language>.txt explains its letters.
"""

import random
import re
from dataclasses import replace

from dataset.demo_questions import ask, dress
from dataset.demo_templates import FACTS_DIR, Item, Relation

ANSWER = {"zh": "不知道", "en": "do not know"}  # in every honest answer, and in no other
INVENTED = 0.5  # share of the questions that ask for an invented subject as for a known one


class Unknown:
    """The unanswerable questions of one language."""

    def __init__(self, language: str, items: tuple[Item, ...]):
        self.language = language
        self.asked = {item.relation.name: item for item in items if item.relation.language == language}
        self.known = {item.subject for item in items}
        self.answers: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.subjects: dict[str, list[str]] = {}
        self.questions: dict[str, list[str]] = {}
        self._read()

    def _read(self) -> None:
        lines = (FACTS_DIR / f"unknown_{self.language}.txt").read_text(encoding="utf-8").splitlines()
        for line in lines:
            letter, _, text = line.partition(" ")
            if line.startswith("["):
                section = line[1:-1]
            elif letter == "A":
                self.answers.append(text)
            elif letter == "=":
                name, words = text.split(" ", 1)
                self.words[name] = words.split(", ")
            elif letter in ("X", "Q"):
                (self.subjects if letter == "X" else self.questions).setdefault(section, []).append(text)

    def draw(self, rng: random.Random) -> tuple[Item, str, str]:
        """(item, question, honest answer); the item's answer is what the reply must contain."""
        if rng.random() < INVENTED:
            section = rng.choice(list(self.subjects))
            subject = self.fill(rng.choice(self.subjects[section]), rng)
            while subject in self.known:
                subject = self.fill(rng.choice(self.subjects[section]), rng)
            item = self.item(f"unknown.{section}", subject)
            like = self.asked[section]
            question = ask(replace(like, subject=subject, slots={**like.slots, "s": subject}), rng)
        else:
            section = rng.choices(list(self.questions), list(map(len, self.questions.values())))[0]
            item = self.item(f"unknown.{section}", "")
            question = dress(self.fill(rng.choice(self.questions[section]), rng), item, rng)
        return item, question, rng.choice(self.answers)

    def item(self, name: str, subject: str) -> Item:
        relation = Relation(name, self.language, {})
        return Item(relation, (name, "", 0), subject, ANSWER[self.language], {"s": subject})

    def fill(self, text: str, rng: random.Random) -> str:
        """A text with a random word for every <list>."""
        return re.sub(r"<(\w+)>", lambda match: rng.choice(self.words[match[1]]), text)
