"""Multiple-choice questions in the formats of C-Eval and CMMLU: how probable is each of the letters A, B, C, D?

    python scripts/eval_choice.py ceval/ --split val
    python scripts/eval_choice.py cmmlu/ --shots 5 --stage full_sft --csv out/cmmlu.csv --json out/cmmlu.json

A folder holds <split>/<subject>.csv with the columns id (or nothing), question, A, B, C, D, answer, in any case. A
question becomes

    <header of the subject>

    <worked questions of the dev split, --shots of them>

    <question>
    A. ...
    B. ...
    C. ...
    D. ...
    答案：

and the answer is the letter whose text " A", " B", " C" or " D" has the highest log-probability after it: the layout
and the scoring of lm-eval's CMMLU tasks, so that the figures can be compared. A guesser gets 25%; the interval beside
each figure is Wilson's at 95%.

--lm_eval_tasks FOLDER writes the same questions as task files for lm-eval instead, and prints its command.
"""

import argparse
import csv
import json
import math
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model.errors import InputError, check_given_text, run_script
from model.loading import TRAINED_BY
from trainer.runtime.flags import add_weight_flags, number
from trainer.runtime.start import open_model

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)


class Question(NamedTuple):
    """One row of a file: the text up to the answer, and the number of the right letter (None: not published)."""

    subject: str
    number: str
    text: str
    answer: int | None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="folder with dev/, val/ or test/ of CSV files")
    add("--split", default="auto", help="which folder to answer (default: val, else test)")
    add("--shots", type=number(int, 0), default=0, help="worked questions of dev/ before each question (default: 0)")
    add("--subjects", nargs="*", help="only these subjects (default: all)")
    add("--limit", type=number(int, 1), help="questions of each subject at most (default: all)")
    add(
        "--header",
        default="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。",
        help="first line of each prompt, {subject} in it the subject's name",
    )
    add("--batch_size", type=number(int, 1), default=16, help="prompts of a forward pass (default: 16)")
    add("--csv", type=Path, help="write every question with its four log-probabilities here")
    add("--json", type=Path, help="write the table here")
    add("--lm_eval_tasks", type=Path, help="answer nothing: write the questions as tasks for lm-eval into this folder")
    add_weight_flags(parser, "full_sft", list(TRAINED_BY))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Questions
    check_given_text(args.header, "--header")
    split = pick_split(args.folder, args.split)
    names, categories = subject_names(args.folder)
    questions, prompts = [], []
    for path in subject_files(args.folder / split, args.subjects):
        subject = subject_of(path)
        rows = read_questions(path)[: args.limit]
        if any(row.answer is None for row in rows):
            raise InputError(f"{path} has no answers (they are not published): take --split val")
        shots = worked_questions(args.folder / "dev", subject, args.shots)
        header = args.header.replace("{subject}", names.get(subject, subject.replace("_", " ")))
        questions += rows
        prompts += ["\n\n".join([header, *shots, row.text]) for row in rows]
    if args.lm_eval_tasks:
        write_tasks(args.lm_eval_tasks, questions, prompts)
        return

    # 2. Model
    path, model, _, tokenizer = open_model(args)

    # 3. Log-probabilities of the letters, and the score
    scores = letter_logprobs(model, tokenizer, prompts, args.batch_size)  # (questions, 4)
    table = tabulate(questions, scores, categories)
    print(f"{path}, {split} of {args.folder}, {args.shots}-shot; chance {CHANCE:.1%}\n")
    print_table(table)
    if args.csv:
        write_answers(args.csv, questions, scores)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"weights": str(path), "split": split, "shots": args.shots, "chance": CHANCE, "table": table}
        args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- files


def pick_split(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder: give the one that holds val/ or test/ with a CSV file for each subject"
        )
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    splits = [name for name in (["val", "test"] if wanted == "auto" else [wanted]) if name in there]
    if not splits:
        raise InputError(f"{folder} has no split {wanted}: it holds {', '.join(there) or 'no folders'}")
    return splits[0]


def subject_of(path: Path) -> str:
    """accountant_val.csv and accountant.csv are both about "accountant"."""
    return path.stem.removesuffix(f"_{path.parent.name}")


def subject_files(folder: Path, wanted: list[str] | None) -> list[Path]:
    paths = sorted(folder.glob("*.csv"))
    found = {subject_of(path): path for path in paths}
    if not found:
        raise InputError(f"{folder} holds no CSV files")
    for path in paths:
        if path != found[subject_of(path)]:
            raise InputError(f"{path} and {found[subject_of(path)]} are about the same subject: remove one")
    unknown = sorted(set(wanted or ()) - found.keys())
    if unknown:
        raise InputError(f"{folder} has no subject {', '.join(unknown)}: it has {', '.join(found)}")
    return [found[subject] for subject in wanted or found]


def read_questions(path: Path) -> list[Question]:
    """The rows of a CSV file with the columns question, A, B, C, D and, where it is published, answer."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{(key or "id").strip().lower(): cell for key, cell in row.items()} for row in csv.DictReader(file)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path} is no CSV file: {error}") from None
    questions = []
    for line, row in enumerate(rows, start=2):
        if any(isinstance(cell, list) for cell in row.values()):
            raise InputError(f"{path}: row {line} has more fields than the header")
        missing = [name for name in ("question", "a", "b", "c", "d") if not (row.get(name) or "").strip()]
        answer = (row.get("answer") or "").strip().upper()
        if missing or answer not in ("", *LETTERS):
            problem = (
                f"has no {', '.join(missing)}" if missing else f"has the answer {answer!r}, which is no letter A-D"
            )
            raise InputError(f"{path}: row {line} {problem}")
        choices = "\n".join(f"{letter}. {row[letter.lower()]}" for letter in LETTERS)
        text = f"{row['question'].strip()}\n{choices}\n答案："
        number_ = row.get("id") or row.get("index") or str(line - 2)
        questions.append(Question(subject_of(path), number_, text, LETTERS.index(answer) if answer else None))
    if not questions:
        raise InputError(f"{path} holds no questions: copy it again, or remove it")
    return questions


def worked_questions(folder: Path, subject: str, shots: int) -> list[str]:
    """The first questions of a subject's dev file with their answers."""
    if not shots:
        return []
    paths = [path for path in folder.glob("*.csv") if subject_of(path) == subject]
    rows = read_questions(paths[0]) if paths else []
    if len(rows) < shots or any(row.answer is None for row in rows[:shots]):
        raise InputError(f"{folder} has {len(rows)} worked questions on {subject}, --shots asks for {shots}")
    return [f"{row.text} {LETTERS[row.answer]}" for row in rows[:shots]]


def subject_names(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Names and categories by subject, from C-Eval's subject_mapping.json where there is one."""
    path, names, categories = folder / "subject_mapping.json", {}, {}
    if not path.exists():
        return names, categories
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        for subject, texts in mapping.items():
            _, names[subject], categories[subject] = texts
            if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                raise TypeError
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{path} is no mapping of subjects to [English name, Chinese name, category]") from None
    return names, categories


def write_tasks(folder: Path, questions: list[Question], prompts: list[str]) -> None:
    """A task file and its rows for each subject, and the group "local_choice" of them all. (JSON is YAML too.)"""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = defaultdict(list)
    for question, prompt in zip(questions, prompts, strict=True):
        rows[question.subject].append({"prompt": prompt, "gold": question.answer})
    accuracy = {"metric": "acc", "aggregation": "mean"}
    for subject, its in rows.items():
        data = (folder / f"{subject}.jsonl").resolve()
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in its), encoding="utf-8")
        task = {
            "task": f"local_{subject}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "prompt",
            "doc_to_choice": list(LETTERS), "doc_to_target": "gold",
            "metric_list": [{**accuracy, "higher_is_better": True}],
        }  # fmt: skip
        (folder / f"{subject}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
    group = {
        "group": "local_choice", "task": [f"local_{subject}" for subject in rows],
        "aggregate_metric_list": [{**accuracy, "weight_by_size": True}],
    }  # fmt: skip
    (folder / "local_choice.yaml").write_text(json.dumps(group, indent=2) + "\n", encoding="utf-8")
    print(
        f"{len(prompts)} questions on {len(rows)} subjects in {folder}; on a folder of scripts/convert_model.py:\n"
        f"lm_eval --model hf --model_args pretrained=FOLDER,dtype=float32 --tasks local_choice "
        f"--include_path {shlex.quote(str(folder))} --batch_size 16"
    )


# ------------------------------------------------------------------------------------------------------------ scoring


@torch.inference_mode()
def letter_logprobs(model, tokenizer, prompts: list[str], batch_size: int) -> torch.Tensor:
    """log p(" A" ... " D" | prompt): (N, 4) float32.

    Where the four letters are one token each after the same tokens, one forward pass serves them all. A prompt longer
    than the context is refused.
    """
    rows = [encode_letters(tokenizer, prompt) for prompt in prompts]
    limit = model.config.max_position_embeddings
    longest = max(len(ids) - 1 for row in rows for ids, _ in row)  # the last token is scored, not read
    if longest > limit:
        raise InputError(
            f"a prompt has {longest} tokens, more than the context of {limit}: "
            "take fewer --shots, or leave its subject out with --subjects"
        )
    scores = torch.empty(len(rows), len(LETTERS))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0][0]))  # similar lengths together
    for begin in tqdm(range(0, len(order), batch_size), desc="answering", unit="batch", disable=None):
        chosen = order[begin : begin + batch_size]
        for i, values in zip(chosen, score_rows(model, [rows[i] for i in chosen]), strict=True):
            scores[i] = values
    return scores


def encode_letters(tokenizer, prompt: str) -> list[tuple[list[int], int]]:
    """For each letter: the ids of prompt and letter, and how many of them are the prompt's."""
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    return [(tokenizer(f"{prompt} {letter}", add_special_tokens=False).input_ids, start) for letter in LETTERS]


def score_rows(model, rows: list[list[tuple[list[int], int]]]) -> list[torch.Tensor]:
    """log p of each letter's tokens after its prompt: rows of four (ids, start) -> rows of (4,)."""
    sequences, places = [], []  # what is read, letters of a row that share it reading it once; where each letter is
    for row in rows:
        read = [tuple(ids[:-1]) for ids, _ in row]
        own = list(dict.fromkeys(read))
        places.append([len(sequences) + own.index(ids) for ids in read])
        sequences += [torch.tensor(ids) for ids in own]
    input_ids = pad_sequence(sequences, batch_first=True).to(model.device)
    mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True).to(model.device)
    longest = max(len(ids) - start for row in rows for ids, start in row)
    needed = min(input_ids.shape[1], longest + max(map(len, sequences)) - min(map(len, sequences)))
    logprobs = (
        model(input_ids, attention_mask=mask, logits_to_keep=needed, use_cache=False).logits.float().log_softmax(-1)
    )
    cut = input_ids.shape[1] - needed  # places whose logits were not kept
    return [
        torch.stack(
            [
                sum(logprobs[place, at - 1 - cut, ids[at]] for at in range(start, len(ids)))
                for place, (ids, start) in zip(of_row, row, strict=True)
            ]
        ).cpu()
        for of_row, row in zip(places, rows, strict=True)
    ]


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927)."""
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / total / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def tabulate(questions: list[Question], scores: torch.Tensor, categories: dict[str, str]) -> list[dict]:
    """Right answers by subject, by category and in all, each with its interval."""
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for question, guess in zip(questions, scores.argmax(-1).tolist(), strict=True):
        right = guess == question.answer
        groups["subject", question.subject].append(right)
        if question.subject in categories:
            groups["category", categories[question.subject]].append(right)
        groups["all", "all"].append(right)
    table = []
    for (kind, name), hits in sorted(
        groups.items(), key=lambda item: (("subject", "category", "all").index(item[0][0]), item)
    ):
        low, high = wilson(sum(hits), len(hits))
        row = {
            "kind": kind,
            "name": name,
            "questions": len(hits),
            "right": sum(hits),
            "accuracy": sum(hits) / len(hits),
        }
        table.append({**row, "low": low, "high": high, "above_chance": low > CHANCE})
    return table


def print_table(table: list[dict]) -> None:
    width, kind = max(len(row["name"]) for row in table), None
    for row in table:
        if row["kind"] != kind:
            kind = row["kind"]
            print(f"{kind:<{width}}  questions  accuracy  95% interval")
        interval = f"{row['low']:.1%}-{row['high']:.1%}" + ("  above chance" if row["above_chance"] else "")
        print(f"{row['name']:<{width}}  {row['questions']:>9}  {row['accuracy']:>8.1%}  {interval}")


def write_answers(path: Path, questions: list[Question], scores: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "id", "answer", "guess", *(f"logprob_{letter}" for letter in LETTERS)])
        for question, row in zip(questions, scores, strict=True):
            letters = LETTERS[question.answer], LETTERS[int(row.argmax())]
            writer.writerow([question.subject, question.number, *letters, *(f"{value:.5f}" for value in row.tolist())])


if __name__ == "__main__":
    run_script(parse_args, main)
