"""Two processes in one place: probes, temporary names, a lock that a killed run does not leave closed; odd names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ends
from small_runs import SEQ, TEXTS, TINY, train, write_rows

from model.LMConfig import MiniMindConfig
from model.loading import load_model, write_files
from model.model_lora import attach, save_lora
from model.model_minimind import MiniMindForCausalLM
from trainer import train_pretrain
from trainer.runtime import places
from trainer.runtime.places import claim, make_writable, release, remove_leftovers

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def another():
    """another(lock file): a process that holds it."""
    pytest.importorskip("fcntl")
    processes = []

    def hold(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        processes.append(subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(path)], stdout=subprocess.PIPE))
        assert processes[-1].stdout.readline() == b"held\n"
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def texts(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts}


def pretrain(texts, out_dir, *flags):
    flags = [*TINY, f"--max_seq_len={SEQ}", "--max_steps=2", "--batch_size=8", *flags]
    return [*flags, f"--data_path={texts}", f"--out_dir={out_dir}"]


# --------------------------------------------------------------------------------------------------------- every name


def test_two_machines_probe_a_shared_folder_at_once(tmp_path, monkeypatch):
    """The second one comes and goes while the first one's probe is there."""
    touch, calls = Path.touch, []

    def touched(self, *args, **keys):
        touch(self, *args, **keys)
        calls.append(self)
        if len(calls) == 1:
            make_writable(tmp_path / "logs")

    monkeypatch.setattr(Path, "touch", touched)
    make_writable(tmp_path / "logs")
    assert len(calls) == 2 and not list((tmp_path / "logs").iterdir())


def test_two_processes_write_a_file_at_once(tmp_path):
    """Each has a temporary file of its own: whoever is last wins, and nobody fails."""
    path = tmp_path / "some.pth"

    def slow(file):
        file.write(b"first, ")
        write_files({path: lambda other: other.write(b"second")})
        assert path.read_bytes() == b"second"
        file.write(b"and whole")

    write_files({path: slow})
    assert path.read_bytes() == b"first, and whole" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_removed_and_that_of_others_is_not(tmp_path):
    mine = ["pretrain_64.pth.1a.tmp", "pretrain_64.json.1a.tmp", "pretrain_64_resume.pth.1a.tmp"]
    mine += ["pretrain_64_samples.0.jsonl.1a.tmp", "pretrain_64.pth.tmp"]  # the last as it was called before
    others = ["pretrain_64_moe.pth.1a.tmp", "pretrain_640.pth.1a.tmp", "full_sft_64.pth.1a.tmp", "pretrain_64.pth"]
    for name in mine + others:
        (tmp_path / name).touch()
    remove_leftovers({tmp_path, tmp_path / "not there"}, "pretrain_64")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# ----------------------------------------------------------------------------------------------------------- the lock


def test_a_lock_ends_with_the_process_that_held_it(tmp_path, another):
    path = tmp_path / "logs" / ".pretrain_64.lock"
    process = another(path)
    with pytest.raises(places.InputError, match=rf"^another run is writing pretrain_64 in {tmp_path}: wait"):
        claim(path, "pretrain_64")
    process.kill()
    process.wait()
    with claim(path, "pretrain_64"):
        claim(path, "pretrain_64").close()  # the same process may: a notebook begins a run anew


def test_a_lock_whose_file_was_removed_as_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    """The run before it ends between the opening of the file and its locking: a third would lock a new one."""
    fcntl, path = pytest.importorskip("fcntl"), tmp_path / "logs" / ".a.lock"
    path.parent.mkdir()
    lockf, calls = fcntl.lockf, []

    def late(file, kind):
        calls.append(file)
        if len(calls) == 1:
            path.unlink()
        return lockf(file, kind)

    monkeypatch.setattr(fcntl, "lockf", late)
    file = claim(path, "a")
    assert len(calls) == 2 and os.path.samestat(path.stat(), os.fstat(file.fileno()))
    release(file)
    assert file.closed and not path.exists()


@pytest.mark.parametrize("flags", [[], ["--from_resume=1", "--max_steps=4"]])
def test_a_second_run_of_a_stage_is_refused_before_its_first_step(flags, texts, tmp_path, another, capsys):
    out = tmp_path / "out"
    assert ends(train_pretrain, pretrain(texts, out), capsys)[0] == 0
    another(out / "logs" / ".pretrain_64.lock")
    (out / "pretrain_64.pth.1a.tmp").touch()  # what the other one is writing now
    before = contents(out)
    code, _, err = ends(train_pretrain, pretrain(texts, out, "--seed=1", *flags), capsys)
    assert code == 1 and err == (
        f"error: another run is writing pretrain_64 in {out}: wait until it ends, or choose another --out_dir\n"
    )
    assert contents(out) == before
    assert ends(train_pretrain, pretrain(texts, out, "--use_moe"), capsys)[0] == 0  # other files


def test_a_run_ends_its_lock_and_clears_up(texts, tmp_path, another, capsys):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "pretrain_64_resume.pth.1a.tmp").touch()
    assert ends(train_pretrain, pretrain(texts, out), capsys)[0] == 0
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.lock"))
    another(out / "logs" / ".pretrain_64.lock")  # would wait for ever


def refuse(number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    return lockf


@pytest.mark.parametrize("without", ["system", "file system"])
def test_without_locks_runs_go_on(without, texts, tmp_path, monkeypatch, capsys):
    """And leave alone what may be another run's."""
    if without == "system":
        monkeypatch.setattr(places, "fcntl", None)
    else:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "lockf", refuse(37))  # ENOLCK
    out = tmp_path / "out"
    out.mkdir()
    (out / "pretrain_64.pth.1a.tmp").touch()
    assert ends(train_pretrain, pretrain(texts, out), capsys)[0] == 0
    assert (out / "pretrain_64.pth").exists() and (out / "pretrain_64.pth.1a.tmp").exists()


# --------------------------------------------------------------------------------------------------------- odd names


def test_a_data_file_whose_name_is_no_utf8_is_recorded(tmp_path):
    name = os.fsdecode(b"texts\xe9.jsonl")
    try:
        path = write_rows(tmp_path / name, [{"text": text} for text in TEXTS])
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    train(train_pretrain, tmp_path / "out", path, "--max_steps=1")
    model, info = load_model(tmp_path / "out" / "pretrain_64.pth")
    assert info["data_file"] == name
    assert json.loads((tmp_path / "out" / "pretrain_64.json").read_text(encoding="utf-8"))["data_file"] == name
    keys = {"stage": "a", "tokens_seen": 0, "data_path": path, "data_hash": "h", "trained_length": 8}
    attach(model, 2, 2.0, ["q_proj"])
    save_lora(model, tmp_path / "a_64.pth", base={"name": name, "hash": "h"}, **keys)
    info = json.loads((tmp_path / "a_64.json").read_text(encoding="utf-8"))
    assert name in json.dumps(info, ensure_ascii=False) and info["data_file"] == name


def test_an_out_dir_whose_name_is_no_utf8(texts, tmp_path):
    out = tmp_path / os.fsdecode(b"out\xe9")
    try:
        out.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    write_files({out / "a.pth": lambda file: torch.save(model.state_dict(), file)})
    assert len(list(out.iterdir())) == 1
