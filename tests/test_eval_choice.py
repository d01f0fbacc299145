"""scripts/eval_choice.py: the letters' probabilities, the score, the table, and agreement with lm-eval."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import convert_model, eval_choice

HEADER = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。"
SUBJECTS = {"anatomy": 7, "law": 5}  # questions


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=6400, num_attention_heads=4)
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():  # far from uniform, so that guesses differ
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def folder(tmp_path):
    for split, count in (("dev", 5), ("test", None)):
        for subject, questions in SUBJECTS.items():
            path = tmp_path / "cmmlu" / split / f"{subject}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
                for i in range(count or questions):
                    choices = [f"选项{letter}{i}" * (1 + i % 3) for letter in "甲乙丙丁"]
                    writer.writerow([i, f"{split} {subject} 第{i}题，哪一项正确？", *choices, "ABCD"[(i * 7 + 1) % 4]])
    return tmp_path / "cmmlu"


@pytest.fixture
def evaluate(model, tmp_path):
    """evaluate(folder, flags) -> the table of the JSON report, by name."""
    keys = {"stage": "full_sft", "tokens_seen": 0, "data_path": "x", "data_hash": "x", "trained_length": 64}
    save_weights(model, tmp_path / "out" / "full_sft_64.pth", **keys)

    def run(folder, *flags):
        report = tmp_path / "report.json"
        common = [str(folder), f"--out_dir={tmp_path / 'out'}", f"--json={report}", "--device=cpu", "--dtype=float32"]
        eval_choice.main(eval_choice.parse_args([*common, *flags]))
        return {row["name"]: row for row in json.loads(report.read_text())["table"]}

    return run


def direct_logprob(model, tokenizer, prompt, letter):
    """log p(" letter" | prompt), token by token."""
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = tokenizer(f"{prompt} {letter}", add_special_tokens=False).input_ids
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))


def test_letter_logprobs_equal_single_forward_passes(model, tokenizer):
    """Padding, batches and shared prompts change nothing."""
    prompts = ["答案：", "一个很长很长的问题？\n答案：" * 5, "短？\n答案：", "middle one?\n答案：" * 2]
    with torch.no_grad():
        found = eval_choice.letter_logprobs(model, tokenizer, prompts, batch_size=3)
        expected = [[direct_logprob(model, tokenizer, prompt, letter) for letter in "ABCD"] for prompt in prompts]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_a_prompt_may_fill_the_context_and_not_pass_it(tokenizer):
    prompts = ["短？\n答案：", "一个很长很长的问题？\n答案：" * 5]
    length = len(tokenizer(prompts[1], add_special_tokens=False).input_ids)
    for context in (length, length - 1):
        config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=context)
        model = MiniMindForCausalLM(config).eval()
        if context == length:
            assert eval_choice.letter_logprobs(model, tokenizer, prompts, batch_size=2).isfinite().all()
        else:
            with pytest.raises(InputError, match=f"{length} tokens, more than the context of {context}.*--subjects"):
                eval_choice.letter_logprobs(model, tokenizer, prompts, batch_size=2)


def test_letters_of_several_tokens_after_unequal_prefixes(model):
    """A vocabulary that spells a letter with two tokens is scored by the sum of both."""
    row = [([5, 6, 7, 8], 2), ([5, 6, 7, 9], 2), ([5, 6, 10, 8], 2), ([5, 6, 11], 2)]
    with torch.no_grad():
        (found,) = eval_choice.score_rows(model, [row])
        for value, (ids, start) in zip(found.tolist(), row, strict=True):
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert value == pytest.approx(
                sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))), abs=1e-4
            )


@pytest.mark.parametrize("shots", [0, 2])
def test_score_by_hand(shots, folder, model, tokenizer, evaluate, tmp_path):
    """Right answers counted with prompts written out here; the CSV holds every guess."""
    answers = tmp_path / "answers.csv"
    table = evaluate(folder, f"--shots={shots}", f"--csv={answers}")
    total = 0
    for subject in SUBJECTS:
        rows = {
            split: list(csv.DictReader((folder / split / f"{subject}.csv").open(encoding="utf-8")))
            for split in ("dev", "test")
        }

        def text(row):
            return f"{row['Question']}\nA. {row['A']}\nB. {row['B']}\nC. {row['C']}\nD. {row['D']}\n答案："

        worked = [f"{text(row)} {row['Answer']}" for row in rows["dev"][:shots]]
        right = 0
        for row in rows["test"]:
            prompt = "\n\n".join([HEADER.format(subject=subject), *worked, text(row)])
            with torch.no_grad():
                scores = {letter: direct_logprob(model, tokenizer, prompt, letter) for letter in "ABCD"}
            right += max(scores, key=scores.get) == row["Answer"]
        assert (table[subject]["right"], table[subject]["questions"]) == (right, SUBJECTS[subject])
        total += right
    assert (table["all"]["right"], table["all"]["questions"]) == (total, 12)
    written = list(csv.DictReader(answers.open(encoding="utf-8")))
    assert sum(row["answer"] == row["guess"] for row in written) == total and len(written) == 12


@pytest.mark.parametrize("shots", [0, 5])
def test_agrees_with_lm_eval(shots, folder, model, tokenizer, evaluate):
    """The same questions, weights and shots through lm-eval's CMMLU template give the same right answers."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1"}
    lm_eval = pytest.importorskip("lm_eval", reason="development package")
    from lm_eval.models.huggingface import HFLM

    template = {
        "test_split": "test", "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
        "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    tasks = [
        {
            **template, "task": f"local_{subject}", "dataset_path": "csv",
            "description": HEADER.format(subject=subject) + "\n\n",
            "dataset_kwargs": {"data_files": {s: str(folder / s / f"{subject}.csv") for s in ("test", "dev")}},
        }
        for subject in SUBJECTS
    ]  # fmt: skip
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=tasks, num_fewshot=shots, bootstrap_iters=0
    )
    ours = evaluate(folder, f"--shots={shots}")
    for subject in SUBJECTS:
        assert theirs["results"][f"local_{subject}"]["acc,none"] == pytest.approx(ours[subject]["accuracy"])


def test_lm_eval_runs_the_written_tasks_on_an_exported_folder(folder, evaluate, tmp_path, capsys):
    """The documented commands, for real: convert, write the tasks, run what was printed."""
    pytest.importorskip("lm_eval", reason="development package")
    ours = evaluate(folder, "--shots=2")
    convert_model.main(
        convert_model.parse_args([str(tmp_path / "out" / "full_sft_64.pth"), str(tmp_path / "exported")])
    )
    capsys.readouterr()
    flags = [str(folder), "--shots=2", f"--lm_eval_tasks={tmp_path / 'tasks'}"]
    eval_choice.main(eval_choice.parse_args(flags))
    printed = capsys.readouterr().out.splitlines()[-1].replace("FOLDER", str(tmp_path / "exported"))
    command = [sys.executable, "-m", *shlex.split(printed), "--device=cpu", f"--output_path={tmp_path / 'result'}"]
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "result").rglob("results_*.json")
    theirs = json.loads(result.read_text())["results"]
    for subject in SUBJECTS:
        assert theirs[f"local_{subject}"]["acc,none"] == pytest.approx(ours[subject]["accuracy"])
    assert theirs["local_choice"]["acc,none"] == pytest.approx(ours["all"]["accuracy"])


def test_categories_splits_limits_and_intervals(folder, evaluate, capsys):
    mapping = {"anatomy": ["Anatomy", "解剖学", "STEM"], "law": ["Law", "法学", "Humanities"]}
    (folder / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    table = evaluate(folder, "--limit=3")
    assert {name: table[name]["questions"] for name in ("STEM", "Humanities", "all")} == {
        "STEM": 3,
        "Humanities": 3,
        "all": 6,
    }
    assert "chance 25.0%" in capsys.readouterr().out
    assert evaluate(folder, "--split=dev", "--subjects", "law")["all"]["questions"] == 5
    low, high = eval_choice.wilson(8, 10)  # worked by hand from Wilson's formula
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert eval_choice.wilson(0, 5)[0] == 0 and math.isclose(eval_choice.wilson(5, 5)[1], 1)


@pytest.mark.parametrize("columns", ["id,question,A,B,C,D,answer\n0,", "question,A,B,C,D,answer\n"])
def test_c_eval_names_files_after_their_split(columns, folder, evaluate):
    """C-Eval: val/law_val.csv with id, question, answer in lower case; the mark of byte order is part of no name."""
    (folder / "val").mkdir()
    rows = columns + "哪个对？,a,b,c,d,B\n"
    (folder / "val" / "law_val.csv").write_text("\ufeff" + rows, encoding="utf-8")
    assert evaluate(folder)["law"]["questions"] == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,question,A,B,C,D,answer\n0,q,a,b,c,,A\n", "row 2 has no d"),
        ("id,question,A,B,C,D,answer\n0,q,a,b,c,d,E\n", "no letter A-D"),
        ("id,question,A,B,C,D,answer\n0,q,a,b,c,d,AB\n", "'AB', which is no letter A-D"),
        ("id,question,A,B,C,D,answer\n0,q,a,b,c,d,abcd\n", "'ABCD', which is no letter A-D"),
        ("id,question,A,B,C,D,answer\n", "holds no questions"),
        ("", "holds no questions"),
        ("id,question,A,B,C,D\n0,q,a,b,c,d\n", "has no answers"),
        ("id,question,A,B,C,D,answer\n0,q,a,b,c,d,A,x\n", "row 2 has more fields than the header"),
    ],
)
def test_bad_files(content, sentence, folder, evaluate):
    (folder / "test" / "law.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        evaluate(folder)


@pytest.mark.parametrize("mapping", [{"law": "law"}, {"law": ["Law", "法学"]}, {"law": ["Law", "法学", 3]}, ["law"], 3])
def test_a_mapping_of_something_else_is_refused(mapping, folder, evaluate):
    (folder / "subject_mapping.json").write_text(json.dumps(mapping), encoding="utf-8")
    with pytest.raises(InputError, match=r"is no mapping of subjects to \[English name, Chinese name, category\]"):
        evaluate(folder)


def test_two_files_of_one_subject_are_refused(folder, evaluate):
    shutil.copy(folder / "test" / "law.csv", folder / "test" / "law_test.csv")
    with pytest.raises(InputError, match=r"law\.csv and .*law_test\.csv are about the same subject"):
        evaluate(folder)


def test_braces_in_a_header_are_text(folder, tmp_path):
    header = '{subject} {topic} {"a": 1} {'
    flags = [str(folder), f"--header={header}", f"--lm_eval_tasks={tmp_path / 'tasks'}", "--subjects", "law"]
    eval_choice.main(eval_choice.parse_args(flags))
    first = json.loads((tmp_path / "tasks" / "law.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"].startswith('law {topic} {"a": 1} {\n\n')


def test_a_header_that_is_no_text_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="--header is no Unicode text"):
        eval_choice.main(eval_choice.parse_args([str(folder), "--header=\ud83d"]))


@pytest.mark.parametrize("use_moe", [False, True])
def test_an_export_scores_as_its_weights_do(use_moe, folder, tmp_path):
    weights = tmp_path / "full_sft_64.pth"
    torch.manual_seed(5)
    keys = {"stage": "full_sft", "tokens_seen": 0, "data_path": "x", "data_hash": "x", "trained_length": 64}
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, use_moe=use_moe))
    save_weights(model, weights, **keys)
    convert_model.main(convert_model.parse_args([str(weights), str(tmp_path / "folder")]))
    scores = []
    for path in (weights, tmp_path / "folder"):
        flags = [str(folder), f"--weight={path}", f"--csv={tmp_path / 'a.csv'}", "--device=cpu", "--dtype=float32"]
        eval_choice.main(eval_choice.parse_args(flags))
        with (tmp_path / "a.csv").open(encoding="utf-8") as file:
            scores.append([float(row[f"logprob_{letter}"]) for row in csv.DictReader(file) for letter in "ABCD"])
    assert len(scores[0]) == 48 and scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_bad_folders(folder, evaluate, tmp_path):
    for flags, sentence in (
        ([tmp_path / "nothing"], "is no folder"),
        ([folder, "--split=val"], "has no split val: it holds dev, test"),
        ([folder, "--subjects", "law", "magic"], "has no subject magic: it has anatomy, law"),
        ([folder, "--shots=9"], "has 5 worked questions on anatomy, --shots asks for 9"),
    ):
        with pytest.raises(InputError, match=sentence):
            evaluate(*flags)
