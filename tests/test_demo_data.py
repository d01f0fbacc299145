"""The demo data: enough facts, none contradictory, and nothing of a held-out question in any training file."""

import datetime
import json
import operator
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from dataset import demo_data as demo
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
from model.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("sft", "dpo", "reason", "rlaif", "lora_identity", "lora_medical")
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


def test_counts():
    items = base_items()
    assert len({item.fact for item in items}) >= 1300
    assert 1500 <= len(items) <= 1700
    for language in LANGUAGES:
        assert len({item.relation.name for item in items if item.relation.language == language}) >= 12
    in_both = [{item.fact for item in items if item.relation.language == language} for language in LANGUAGES]
    assert len(in_both[0] & in_both[1]) >= 200


@pytest.mark.parametrize("relation", relations(), ids=lambda relation: f"{relation.name}-{relation.language}")
def test_phrasings(relation):
    questions, held_out = relation.questions, relation.held_out
    assert len(set(questions)) == len(questions) >= 9
    assert len(set(held_out)) == len(held_out) == 3
    assert not set(held_out) & set(questions) and len(relation.answers) >= 2
    if not relation.name.startswith(("lora", "organ", "deficiency", "department", "care")):
        assert len(set(relation.texts)) == len(relation.texts) >= 6 and len(relation.held_out_texts) == 2
        assert not set(relation.texts) & set(relation.held_out_texts)
    # The wording counts, not its marks: no held-out phrasing is a training phrasing with other punctuation.
    bare = [{re.sub(r"[^\w{}+×]", "", text).lower() for text in texts} for texts in (questions, held_out)]
    assert not bare[0] & bare[1]


def test_answers_are_in_the_answer_sentences_and_not_in_the_questions():
    for item in all_items():
        relation = item.relation
        for template in (*relation.questions, *relation.held_out, *relation.follow_ups):
            assert not contains(render(template, item), item.answer), (template, item)
        for template in (*relation.answers, *relation.texts, *relation.held_out_texts):
            text = render(template, item)
            assert item.answer in text and contains(text, item.answer), (template, item)


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
    assert set(rows_of) == {f"{name}{part}" for name in ("pretrain", *TRAINING) for part in ("", "_val")}
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
            assert not contains(row["conversations"][-2]["content"], row["answer"]), row
    for row in rows_of["rlaif"] + rows_of["rlaif_val"]:
        assert row["answer"] and not contains(row["conversations"][0]["content"], row["answer"])


def test_sft_asks_every_fact_in_every_training_phrasing(rows_of):
    asked = user_texts(rows_of["sft"])
    for item in base_items():
        if "x" not in item.slots:  # these come in either order
            assert {render(question, item) for question in item.relation.questions} <= asked
    held_out = [(row["relation"], row["language"], row["answer"]) for row in rows_of["sft_val"]]
    assert held_out == [(item.relation.name, item.relation.language, item.answer) for item in base_items()]


def test_sft_has_longer_conversations_and_system_turns(rows_of):
    lengths = [len([turn for turn in row["conversations"] if turn["role"] == "user"]) for row in rows_of["sft"]]
    assert 0.5 < sum(length > 1 for length in lengths) / len(lengths) < 0.9 and max(lengths) >= 5
    assert any(row["conversations"][0]["role"] == "system" for row in rows_of["sft"])
    assert sum(len(turn["content"]) for row in rows_of["sft"] for turn in row["conversations"]) < 60 * sum(lengths)


def test_no_held_out_question_in_any_training_file(rows_of):
    seen = set().union(*(user_texts(rows_of[name]) for name in TRAINING))
    for name in TRAINING:
        assert not user_texts(rows_of[f"{name}_val"]) & seen, name
    written = {text for row in rows_of["pretrain"] for text in row["text"].split("\n")}
    assert not {row["text"] for row in rows_of["pretrain_val"]} & written
    marked = {text.removeprefix(mark) for text in written for mark in ("问：", "Q: ") if text.startswith(mark)}
    assert marked and not marked & user_texts(rows_of["sft_val"])


def test_no_held_out_template_is_used_in_training(rows_of):
    """Also with any other subject: each training question matches no held-out template of its relation."""
    slot = re.compile(r"\\\{\w+\\\}")
    for relation in relations():
        if relation.name == "record":  # "Tell me {s}." has no words of its own: compared by its subjects above
            continue
        name = (relation.name, relation.language)
        held_out = [re.compile(slot.sub("(.+)", re.escape(text)), re.IGNORECASE) for text in relation.held_out]
        files = ("lora_identity", "lora_medical", "sft", "rlaif")
        same = [row for file in files for row in rows_of[file] if (row.get("relation"), row["language"]) == name]
        single = [row["conversations"][0]["content"] for row in same if len(row["conversations"]) == 2]
        assert single and not [text for text in single for pattern in held_out if pattern.fullmatch(text)]


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


def test_sums_are_right(rows_of):
    sums = {name: [r for r in rows_of[name] if r.get("relation") == "sum"] for name in ("sft", "rlaif", "rlaif_val")}
    for name, rows in sums.items():
        assert len(rows) >= 100
        for row in rows:
            x, y = map(int, re.findall(r"\d+", row["conversations"][0]["content"]))
            assert x + y == int(row["answer"]) and is_held_out(x, y) == name.endswith("_val")


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
    assert modules == ["dataset.demo_data", "dataset.demo_templates"]
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
