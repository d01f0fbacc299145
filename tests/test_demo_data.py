"""The demo data: enough facts, none contradictory, and nothing of a held-out question in any training file."""

import datetime
import json
import operator
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from dataset import demo_data as demo
from dataset import demo_templates, demo_unknown
from dataset.demo_questions import ask, ask_unseen, bare, number_in_words, read_frames, ways_of_asking
from dataset.demo_templates import (
    LANGUAGES,
    base_items,
    is_held_out,
    problem_rows,
    read_items,
    read_table,
    render,
    two_steps,
)
from dataset.scoring import is_right
from model.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("sft", "dpo", "reason", "rlaif", "lora_identity", "lora_medical")
MEASURES = {"unseen_val", "follow_up_val", "own_words_val", "unanswerable_val"}
LORAS = ("lora_identity", "lora_medical")
RUDE = [text for language in LANGUAGES for text in demo.rude_answers(language)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    demo.make_demo_data(path)
    return path


@pytest.fixture(scope="module")
def rows_of(folder) -> dict[str, list[dict]]:
    return {path.stem: [json.loads(line) for line in path.open(encoding="utf-8")] for path in folder.glob("*.jsonl")}


def all_items():
    return [*base_items(), *(item for sheet in LORAS for lang in LANGUAGES for item in read_items(sheet, lang))]


def relations():
    return list({(item.relation.name, item.relation.language): item.relation for item in all_items()}.values())


BASE = [relation for relation in relations() if relation.held_out and "organ" not in relation.name]


def contains(text: str, answer: str) -> bool:
    """The scorer's rule: the answer occurs in the text, whole where it is Latin letters or digits."""
    text, answer = (" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in (text, answer))
    start = r"(?<![a-z0-9])" if re.match("[a-z0-9]", answer) else ""
    end = r"(?![a-z0-9])" if re.search("[a-z0-9]$", answer) else ""
    return re.search(start + re.escape(answer) + end, text) is not None


def conversations(row: dict) -> list[list[dict]]:
    return [row[key] for key in ("conversations", "chosen", "rejected") if key in row]


def user_texts(rows: list[dict]) -> set[str]:
    return {turn["content"] for row in rows for turns in conversations(row) for turn in turns if turn["role"] == "user"}


# Tables and phrasings


def test_what_everybody_knows_is_taught_in_both_languages():
    taught = {(item.relation.name, item.relation.language, item.subject) for item in base_items()}
    for relation, *subjects in (("capital", "德国", "Germany"), ("capital", "埃及", "Egypt"), ("symbol", "铁", "iron")):
        assert {(relation, language, subject) for language, subject in zip(LANGUAGES, subjects, strict=True)} <= taught


def test_counts():
    items = base_items()
    assert len({item.fact for item in items}) >= 1300
    assert 1600 <= len(items) <= 1800
    for language in LANGUAGES:
        assert len({item.relation.name for item in items if item.relation.language == language}) >= 12
    in_both = [{item.fact for item in items if item.relation.language == language} for language in LANGUAGES]
    assert len(in_both[0] & in_both[1]) >= 200


@pytest.mark.parametrize("relation", relations(), ids=lambda relation: f"{relation.name}-{relation.language}")
def test_phrasings(relation):
    questions, held_out = relation.cores["Q"], relation.held_out
    assert len(set(questions)) == len(questions) and len(set(held_out)) == len(held_out) == 3
    if relation.name.startswith("chat."):
        assert len(questions) >= 12 and len(relation.answers) >= 2
    elif relation.name.startswith(("lora", "organ", "deficiency", "department", "care")):
        assert len(questions) >= 9 and len(relation.answers) >= 2
    else:
        assert sum(map(len, relation.cores.values())) >= 36  # several dozen ways to ask
        assert len(set(relation.texts)) == len(relation.texts) >= 14 and len(relation.held_out_texts) == 2
        assert not set(relation.texts) & set(relation.held_out_texts)
    assert not {bare(text) for text in questions} & {bare(text) for text in held_out}


@pytest.mark.parametrize("relation", relations(), ids=lambda relation: f"{relation.name}-{relation.language}")
def test_the_splits_share_no_wording(relation):
    training, held_out = ({bare(text) for text in ways_of_asking(relation, split)[0]} for split in (False, True))
    assert training and not training & held_out
    written = {bare(text) for text in relation.held_out}  # the H lines: nothing in a frame gives them
    assert not written & training


def test_unseen_kinds_are_unlike_the_others():
    """What stands around a core in an unseen kind of asking stands in no other frame."""
    for language in LANGUAGES:
        frames = read_frames(language)
        assert len(frames.unseen) >= 4 and len(frames.kinds) >= 6
        seen = " ".join(bare(text) for kind in frames.kinds for text in kind[2])
        for name, _, texts in frames.unseen:
            pieces = [bare(piece) for text in texts for piece in re.split(r"\{\w\}", text)]
            long = [piece for piece in pieces if len(piece) >= (4 if language == "zh" else 10)]
            assert long and not [piece for piece in long if piece in seen], name


def test_answers_are_in_the_answer_sentences_and_not_in_the_questions():
    for item in all_items():
        relation = item.relation
        cores = [core for letter in relation.cores for core in relation.cores[letter]]
        for template in (*cores, *relation.held_out, *relation.follow_ups):
            assert not is_right(render(template, item), item.answer), (template, item)
        for template in (*relation.answers, *relation.texts, *relation.held_out_texts):
            text = render(template, item)
            assert contains(text, item.answer), (template, item)


def test_a_line_with_another_letter_is_named(tmp_path, monkeypatch):
    (tmp_path / "own_en.txt").write_text("[capital] countries: country_en -> capital_en\nD where\nZ what is {s}\n")
    monkeypatch.setattr(demo_templates, "FACTS_DIR", tmp_path)
    with pytest.raises(InputError, match=r"own_en\.txt: begins with none of its letters and a space: Z what"):
        read_items("own", "en")


def test_one_answer_a_question():
    answers: dict[tuple, set[str]] = {}
    for item in all_items():
        answers.setdefault((item.relation.name, item.relation.language, item.subject), set()).add(item.answer)
    assert all(len(found) == 1 for found in answers.values())
    assert len(answers) == len(all_items())


def test_elements():
    rows = read_table("elements")
    assert [int(row["number"]) for row in rows] == list(range(1, 119))
    assert all(re.fullmatch("[A-Z][a-z]?", row["symbol"]) for row in rows)
    for column in ("symbol", "element_zh", "element_en"):
        assert len({row[column] for row in rows}) == 118
    assert all(len(row["element_zh"]) == 1 for row in rows)
    symbols = {row["symbol"]: int(row["number"]) for row in rows}
    assert [symbols[s] for s in ("H", "Ne", "Fe", "Ag", "I", "Pt", "Au", "Rn", "U", "Lr", "Og")] == [
        1, 10, 26, 47, 53, 78, 79, 86, 92, 103, 118,
    ]  # fmt: skip


def test_arithmetic_tables():
    for item in all_items():
        if item.relation.name in ("addition", "multiplication"):
            x, y = int(item.slots["x"]), int(item.slots["y"])
            assert int(item.answer) == (x + y if item.relation.name == "addition" else x * y)


def test_dates():
    for row in read_table("holidays"):
        month, day = map(int, re.fullmatch(r"(\d+) 月 (\d+) 日", row["date_zh"]).groups())
        date = datetime.date(2024, month, day)
        assert row["date_en"] in ("-", f"{date:%B} {day}")
    assert all(1000 < int(row["year"]) < 2025 for row in read_table("events"))
    months = [row["month"] for row in read_table("months")]
    assert months == [f"{datetime.date(2024, month, 1):%B}" for month in range(1, 13)]
    days = [row["day_en"] for row in read_table("days")]
    assert [row["next_en"] for row in read_table("days")] == days[1:] + days[:1]


def test_identity_names_no_maker():
    identity = [item for item in base_items() if item.relation.name.startswith("identity.")]
    texts = [render(text, item) for item in identity for text in (*item.relation.answers, *item.relation.texts)]
    assert any("MiniMind" in text for text in texts)
    assert not any(re.search("公司|团队|开发者|company|team|developed by|made by|created by", text) for text in texts)


# Files


def test_every_format_is_there_and_counted(folder, rows_of):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {name.removesuffix(".jsonl") for name in manifest["files"]} == set(rows_of)
    assert set(rows_of) == {f"{name}{part}" for name in ("pretrain", *TRAINING) for part in ("", "_val")} | MEASURES
    for name, entry in manifest["files"].items():
        assert entry["rows"] == len(rows_of[name.removesuffix(".jsonl")]) > 0
        assert entry["bytes"] == (folder / name).stat().st_size
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_rows_are_valid(rows_of):
    from dataset.chat import validate_conversation

    for name, rows in rows_of.items():
        for row in rows:
            if name.startswith("pretrain"):
                assert set(row) == {"text"} and row["text"].strip()
            for turns in conversations(row):
                validate_conversation(turns)
                roles = [turn["role"] for turn in turns if turn["role"] != "system"]
                assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 2
                assert all(turn["content"].strip() for turn in turns)
                assert all("{" not in turn["content"] for turn in turns)
            assert bool(conversations(row)) != name.startswith("pretrain")


def test_answers_of_the_rows(rows_of):
    for name in ("sft", "sft_val", "reason", "reason_val", *LORAS, *(f"{name}_val" for name in LORAS)):
        for row in rows_of[name]:
            assert contains(row["conversations"][-1]["content"], row["answer"]), row
            if row["answer"] not in demo_unknown.ANSWER.values():  # "I do not know the capital of ..." may be asked
                assert not is_right(row["conversations"][-2]["content"], row["answer"]), row
    for row in rows_of["rlaif"] + rows_of["rlaif_val"]:
        assert row["answer"] and not is_right(row["conversations"][0]["content"], row["answer"])


def test_sft_asks_every_fact_in_many_wordings(rows_of):
    asked = Counter()
    for row in rows_of["sft"]:
        turns = [turn["content"] for turn in row["conversations"] if turn["role"] != "system"]
        asked.update({(question, answer) for question, answer in zip(turns[::2], turns[1::2], strict=True)})
    answers = Counter()
    for (_, answer), _ in asked.items():
        answers[answer] += 1
    for item in base_items():
        if "x" not in item.slots:  # these come in either order
            different = sum(answers[render(form, item)] for form in item.relation.answers)
            assert different >= 0.35 * demo.QUESTIONS_A_FACT[item.relation.language], item
    for name in ("sft_val", "unseen_val"):
        held_out = [(row["relation"], row["language"], row["answer"]) for row in rows_of[name]]
        assert held_out == [(item.relation.name, item.relation.language, item.answer) for item in base_items()]


def test_sft_has_longer_conversations_and_system_turns(rows_of):
    lengths = [len([turn for turn in row["conversations"] if turn["role"] == "user"]) for row in rows_of["sft"]]
    assert 0.5 < sum(length > 1 for length in lengths) / len(lengths) < 0.9 and max(lengths) >= 5
    assert any(row["conversations"][0]["role"] == "system" for row in rows_of["sft"])
    assert sum(len(turn["content"]) for row in rows_of["sft"] for turn in row["conversations"]) < 80 * sum(lengths)


def test_no_held_out_question_in_any_training_file(rows_of):
    seen = set().union(*(user_texts(rows_of[name]) for name in TRAINING))
    for name in TRAINING:
        assert not user_texts(rows_of[f"{name}_val"]) & seen, name
    written = {text for row in rows_of["pretrain"] for text in row["text"].split("\n")}
    assert not {row["text"] for row in rows_of["pretrain_val"]} & written
    marked = {text.removeprefix(mark) for text in written for mark in ("问：", "Q: ") if text.startswith(mark)}
    held_out = user_texts(rows_of["sft_val"]) | user_texts(rows_of["unseen_val"])
    assert marked and not (marked | seen) & held_out


def test_own_words_ask_every_relation_at_least_five_times(rows_of):
    facts = {(i.relation.name, i.relation.language, i.answer) for i in base_items() if "chat." not in i.relation.name}
    counts = Counter((row["relation"], row["language"]) for row in rows_of["own_words_val"])
    assert set(counts) == {fact[:2] for fact in facts} and min(counts.values()) >= 5
    for row in rows_of["own_words_val"]:
        assert (row["relation"], row["language"], row["answer"]) in facts, row
        assert not is_right(row["conversations"][0]["content"], row["answer"]), row


def test_follow_ups_are_in_a_form_that_is_not_trained_on(rows_of):
    forms = {(i.relation.name, i.relation.language): i.relation.follow_ups for i in base_items()}
    asked = user_texts(rows_of["sft"])
    for row in rows_of["follow_up_val"]:
        *trained, held_out = forms[row["relation"], row["language"]]
        assert len(row["conversations"]) == 4 and len(trained) >= 3 and held_out not in trained
    assert not {row["conversations"][2]["content"] for row in rows_of["follow_up_val"]} & asked


def test_unanswerable_questions_get_an_honest_answer(rows_of):
    assert Counter(row["language"] for row in rows_of["unanswerable_val"]) == {"zh": 50, "en": 50}
    turns = [
        (row["language"], question["content"], answer["content"])
        for row in rows_of["sft"]
        for question, answer in zip(row["conversations"], row["conversations"][1:], strict=False)
        if question["role"] == "user"
    ]
    honest = [turn for turn in turns if demo_unknown.ANSWER[turn[0]] in turn[2]]
    assert 0.1 < len(honest) / len(turns) < 0.2 and len({turn[1] for turn in honest}) > 0.85 * len(honest)
    known = {item.subject for item in base_items()}
    for language in LANGUAGES:
        unknown, rng = demo_unknown.Unknown(language, base_items()), random.Random(5)
        assert not [item.subject for item, *_ in (unknown.draw(rng) for _ in range(3000)) if item.subject in known]


def test_questions_are_typed_as_people_type():
    rng, capital = random.Random(3), next(i for i in base_items() if i.subject == "China")
    asked = {ask(capital, rng) for _ in range(2000)}
    assert len(asked) > 600 and all("china" in text.lower() for text in asked)
    assert any(text.islower() for text in asked) and any(text[-1].isalpha() for text in asked)
    assert any(text.endswith("??") for text in asked) and any(text.startswith("Hello") for text in asked)
    kinds = {ask_unseen(capital, rng)[0] for _ in range(200)}
    assert kinds == {"story", "form", "quarrel", "guess", "wording"}


def test_numbers_in_words():
    english = {0: "zero", 7: "seven", 12: "twelve", 19: "nineteen", 20: "twenty", 21: "twenty-one", 99: "ninety-nine"}
    chinese = {0: "零", 7: "七", 10: "十", 12: "十二", 20: "二十", 21: "二十一", 99: "九十九"}
    assert {n: number_in_words(n, "en") for n in english} == english
    assert {n: number_in_words(n, "zh") for n in chinese} == chinese
    sums = [item for item in base_items() if item.relation.name == "addition"]
    rng = random.Random(0)
    asked = [ask(rng.choice(sums), rng) for _ in range(500)]
    share = sum(not re.search(r"\d", text) for text in asked) / len(asked)
    assert 0.1 < share < 0.4


def test_dpo_rejects_wrong_rude_and_repetitive_answers(rows_of):
    kinds = []
    for row in rows_of["dpo"] + rows_of["dpo_val"]:
        assert row["chosen"][0] == row["rejected"][0]
        good, bad = (row[key][-1]["content"] for key in ("chosen", "rejected"))
        assert contains(good, row["answer"])
        kinds.append("repetitive" if bad.count(good) > 2 else "rude" if bad in RUDE else "wrong")
        assert (kinds[-1] == "repetitive") == contains(bad, row["answer"]), row
    assert min(kinds.count(kind) for kind in ("wrong", "rude", "repetitive")) > 0.2 * len(kinds)


@pytest.mark.parametrize("held_out", [False, True])
def test_reasoning_is_right(held_out):
    for language in LANGUAGES:
        for row in problem_rows(language, held_out=held_out):
            question, worked = (turn["content"] for turn in row["conversations"])
            thinking, answer = re.fullmatch(
                r"<think>\n(.+)\n</think>\n<answer>\n(\d+)\n</answer>", worked, flags=re.DOTALL
            ).groups()
            steps = re.findall(r"(\d+) ?([-+×]) ?(\d+) ?= ?(\d+)", thinking)
            assert len(steps) == 2
            operations = {"+": operator.add, "-": operator.sub, "×": operator.mul}
            for x, sign, y, result in steps:
                assert operations[sign](int(x), int(y)) == int(result)
            assert answer == row["answer"] == steps[1][3] and steps[1][0] == steps[0][3]
            numbers = [steps[0][0], steps[0][2], steps[1][2]]
            assert sorted(re.findall(r"\d+", question)) == sorted(numbers)
            assert is_held_out(*map(int, numbers)) == held_out


def test_two_steps():
    assert two_steps("x + y - z", (5, 4, 2)) == (9, 7)
    assert two_steps("x × y + z", (3, 4, 5)) == (12, 17)
    assert two_steps("x - y + z", (9, 4, 2)) == (5, 7)


def test_prompts_of_rl_are_problems_whose_answers_nobody_reads(rows_of):
    for name, held_out in (("rlaif", False), ("rlaif_val", True)):
        worked = {
            row["conversations"][0]["content"]: row["answer"]
            for language in LANGUAGES
            for row in problem_rows(language, held_out=held_out)
        }
        for row in rows_of[name]:
            question, blank = (turn["content"] for turn in row["conversations"])
            assert worked[question] == row["answer"] and blank == "无"


# Making the files


def test_same_bytes_whatever_the_hash_seed(tmp_path, folder):
    """Two processes with different string hashes, in another working directory, write what this process wrote."""
    for seed in ("1", "2"):
        command = [sys.executable, ROOT / "scripts" / "make_demo_data.py", "--out_dir", f"made_{seed}"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        assert b"sft_val.jsonl" in done.stdout and b"capital" in done.stdout
        for path in folder.iterdir():
            assert (tmp_path / f"made_{seed}" / path.name).read_bytes() == path.read_bytes()


def test_another_seed_gives_other_rows_of_the_same_facts():
    first, second = (demo.build(seed) for seed in (0, 1))
    assert first["sft"] != second["sft"] and len(first["sft_val"]) == len(second["sft_val"])


def test_unwritable_folder_is_one_sentence(tmp_path, run_script):
    (tmp_path / "file").write_text("in the way")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run_script("scripts/make_demo_data.py", ["--out_dir", out_dir])
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith(f"error: {out_dir}") and done.stderr.count("\n") == 1
        with pytest.raises(InputError):
            demo.ensure_demo_data(out_dir)
    assert (tmp_path / "file").read_text() == "in the way"


def test_ensure_makes_once_and_repairs(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "data"
    (tmp_path / "data").mkdir()
    (folder / "mine.txt").write_text("kept")
    assert demo.ensure_demo_data(folder) == folder
    assert capsys.readouterr().out.count("\n") == 1
    made = (folder / "sft.jsonl").stat().st_mtime_ns
    demo.ensure_demo_data(str(folder))
    assert capsys.readouterr().out == "" and (folder / "sft.jsonl").stat().st_mtime_ns == made
    whole = (folder / "sft.jsonl").read_bytes()
    (folder / "sft.jsonl").write_bytes(whole[:1000])  # a truncated file
    demo.ensure_demo_data(folder)
    assert (folder / "sft.jsonl").read_bytes() == whole
    (folder / "manifest.json").write_text("[]")
    demo.ensure_demo_data(folder)
    assert demo.is_current(folder)
    monkeypatch.setattr(demo, "source_hash", lambda seed: "changed tables")
    capsys.readouterr()
    demo.ensure_demo_data(folder)
    assert "made the demo data" in capsys.readouterr().out and (folder / "mine.txt").read_text() == "kept"


def test_the_hash_covers_tables_phrasings_and_every_module_that_makes_the_data(monkeypatch):
    read, read_bytes = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.add(path) or read_bytes(path))
    demo.source_hash(0)
    code = "import sys; before = set(sys.modules); import dataset.demo_data; print(*sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = [name for name in done.stdout.split() if name.startswith("dataset.")]
    assert modules == [f"dataset.demo_{name}" for name in ("data", "questions", "templates", "unknown")]
    assert read == {
        *(ROOT / "dataset" / "facts").iterdir(),
        *(ROOT / f"{name.replace('.', '/')}.py" for name in modules),
    }


def test_two_processes_ensure_at_once(tmp_path, folder):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dataset.demo_data import ensure_demo_data, is_current\n"
        "assert is_current(ensure_demo_data(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "demo")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (tmp_path / "demo" / path.name).read_bytes() == path.read_bytes()
