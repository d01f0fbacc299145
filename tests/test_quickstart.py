"""scripts/quickstart.py: from data to report, every later stage measured, taken up again, ended by a failure."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import chat, ends, write_rows

from model.errors import InputError
from scripts import quickstart


def test_report_is_a_table_whatever_the_model_says():
    gain = {"stage": "dpo", "measure": "m", "before": 0.5, "after": 0.875, "against": "chance", "seconds": 3.2}
    by = {measure: {"capital en": [number, 4]} for number, measure in enumerate(quickstart.MEASURES)}
    report = {
        "score": 0.5, "device": "cpu", "train_seconds": 61.0, "total_seconds": 70.4, "gains": [gain],
        "scores": dict.fromkeys(quickstart.MEASURES, 0.75), "by_relation": by, "honest": 0.875, "refused": 0.01,
        "follow_ups": 0.5,
    }  # fmt: skip
    text = quickstart.format_report(report, [{"question": "a|b?", "answer": "one\ntwo | three", "right": False}])
    assert "# Quickstart: 50.0% of the questions right" in text and "| words of their own | 75.0% |" in text
    assert "| capital en | 0 of 4 | 1 of 4 | 2 of 4 |" in text
    assert "| unanswerable questions: says that it does not know | 87.5% |" in text
    assert "| answerable questions: says that it does not know | 1.0% |" in text
    assert "| a\\|b? | one two \\| three | wrong |" in text
    assert "| dpo | m | 50.0% (chance) | 87.5% | 3.2 |" in text
    assert all(line.replace("\\|", "").count("|") in (0, 3, 4, 5, 6) for line in text.splitlines())


def small_demo(demo):
    """Four facts in every format."""
    demo.mkdir()
    facts = [("France", "Paris"), ("Japan", "Tokyo"), ("Italy", "Rome"), ("Spain", "Madrid")]
    thought = "<think>\n{}.\n</think>\n<answer>\n{}\n</answer>"
    chats = [chat(f"What is the capital of {a}?", f"{b}.") for a, b in facts]
    held_out = [chat(f"{a}: capital?", f"{b}.") | {"answer": b, "language": "en", "relation": "city"} for a, b in facts]
    pairs = [
        {"chosen": row["conversations"], "rejected": [row["conversations"][0], {"role": "assistant", "content": "No."}]}
        for row in chats
    ]
    for name in "unseen_val", "follow_up_val", "own_words_val", "unanswerable_val":
        write_rows(demo / f"{name}.jsonl", held_out)
    write_rows(demo / "pretrain.jsonl", [{"text": f"The capital of {a} is {b}."} for a, b in facts])
    for name in "sft", "lora_identity", "lora_medical":
        write_rows(demo / f"{name}.jsonl", chats)
        write_rows(demo / f"{name}_val.jsonl", held_out)
    for suffix in "", "_val":
        write_rows(demo / f"dpo{suffix}.jsonl", pairs)
        rows = [chat(f"{a}?", thought.format(b, b)) | {"answer": b} for a, b in facts]
        write_rows(demo / f"reason{suffix}.jsonl", rows)
        write_rows(demo / f"rlaif{suffix}.jsonl", rows)
    return facts


@pytest.fixture
def small_quickstart(tmp_path, monkeypatch):
    """Facts and the commands that quickstart runs: in this process, on four facts, with tiny models."""
    demo, commands = tmp_path / "demo", []
    facts = small_demo(demo)

    def in_process(command, **keys):
        commands.append(command)
        module = importlib.import_module(f"trainer.{Path(command[1]).stem}")
        module.main(module.parse_args(command[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quickstart, "ensure_demo_data", lambda: demo)
    sizes = {"small": {"hidden_size": 64, "num_hidden_layers": 2}, "full": {"hidden_size": 96, "num_hidden_layers": 2}}
    monkeypatch.setattr(quickstart, "SIZES", sizes)
    monkeypatch.setattr(quickstart, "STUDENT", {"hidden_size": 32, "num_hidden_layers": 2})
    few = ["--max_new_tokens=8", "--max_seq_len=64", "--accumulation_steps=1", "--max_steps=2", "--batch_size=2"]
    for stage, flags in quickstart.RL_FLAGS.items():
        monkeypatch.setitem(quickstart.RL_FLAGS, stage, [*flags, *few])
    monkeypatch.setattr(quickstart.subprocess, "run", in_process)
    return facts, commands


def test_quickstart_from_data_to_report(small_quickstart, tmp_path, capsys, monkeypatch):
    facts, commands = small_quickstart
    known = {"sft_val": ("Paris", "Tokyo", "Rome"), "unseen_val": ("Rome",), "own_words_val": ("Paris", "Rome")}
    known |= {"unanswerable_val": ("Madrid",), "follow_up_val": ()}

    def answered(job, model, name, max_new_tokens=48):
        rows = job.rows(name)
        said = ["I do not know." if row["answer"] == "Paris" else "Rome" for row in rows]
        return rows, said, [row["answer"] in known[Path(name).stem] for row in rows]

    monkeypatch.setattr(quickstart.Job, "answered", answered)
    out_dir = tmp_path / "a place"
    code, out, err = ends(quickstart, [f"--out_dir={out_dir}", "--device=cpu", "--seed=5"], capsys)
    assert (code, err) == (0, "")
    assert [Path(command[1]).name for command in commands] == ["train_pretrain.py", "train_full_sft.py"]
    assert all("--seed=5" in command and command[0] == sys.executable for command in commands)
    report = json.loads((out_dir / "quickstart.json").read_text(encoding="utf-8"))
    assert list(report["scores"].values()) == [0.75, 0.25, 0.5] and report["device"] == "cpu"
    assert (
        report["score"] == 0.25 and report["honest"] == 0.25 and report["refused"] == 0.25
    )  # the lowest is the headline
    assert report["by_relation"]["held-out wordings"] == {"city en": [3, 4]}
    assert [sample["question"] for sample in report["samples"]] == 3 * [f"{a}: capital?" for a, _ in facts]
    assert (out_dir / "quickstart.md").read_text(encoding="utf-8") in out
    assert f"--out_dir '{out_dir}'" in out  # the advice can be pasted
    assert (out_dir / "full_sft_64.pth").exists()


def test_quickstart_measures_every_later_stage(small_quickstart, tmp_path, capsys):
    code, out, _ = ends(quickstart, [f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--stages", "all"], capsys)
    assert code == 0
    report = json.loads((tmp_path / "out" / "quickstart.json").read_text(encoding="utf-8"))
    gains = {(gain["stage"], gain["measure"]): gain for gain in report["gains"]}
    measures = {"lora": 4, "dpo": 2, "reward": 1, "distillation": 1, "reason": 2, "ppo": 3, "grpo": 3, "spo": 3}
    assert {stage: sum(key[0] == stage for key in gains) for stage in measures} == measures
    assert all(0 <= gain[key] <= 1 for gain in gains.values() for key in ("before", "after"))
    dpo = (tmp_path / "out" / "logs" / "rlhf_64.jsonl").read_text().splitlines()
    preferred = gains["dpo", "pairs preferred rightly, against the start"]
    assert (preferred["before"], preferred["after"]) == (0.5, json.loads(dpo[-1])["val_accuracy"])
    assert gains["dpo", "general score"]["before"] == report["scores"]["held-out wordings"]
    assert "starting from" in out and "rlhf_64.pth" in out.split("train_distill_reason.py")[1]
    assert (tmp_path / "out" / "logs" / "rewards.png").stat().st_size > 10_000
    for stage, weights in ("ppo", "ppo_actor"), ("grpo", "grpo"), ("spo", "spo"):  # as training tells it itself
        told = json.loads((tmp_path / "out" / "logs" / f"{weights}_64.jsonl").read_text().splitlines()[-1])
        assert gains[stage, "new problems, right and in form"]["after"] == told["val_accuracy"]
        assert gains[stage, "new problems, right anyhow"]["after"] == told["val_lenient_accuracy"]
    _, commands = small_quickstart
    alone, taught = (command for command in commands if "train_distillation" in command[1])
    assert [flag for flag in alone if flag not in taught] == ["--alpha=1"]  # the teacher is all that differs


def test_quickstart_takes_up_where_it_was(small_quickstart, tmp_path, capsys):
    _, commands = small_quickstart
    flags = [f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    assert ends(quickstart, flags, capsys)[0] == 0
    del commands[:]
    assert ends(quickstart, [*flags, "--stages", "reward", "dpo"], capsys)[0] == 0
    assert [Path(command[1]).name for command in commands] == ["train_dpo.py", "train_reward.py"]


def test_rewarded_stages_start_from_a_reasoning_policy(small_quickstart, tmp_path, capsys):
    """One is trained before the first of them, and only if there is none; the plot has earlier runs' curves too."""
    _, commands = small_quickstart
    flags = [f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    assert ends(quickstart, flags, capsys)[0] == 0
    del commands[:]
    code, out, _ = ends(quickstart, [*flags, "--stages", "spo", "grpo"], capsys)
    names = [Path(command[1]).name for command in commands]
    assert code == 0 and names == ["train_distill_reason.py", "train_grpo.py", "train_spo.py"]
    assert "the stage reason comes before it" in out and "the curves of grpo, spo: " in out
    assert all(out.split(name)[1].count("reason_64.pth") for name in names[1:])  # what each starts from
    del commands[:]
    code, out, _ = ends(quickstart, [*flags, "--stages", "ppo"], capsys)
    assert code == 0 and [Path(command[1]).name for command in commands] == ["train_ppo.py"]
    assert "the curves of ppo, grpo, spo: " in out


def test_size_is_what_suits_the_device_or_what_is_asked_for(small_quickstart, tmp_path, capsys):
    _, commands = small_quickstart
    flags = [f"--out_dir={tmp_path}", "--device=cpu", "--stages", "pretrain"]
    for more, width, rate in ([], 64, "small"), (["--size=small"], 64, "small"), (["--size=full"], 96, "full"):
        del commands[:]
        assert ends(quickstart, [*flags, *more], capsys)[0] == 0
        assert f"--hidden_size={width}" in commands[0] and f"--learning_rate={quickstart.RATES[rate][0]}" in commands[0]
        assert (tmp_path / f"pretrain_{width}.pth").exists()


def test_quickstart_ends_when_a_stage_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "ensure_demo_data", lambda: tmp_path)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    code, _, err = ends(quickstart, [f"--out_dir={tmp_path}", "--device=cpu"], capsys)
    assert code == 1 and err == "error: train_pretrain.py ended with exit code 1; its message stands above\n"
    with pytest.raises(InputError):
        quickstart.train("train_pretrain.py", [])
