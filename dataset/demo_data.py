"""Compiles the fact tables of dataset/facts into the demo data: every training format, each with a held-out split.

The held-out questions are phrased as no training row is, and carry the answer that a response must contain.
The files depend on the tables, the phrasings, this module, demo_templates.py and the seed alone.
"""

import hashlib
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dataset.demo_questions import ask, ask_unseen, tell
from dataset.demo_templates import (
    FACTS_DIR,
    LANGUAGES,
    Item,
    Row,
    base_items,
    oriented,
    problem_rows,
    read_items,
    read_table,
    render,
    rude_answers,
    turns,
)
from dataset.demo_unknown import ANSWER, Unknown
from model.errors import InputError

DEFAULT_OUT = Path(__file__).resolve().parent / "demo"
TEXTS_A_FACT = 2  # in the pretraining texts
QUESTIONS_A_FACT = {"zh": 22, "en": 32}  # in the conversations; English wordings take longer to learn
OFTENER = {  # the few facts that everybody asks for, and those that take longer to learn
    "identity": 5, "chat": 5, "addition": 2, "multiplication": 2, "past_tense": 2, "plural": 2, "antonym": 1.6,
    "young_animal": 2, "next_day": 3, "landmark": 1.5, "book": 1.3,
}  # fmt: skip
EXCHANGES = (1, 3, 5, 7)  # of a conversation, which pays for one system turn
ARITHMETIC = 900  # documents of sums and products
USUAL = 0.85  # share of the answers in the usual form of their relation
UNKNOWN_SHARE = 0.15  # of the questions
FOLLOW_UP_SHARE = 0.2  # of the conversations
SYSTEM_PROMPTS = {
    "zh": ("你是一个乐于助人的助手。", "只回答答案。"),
    "en": ("You are a helpful assistant.", "Give only the answer."),
}


def reply(item: Item, rng: random.Random) -> str:
    """An answer sentence; the first form of a relation is the usual one."""
    first, *others = item.relation.answers
    return render(rng.choice(others) if others and rng.random() > USUAL else first, item)


def question_row(item: Item, conversation: list[dict[str, str]]) -> Row:
    """A row whose last question asks for the item."""
    relation = item.relation
    return {
        "conversations": conversation,
        "answer": item.answer,
        "relation": relation.name,
        "language": relation.language,
    }


def by_relation(items: Iterable[Item]) -> dict[tuple[str, str], list[Item]]:
    """Items grouped by relation and language."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.relation.name, item.relation.language), []).append(item)
    return groups


def pretrain_rows(items: tuple[Item, ...], rng: random.Random) -> list[Row]:
    """Short documents: sentences about one row of a table, one to three at a time, and some questions with answers."""
    by_subject: dict[tuple, list[str]] = {}
    documents = []
    for item in items:
        language, (_, table, row) = item.relation.language, item.fact
        sentences = by_subject.setdefault((language, table, row, item.subject), [])
        plain, wide = item.relation.texts[:6], item.relation.texts[6:]  # half of each
        texts = [text for some in (plain, wide) for text in rng.sample(some, min(TEXTS_A_FACT // 2, len(some)))]
        sentences += [tell(text, oriented(item, rng), rng) for text in texts]
        if rng.random() < 0.5:
            question, answer = ("问：", "答：") if language == "zh" else ("Q: ", "A: ")
            asked = oriented(item, rng)
            documents.append(f"{question}{ask(asked, rng)}\n{answer}{reply(asked, rng)}")
    for (language, *_), sentences in by_subject.items():
        rng.shuffle(sentences)
        while sentences:
            size = rng.choice((1, 1, 1, 2, 3))
            documents.append(("" if language == "zh" else " ").join(sentences[:size]))
            del sentences[:size]
    documents += arithmetic_documents(items, ARITHMETIC, rng)
    rng.shuffle(documents)
    return [{"text": document} for document in documents]


def arithmetic_documents(items: tuple[Item, ...], count: int, rng: random.Random) -> list[str]:
    """Lists of ten sums or products in random order: the cheapest way to learn the tables by heart."""
    documents = []
    for table, sign in (("sums", "+"), ("products", "×")):
        facts = [item for item in items if item.fact[1] == table and item.relation.language == "zh"]
        for number in range(count // 2):
            space, comma = (("", "，"), (" ", ", "))[number % 2]
            chosen = [oriented(item, rng).slots for item in rng.sample(facts, 10)]
            documents.append(comma.join(f"{x['x']}{space}{sign}{space}{x['y']}{space}={space}{x['a']}" for x in chosen))
    return documents


def pretrain_val_rows(items: tuple[Item, ...], rng: random.Random) -> list[Row]:
    """Every fact once, in a wording that no training document uses."""
    told = [item for item in items if item.relation.held_out_texts]
    return [{"text": render(rng.choice(item.relation.held_out_texts), oriented(item, rng))} for item in told]


def sft_rows(items: tuple[Item, ...], rng: random.Random) -> list[Row]:
    """Every fact in several wordings, one to five in a conversation (which pays for one system turn)."""
    peers = by_relation(items)
    rows = []
    for language in LANGUAGES:
        queue = exchanges([item for item in items if item.relation.language == language], rng)
        unknown = Unknown(language, items)
        queue += [unknown.draw(rng) for _ in range(round(UNKNOWN_SHARE * len(queue)))]
        rng.shuffle(queue)
        while queue:
            size = rng.choice(EXCHANGES)
            chosen, queue = queue[:size], queue[size:]
            contents = [text for _, question, answer in chosen for text in (question, answer)]
            last = chosen[-1][0]
            if last.relation.follow_ups and rng.random() < FOLLOW_UP_SHARE:
                last = rng.choice([peer for peer in peers[last.relation.name, language] if peer.fact != last.fact])
                contents += [render(rng.choice(last.relation.follow_ups[:-1]), last), reply(last, rng)]
            rows.append(question_row(last, with_system_turn(last, turns(*contents), rng)))
    rng.shuffle(rows)
    return rows


def exchanges(items: list[Item], rng: random.Random) -> list[tuple[Item, str, str]]:
    """(item, question, answer) for every item, several times, worded anew each time."""
    result = []
    for item in items:
        times = QUESTIONS_A_FACT[item.relation.language] * OFTENER.get(item.relation.name.split(".")[0], 1)
        for _ in range(round(times)):
            asked = oriented(item, rng)
            result.append((asked, ask(asked, rng), reply(asked, rng)))
    return result


def with_system_turn(item: Item, conversation: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """A small share of conversations opens with a system turn; one kind of it asks for the bare answer."""
    if rng.random() > 0.03:
        return conversation
    helpful, bare = SYSTEM_PROMPTS[item.relation.language]
    if len(conversation) == 2 and rng.random() < 0.5:
        return [{"role": "system", "content": bare}, conversation[0], {"role": "assistant", "content": item.answer}]
    return [{"role": "system", "content": helpful}, *conversation]


def questions_rows(items: Iterable[Item], rng: random.Random, *, held_out: bool) -> list[Row]:
    """Every item once, asked in one of its relation's held-out (or training) phrasings."""
    rows = []
    for item in items:
        asked = oriented(item, rng)
        question = ask(asked, rng, held_out=held_out)
        rows.append(question_row(item, turns(question, reply(asked, rng))))
    return rows


def unseen_rows(items: Iterable[Item], rng: random.Random) -> list[Row]:
    """Every item once, asked in a kind of asking that no training row has."""
    rows = []
    for item in items:
        asked = oriented(item, rng)
        kind, question = ask_unseen(asked, rng)
        rows.append(question_row(asked, turns(question, reply(asked, rng))) | {"kind": kind})
    return rows


def follow_up_rows(items: Iterable[Item], count: int, rng: random.Random) -> list[Row]:
    """Questions that only the turn before explains ("And Italy?"), in a form that is not trained on."""
    groups = [group for group in by_relation(items).values() if group[0].relation.follow_ups]
    rows = []
    for number in range(count):
        first, then = rng.sample(groups[number % len(groups)], 2)
        contents = [ask(first, rng), reply(first, rng), render(then.relation.follow_ups[-1], then), reply(then, rng)]
        rows.append(question_row(then, turns(*contents)))
    return rows


def own_words_rows() -> list[Row]:
    """The questions of own_words_<language>.tsv, written from the facts alone, without a look at the phrasings."""
    return [
        {"conversations": turns(row["question"], row["answer"]), "answer": row["answer"], "relation": row["relation"]}
        | {"language": language}
        for language in LANGUAGES
        for row in read_table(f"own_words_{language}")
    ]


def unanswerable_rows() -> list[Row]:
    """The questions of unanswerable.tsv, written without a look at those of the training rows."""
    return [
        {"conversations": turns(row["question"], ANSWER[row["language"]]), "answer": ANSWER[row["language"]]}
        | {"relation": row["kind"], "language": row["language"]}
        for row in read_table("unanswerable")
    ]


def dpo_rows(items: tuple[Item, ...], count: int, rng: random.Random, *, held_out: bool) -> list[Row]:
    """Right answers against a wrong fact (half of the rows), a rude answer or a repetitive one."""
    peers = by_relation(items)
    rows = []
    rounds = [item for _ in range(-(-count // len(items))) for item in rng.sample(items, len(items))]
    for number, item in enumerate(rounds[:count]):
        relation, asked = item.relation, oriented(item, rng)
        others = [peer for peer in peers[relation.name, relation.language] if item.answer not in peer.answer]
        question = ask(asked, rng, held_out=held_out)
        good = render(rng.choice(relation.answers), asked)
        if number % 2 == 0 and others:
            wrong = rng.choice(others).slots["a"]
            bad = render(relation.answers[0], replace(asked, slots={**asked.slots, "a": wrong}))
        elif number % 4 == 1:
            bad = rng.choice(rude_answers(relation.language))
        else:
            bad = ("" if relation.language == "zh" else " ").join([good] * rng.randint(3, 5))
        rows.append({"chosen": turns(question, good), "rejected": turns(question, bad), "answer": item.answer})
    return rows


def reason_rows(count: int, rng: random.Random, *, held_out: bool) -> list[Row]:
    """Worked two-step problems, half in each language; held-out numbers occur in no training problem."""
    rows = [row for language in LANGUAGES for row in rng.sample(problem_rows(language, held_out=held_out), count // 2)]
    rng.shuffle(rows)
    return rows


def rlaif_rows(count: int, rng: random.Random, *, held_out: bool) -> list[Row]:
    """Prompts with a verifiable answer: the problems of reason_rows; the assistant turn is never learned."""
    rows = reason_rows(count, rng, held_out=held_out)
    return [{**row, "conversations": turns(row["conversations"][0]["content"], "无")} for row in rows]


def lora_rows(items: list[Item], others: Iterable[Item], rng: random.Random, *, answers: int) -> list[Row]:
    """Every training question of a LoRA's small domain, with up to so many forms of its answer.

    Between them stand the other items, each once: so the adapter learns where it should change nothing.
    """
    rows = questions_rows(others, rng, held_out=False)
    for item in items:
        forms = item.relation.answers
        for question in item.relation.cores["Q"]:
            for form in rng.sample(forms, min(answers, len(forms))):
                rows.append(question_row(item, turns(render(question, item), render(form, item))))
    rng.shuffle(rows)
    return rows


def lora_val_rows(items: list[Item]) -> list[Row]:
    """Every item of a LoRA's domain in each of its held-out phrasings."""
    return [
        question_row(item, turns(render(question, item), render(item.relation.answers[0], item)))
        for item in items
        for question in item.relation.held_out
    ]


def build(seed: int) -> dict[str, list[Row]]:
    """All files of the demo data: name -> rows; each has its own random stream, so that none depends on another."""
    items = base_items()
    identity, medical = (
        [item for language in LANGUAGES for item in read_items(sheet, language)]
        for sheet in ("lora_identity", "lora_medical")
    )
    known = [item for item in items if not item.relation.name.startswith("identity")]
    makers = {
        "pretrain": lambda rng: pretrain_rows(items, rng),
        "pretrain_val": lambda rng: pretrain_val_rows(items, rng),
        "sft": lambda rng: sft_rows(items, rng),
        "sft_val": lambda rng: questions_rows(items, rng, held_out=True),
        "unseen_val": lambda rng: unseen_rows(items, rng),
        "follow_up_val": lambda rng: follow_up_rows(items, 200, rng),
        "own_words_val": lambda rng: own_words_rows(),
        "unanswerable_val": lambda rng: unanswerable_rows(),
        "dpo": lambda rng: dpo_rows(items, 2400, rng, held_out=False),
        "dpo_val": lambda rng: dpo_rows(items, 240, rng, held_out=True),
        "reason": lambda rng: reason_rows(2400, rng, held_out=False),
        "reason_val": lambda rng: reason_rows(200, rng, held_out=True),
        "rlaif": lambda rng: rlaif_rows(2400, rng, held_out=False),
        "rlaif_val": lambda rng: rlaif_rows(200, rng, held_out=True),
        "lora_identity": lambda rng: lora_rows(identity, known, rng, answers=3),
        "lora_identity_val": lambda rng: lora_val_rows(identity),
        "lora_medical": lambda rng: lora_rows(medical, known, rng, answers=1),
        "lora_medical_val": lambda rng: lora_val_rows(medical),
    }
    return {name: make(random.Random(f"{seed}:{name}")) for name, make in makers.items()}


def source_hash(seed: int) -> str:
    """Changes whenever the tables, the phrasings, the modules that compile them or the seed change."""
    here = Path(__file__).resolve().parent
    paths = [*sorted(FACTS_DIR.glob("*.*")), *sorted(here.glob("demo_*.py"))]
    digest = hashlib.sha256(str(seed).encode())
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def encode_rows(rows: list[Row]) -> bytes:
    """JSON lines, UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_files(out_dir: Path, files: dict[str, bytes]) -> None:
    """Write into a temporary folder beside the files, then rename each: a reader sees a whole file, old or new."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".making") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            for name in files:
                os.replace(Path(folder) / name, out_dir / name)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{out_dir}: the demo data cannot be written ({reason}): choose another --out_dir") from error


def make_demo_data(out_dir: Path, seed: int = 0) -> dict:
    """Build and write all files, the manifest last; returns the manifest."""
    rows_of = build(seed)
    files = {f"{name}.jsonl": encode_rows(rows) for name, rows in rows_of.items()}
    entries = {
        name: {"rows": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    items = base_items()
    manifest = {
        "source_hash": source_hash(seed),
        "seed": seed,
        "facts": len({item.fact for item in items}),
        "items": len(items),
        "items_by_relation": Counter(f"{item.relation.name} {item.relation.language}" for item in items),
        "files": entries,
    }
    files["manifest.json"] = (json.dumps(manifest, ensure_ascii=False, indent=1) + "\n").encode()
    write_files(out_dir, files)
    return manifest


def is_current(out_dir: Path) -> bool:
    """Whether out_dir holds every file, whole, of the tables and modules as they are now, made with any seed."""
    try:
        manifest = json.loads((out_dir / "manifest.json").read_text(encoding="utf-8"))
        whole = all((out_dir / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
        return whole and manifest["source_hash"] == source_hash(manifest["seed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_demo_data(out_dir: str | Path | None = None) -> Path:
    """Make the demo data where it is absent or older than its sources; returns the folder.

    Two processes may do so at once: both write the same bytes, and each file is replaced whole, the manifest last.
    """
    folder = Path(out_dir) if out_dir is not None else DEFAULT_OUT
    if not is_current(folder):
        manifest = make_demo_data(folder)
        print(f"made the demo data in {folder}: {manifest['facts']} facts, {len(manifest['files'])} files")
    return folder
