"""A run that was killed, stopped or out of disk and resumed ends with the bits of one that was left in peace."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from processes import ROOT, Training

from model.errors import InputError, run_script
from model.LMConfig import MiniMindConfig
from model.loading import find_weights, load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_full_sft, train_pretrain
from trainer.runtime.checkpoint import agree, find_checkpoint, read_checkpoint, read_whole, same_bits

TINY = ["--device=cpu", "--dtype=float32", "--max_seq_len=64", "--packing=0", "--log_interval=3", "--eval_interval=5"]
STEPS = 16  # of 8 rows; an epoch of 36 rows has 5
NAME = "pretrain_64"
SAME_SIZE = "--hidden_size=64 --num_hidden_layers=2"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def text_rows(count):
    return [{"text": f"第{i}句话：" + "the quick brown fox jumps. " * (1 + i % 4)} for i in range(count)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, and weights with dropout to start from: its random numbers have to go on too."""
    home = tmp_path_factory.mktemp("home")
    write_rows(home / "texts.jsonl", text_rows(36))
    write_rows(home / "texts_val.jsonl", text_rows(5))
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, dropout=0.1))
    save_weights(
        model, home / "start.pth", stage="pretrain", tokens_seen=0, data_path="x", data_hash="h", trained_length=64
    )
    return home


def flags_of(home, out_dir, *flags):
    common = [f"--data_path={home / 'texts.jsonl'}", f"--from_weight={home / 'start.pth'}", f"--out_dir={out_dir}"]
    return [*TINY, *common, f"--max_steps={STEPS}", "--batch_size=8", "--save_interval=2", *flags]


@pytest.fixture(scope="module")
def peace(home):
    """The folder of a run that nobody disturbed."""
    run = Training("pretrain", flags_of(home, home / "peace"), home / "peace" / "run")
    assert run.wait() == [0], run.err()
    assert run.err() == ""
    return home / "peace"


def log_of(out_dir):
    lines = (out_dir / "logs" / f"{NAME}.jsonl").read_text().splitlines()
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss")
    return [{key: record.get(key) for key in keys} for record in map(json.loads, lines)]


def all_whole(out_dir):
    """Every file under its final name can be read to its end."""
    for path in out_dir.rglob("*"):
        if path.name.endswith("_resume.pth"):
            assert read_checkpoint(path)["place"]["step"] > 0
        elif path.suffix == ".pth":
            load_model(path)
        elif path.suffix == ".png":
            assert path.read_bytes()[-8:-4] == b"IEND"
        elif path.suffix == ".json":
            json.loads(path.read_text())


SLOW = (processes.slow_steps,)
DISASTERS = {  # name: (hook of the process, signal and the words it waits for, exit code), one after the other
    "killed before the first step": (None, ("memory: ", signal.SIGKILL), -9),
    "killed before the weights get their name": ((processes.die_at_rename, "64.pth", False), None, -9),
    "killed between the weights and their JSON": ((processes.die_at_rename, "64.pth", True), None, -9),
    "killed before the checkpoint gets its name": ((processes.die_at_rename, "resume.pth", False), None, -9),
    "killed after the checkpoint got its name": ((processes.die_at_rename, "resume.pth", True), None, -9),
    "killed half-way through the weights": ((processes.die_in_write, 1), None, -9),
    "killed half-way through the checkpoint": ((processes.die_in_write, 2), None, -9),
    "disk full in the checkpoint": ((processes.fill_disk_in_write, 2), None, 1),
    "killed while the log is cut off": ((processes.die_in_log_rewrite,), None, -9),
    "SIGTERM": (SLOW, ("pretrain 3/", signal.SIGTERM), 143),
    "Ctrl-C": (SLOW, ("pretrain 6/", signal.SIGINT), 130),
    "Ctrl-C twice in a save": ((processes.interrupt_twice_in_save,), None, 130),
    "killed in the third epoch": (SLOW, ("pretrain 12/", signal.SIGKILL), -9),
    "nothing": (None, None, 0),
}


@pytest.fixture(scope="module")
def disturbed(home, peace):
    """One folder through all disasters, resumed after each: {name: (exit code, process, place after it)}."""
    out_dir, ended = home / "disturbed", {}
    for number, (name, (hook, wait, _)) in enumerate(DISASTERS.items()):
        run = Training("pretrain", flags_of(home, out_dir, "--from_resume=1"), home / f"run{number}", hook=hook)
        if wait:
            run.signal_at(*wait)
        (code,) = run.wait()
        all_whole(out_dir)
        checkpoint = out_dir / "checkpoints" / f"{NAME}_resume.pth"
        ended[name] = code, run, read_checkpoint(checkpoint)["place"]["step"] if checkpoint.exists() else 0
        if name == "SIGTERM":
            shutil.copytree(out_dir, home / "half")
    return ended


@pytest.mark.parametrize("name", DISASTERS)
def test_how_a_disturbed_run_ends(name, disturbed):
    code, run, _ = disturbed[name]
    assert code == DISASTERS[name][2], run.err()
    assert "Traceback" not in run.err()
    if code == 1:
        assert run.err() == "error: the disk is full: free some space or choose another --out_dir\n"


def test_places_of_the_disturbed_run(disturbed):
    """What was saved at the end of each run: no save that was begun counts, every finished one does."""
    places = [place for _, _, place in disturbed.values()]
    assert places[:9] == [0, 0, 0, 0, 2, 2, 2, 2, 2]
    stopped, interrupted, twice, third = places[9:13]
    assert 3 <= stopped < 6 <= interrupted == twice < 12 and third % 2 == 0 and 10 <= third < 16
    assert places[13] == STEPS
    _, first, _ = disturbed["killed before the weights get their name"]
    assert "no checkpoint of pretrain to resume" in first.out() and "starting anew" in first.out()
    _, last, _ = disturbed["nothing"]
    assert re.search(rf"^resumed after step {third}: epoch [23], row ", last.out(), re.MULTILINE) and last.err() == ""
    for name, number in ("SIGTERM", stopped), ("Ctrl-C", interrupted):
        err = disturbed[name][1].err()
        assert f"stopped and saved after step {number}; to go on: python {ROOT}/trainer/train_pretrain.py --" in err
        assert err.rstrip().endswith("--from_resume 1") and err.count("--from_resume") == 1
    assert "stopped and saved" not in disturbed["Ctrl-C twice in a save"][1].err()


def test_a_disturbed_run_ends_with_the_same_bits(home, peace, disturbed):
    expected, found = read_whole(peace), read_whole(home / "disturbed")
    assert expected["engines"]["model"]["optimizer"] and expected["random"] and expected["place"]["epoch"] == 3
    same_bits(expected, found)
    assert {value.dtype for value in found["engines"]["model"]["weights"].values()} == {
        torch.float32
    }  # half erases small updates
    assert not list(home.rglob("*.tmp"))


def test_a_disturbed_log_has_each_line_once(home, peace, disturbed):
    log = log_of(home / "disturbed")
    assert [record["step"] for record in log] == [3, 5, 6, 9, 10, 12, 15, 16]
    assert log == log_of(peace)
    times = [json.loads(line)["elapsed_s"] for line in (home / "disturbed/logs/pretrain_64.jsonl").open()]
    assert times == sorted(times)
    assert (home / "disturbed" / "logs" / f"{NAME}.png").exists()


@pytest.mark.parametrize(
    ("hook", "flags", "same"),
    [
        (None, ["--num_workers=1"], True),
        ((processes.forget_optimizer,), [], False),
        ((processes.forget_random_state,), [], False),
    ],
    ids=["loader process", "optimizer forgotten", "random state forgotten"],
)
def test_these_tests_notice_what_is_forgotten(hook, flags, same, home, peace, disturbed, tmp_path):
    shutil.copytree(home / "half", tmp_path / "half")
    flags = flags_of(home, tmp_path / "half", "--from_resume=1", *flags)
    run = Training("pretrain", flags, tmp_path / "run", hook=hook)
    assert run.wait() == [0], run.err()
    expected, found = (read_whole(folder)["engines"]["model"]["weights"] for folder in (peace, tmp_path / "half"))
    assert all(torch.equal(expected[name], found[name]) for name in expected) is same


# ----------------------------------------------------------------------------------------------------------- sentences


@pytest.fixture
def finished(peace, tmp_path):
    """A copy of the undisturbed run, to fail in."""
    shutil.copytree(peace, tmp_path / "out")
    return tmp_path / "out"


def ends(script, flags, capsys):
    """(exit code, stdout, stderr) of a training in this process."""
    code = 0
    try:
        run_script(lambda: script.parse_args(list(map(str, flags))), script.main)
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts}


def refused(home, out_dir, capsys, *flags):
    """The sentence that a resume ends with; nothing may have changed."""
    before = contents(out_dir)
    flags = flags_of(home, out_dir, "--from_resume", "--max_steps=20", *flags)
    code, _, err = ends(train_pretrain, flags, capsys)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert contents(out_dir) == before
    return err


def test_a_finished_run_says_so(home, finished, capsys):
    assert "this run ended after step 16" in refused(home, finished, capsys, f"--max_steps={STEPS}")


def test_a_finished_run_can_be_lengthened(home, finished, capsys):
    code, out, err = ends(train_pretrain, flags_of(home, finished, "--from_resume", "--max_steps=18"), capsys)
    assert code == 0 and "resumed after step 16: epoch 4, row 8" in out, err
    assert [record["step"] for record in log_of(finished)][-3:] == [15, 16, 18]


@pytest.mark.parametrize(
    ("flag", "sides"),
    [
        ("--seed=7", ("--seed 42", "now it is 7")),
        ("--max_seq_len=32", ("--max_seq_len 64", "now it is 32")),
        ("--packing=1", ("--packing False", "now it is True")),
        ("--optimizer=adamw", ("--optimizer muon", "now it is adamw")),
        ("--num_hidden_layers=4", ("num_hidden_layers 2", "now it is 4")),
        ("--preset=minimind2", ("",)),
        (f"{SAME_SIZE} --preset=minimind-v1-small", ("num_attention_heads 8", "now it is 16")),
        (f"{SAME_SIZE} --preset=minimind2-moe --use_moe=0 --num_hidden_layers=3", ("num_hidden_layers 2", "it is 3")),
    ],
)
def test_other_settings_are_refused(flag, sides, home, finished, capsys):
    if flag == "--preset=minimind2":  # the checkpoint of that size is another file, which is not there
        code, out, _ = ends(train_pretrain, flags_of(home, finished, "--from_resume", flag), capsys)
        assert code == 1 and "no checkpoint of pretrain to resume" in out
        return
    err = refused(home, finished, capsys, *flag.split())
    assert "_resume.pth was written with" in err and all(side in err for side in sides)


def test_the_preset_that_a_run_began_with_goes_on(home, finished, capsys):
    flags = [*SAME_SIZE.split(), "--preset=minimind2-small", f"--max_steps={STEPS}"]
    assert "this run ended after step 16" in refused(home, finished, capsys, *flags)


def test_changed_data_is_refused(home, finished, capsys, tmp_path):
    other = write_rows(tmp_path / "texts.jsonl", [*text_rows(35), {"text": "changed"}])
    err = refused(home, finished, capsys, f"--data_path={other}", f"--val_path={home / 'texts_val.jsonl'}")
    assert "_resume.pth was written with data hash " in err and ", now it is " in err


def test_what_a_checkpoint_did_not_record_cannot_differ(tmp_path):
    """That of an earlier version goes on."""
    agree(tmp_path, {"--seed": 1}, {"--seed": 1, "teacher config": "later"})
    with pytest.raises(InputError, match=r"was written with --seed 1, now it is 2"):
        agree(tmp_path, {"--seed": 1}, {"--seed": 2, "teacher config": "later"})


@pytest.mark.parametrize("newest", [32, 64, 128])
def test_the_checkpoint_and_the_weights_written_last_are_found(newest, tmp_path):
    """Whatever their sizes are called."""
    (tmp_path / "checkpoints").mkdir()
    for size in (32, 64, 128):
        for path in tmp_path / "checkpoints" / f"pretrain_{size}_resume.pth", tmp_path / f"pretrain_{size}.pth":
            path.touch()
            os.utime(path, (9, 9) if size == newest else (size / 100, size / 100))
    found = find_checkpoint(tmp_path, "pretrain", None, {}, any_size=True)
    assert found == tmp_path / "checkpoints" / f"pretrain_{newest}_resume.pth"
    assert find_weights(tmp_path, "pretrain") == tmp_path / f"pretrain_{newest}.pth"


@pytest.mark.parametrize("size", [0, 100, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_refused_by_name(size, home, finished, capsys):
    path = finished / "checkpoints" / f"{NAME}_resume.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    assert refused(home, finished, capsys).startswith(f"error: {path} is cut short or no checkpoint (")


@pytest.mark.parametrize(
    ("content", "words"), [({"x": torch.zeros(1)}, "--from_weight"), ({"format": 99}, "update MiniMind")]
)
def test_other_files_are_no_checkpoints(content, words, home, finished, capsys):
    path = finished / "checkpoints" / f"{NAME}_resume.pth"
    if "format" in content:
        content = {**torch.load(path, weights_only=True), **content}
    torch.save(content, path)
    err = refused(home, finished, capsys)
    assert str(path) in err and words in err


def test_a_new_run_says_that_it_replaces_a_checkpoint(home, finished, capsys):
    code, out, _ = ends(train_pretrain, flags_of(home, finished, "--max_steps=1"), capsys)
    assert code == 0 and "note: " in out and "_resume.pth of an earlier run will be replaced" in out
    assert read_checkpoint(finished / "checkpoints" / f"{NAME}_resume.pth")["place"]["step"] == 1
    assert [record["step"] for record in log_of(finished)] == [1]


def test_fine_tuning_resumes_too(home, tmp_path, capsys):
    """Stopped in the second epoch of a mixture; the flags need not repeat its size."""
    rows = [
        {"conversations": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(20)
    ]
    data = write_rows(tmp_path / "chats.jsonl", rows)
    torch.manual_seed(1)
    start = tmp_path / "start.pth"
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, use_moe=True))
    save_weights(model, start, stage="pretrain", tokens_seen=0, data_path="x", data_hash="h", trained_length=64)
    common = [*TINY, f"--data_path={data}", "--epochs=3", "--batch_size=5", "--save_interval=100"]
    for out_dir in tmp_path / "peace", tmp_path / "stopped":
        flags = [*common, f"--from_weight={start}", f"--out_dir={out_dir}"]
        run = Training("full_sft", flags, out_dir / "run", hook=SLOW if out_dir.name == "stopped" else None)
        if out_dir.name == "stopped":
            assert run.signal_at("full_sft 6/12", signal.SIGTERM).wait() == [143], run.err()
            assert 6 <= read_checkpoint(out_dir / "checkpoints" / "full_sft_64_moe_resume.pth")["place"]["step"] < 12
            code, _, err = ends(train_full_sft, [*common, "--from_resume", "1", f"--out_dir={out_dir}"], capsys)
            assert code == 0, err
        else:
            assert run.wait() == [0], run.err()
    same_bits(read_whole(tmp_path / "peace"), read_whole(tmp_path / "stopped"))


# ------------------------------------------------------------------------------------------------------- the self-test


def test_the_last_bit_of_a_number_counts():
    """Of tensors, in nested structures and of plain numbers."""
    one, more = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 1.0 + 2**-23])
    assert one[1] != more[1] == torch.nextafter(one[1], torch.tensor(2.0))
    same_bits({"a": [one, (1, 0.1)]}, {"a": [one.clone(), (1, 0.1)]})
    for other in {"a": [more, (1, 0.1)]}, {"a": [one, (1, 0.1 + 2**-56)]}, {"a": [one]}, {"b": [one, (1, 0.1)]}:
        with pytest.raises(InputError, match=r"^resume is not exact here: checkpoint"):
            same_bits({"a": [one, (1, 0.1)]}, other)


class Forked:
    """Stands in for subprocess.Popen, as far as the self-test uses it: a start without the imports."""

    started = 0

    def __init__(self, folder, hook, command):
        Forked.started += 1
        self.training = Training("pretrain", command[2:], folder / f"run{Forked.started}", hook=hook)
        self.process = self.training.ranks[0]
        self.kill, self.stdout = self.process.kill, self.lines()

    def lines(self):
        told = 0
        while True:
            alive = self.process.is_alive()
            lines = [line for line in self.training.out().splitlines(keepends=True) if line.endswith("\n")]
            yield from lines[told:]
            told = len(lines)
            if not alive:
                return
            time.sleep(0.01)

    def communicate(self):
        (self.returncode,) = self.training.wait()
        return self.training.out(), self.training.err()


@pytest.mark.parametrize("hook", [None, (processes.forget_optimizer,)], ids=["as it is", "optimizer forgotten"])
def test_verify_resume_tells_a_good_resume_from_a_broken_one(hook, home, tmp_path, monkeypatch, capsys):
    flags = ["--hidden_size=64", "--num_hidden_layers=2", *TINY, f"--data_path={home / 'texts.jsonl'}"]
    flags += [f"--out_dir={tmp_path / 'untouched'}", "--verify_resume", "--max_steps=8", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["trainer/train_pretrain.py", *flags])
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: Forked(tmp_path, hook, command))
    monkeypatch.setattr(random.Random, "sample", lambda *_: [1, 4, 5])  # saved after 2, 4, 6 and 8
    code = 0
    try:
        train_pretrain.run_training(lambda: train_pretrain.parse_args(flags), train_pretrain.main)
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if "killed after" in line] == [
        f"  killed after step {i}" for i in (1, 4, 5)
    ]
    if hook:
        assert code == 1 and re.match(r"error: resume is not exact here: .* differs by up to ", err)
    else:
        assert code == 0 and err == "" and "resume is exact: after 3 kills" in out
    assert not (tmp_path / "untouched").exists()


def test_verify_resume_starts_from_the_weights_of_a_stage(home, tmp_path, monkeypatch, capsys):
    """Even from those that its own runs replace: both runs of it start from the same ones, and these stay."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy((home / "start.pth").with_suffix(suffix), mine / f"{NAME}{suffix}")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    flags = [*TINY, f"--data_path={home / 'texts.jsonl'}", "--from_weight=pretrain", f"--out_dir={mine}"]
    flags += ["--verify_resume", "--max_steps=4", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["trainer/train_pretrain.py", *flags])
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: Forked(tmp_path, None, command))
    monkeypatch.setattr(random.Random, "sample", lambda *_: [3])
    train_pretrain.run_training(lambda: train_pretrain.parse_args(flags), train_pretrain.main)
    assert "resume is exact: after 1 kills" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_verify_resume_is_for_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    args = train_pretrain.parse_args(["--verify_resume", f"--out_dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        train_pretrain.run_training(lambda: args, None)
    assert ended.value.code == 2 and "not with a launcher" in capsys.readouterr().err
