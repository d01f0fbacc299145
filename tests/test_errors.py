"""Bad input ends every script with one sentence and the right exit code, and nothing that was there is touched."""

import errno
import importlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dataset import token_cache
from model import loading
from model.errors import run_script as run_in_process
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.checkpoint import read_checkpoint

TINY = ["--hidden_size=64", "--num_hidden_layers=2"]
COMMON = ["--device=cpu", "--dtype=float32", "--max_seq_len=64", "--max_steps=2"]
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
GOOD = {"conversations": TURNS}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An out folder with what two earlier runs have left, and good data."""
    home = tmp_path_factory.mktemp("finished")
    write_rows(home / "texts.jsonl", [{"text": f"Sentence {i} of the file."} for i in range(6)])
    write_rows(home / "chats.jsonl", [GOOD] * 6)
    for stage, name in (("train_pretrain", "texts"), ("train_full_sft", "chats")):
        module = importlib.import_module(f"trainer.{stage}")
        sizes = TINY if stage == "train_pretrain" else []
        flags = [*sizes, *COMMON, f"--data_path={home / name}.jsonl", f"--out_dir={home / 'out'}"]
        module.main(module.parse_args(flags))
    return home


@pytest.fixture
def home(finished, tmp_path):
    """A copy of the finished runs, to fail in."""
    shutil.copytree(finished, tmp_path / "home")
    return tmp_path / "home"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, home, script, flags, code=1):
    """Run a script in this process; its one sentence. Everything under home must stay as it was, without litter."""
    module = importlib.import_module(script)
    before = contents(home)
    with pytest.raises(SystemExit) as ended:
        run_in_process(lambda: module.parse_args([str(flag) for flag in flags]), module.main)
    err = capsys.readouterr().err
    assert ended.value.code == code
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 400
    after = contents(home)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in home.rglob("*") if path.name.endswith((".tmp", "probe"))]
    return err.removeprefix("error: ").strip()


def sft(home, *flags):
    return [*COMMON, f"--data_path={home / 'chats.jsonl'}", f"--out_dir={home / 'out'}", *flags]


def pretrain(home, *flags):
    return [*TINY, *COMMON, f"--data_path={home / 'texts.jsonl'}", f"--out_dir={home / 'out'}", *flags]


# -------------------------------------------------------------------------------------------------------------- data


def conversation(*turns):
    return json.dumps({"conversations": [dict(zip(("role", "content"), turn, strict=True)) for turn in turns]}).encode()


HI, HELLO = ("user", "Hi?"), ("assistant", "Hello.")
BAD_CHATS = {
    "half a line": (b'{"conversations": [{"role": "us', "not a whole JSON object"),
    "a list": (b"[1, 2]", "must be a JSON object"),
    "wrong role": (conversation(("king", "x")), "'king'"),
    "not UTF-8": ('{"conversations": "é"}'.encode("latin-1"), "not UTF-8"),
    "no answer": (conversation(HI), "no assistant turn"),
    "answer first": (conversation(HELLO), "user turn must come before"),
    "system in the middle": (conversation(HI, HELLO, ("system", "x")), "must be the first"),
    "content is a number": (conversation(("user", 5), HELLO), "must be a string"),
    "content is missing": (b'{"conversations": [{"role": "user"}]}', "missing"),
    "empty answer": (conversation(HI, ("assistant", "")), "neither content nor a tool call"),
    "no turns": (b'{"conversations": []}', "at least one turn"),
    "another format": (b'{"text": "a text"}', '"conversations"'),
    "a long number": (b'{"id": ' + b"7" * 5000 + b"}", "a number of more than 4,300 digits"),
    "deep brackets": (b'{"conversations": ' + b"[" * 5000, "nested too deeply"),
    "half a character": (b'{"conversations": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
}


@pytest.mark.parametrize("row", BAD_CHATS)
def test_a_bad_chat_row_stops_before_the_first_step(row, home, capsys):
    line, reason = BAD_CHATS[row]
    path = home / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    message = fails(capsys, home, "trainer.train_full_sft", sft(home, f"--data_path={path}"))
    assert message.startswith(f"{path}:3: ") and reason in message
    message = fails(capsys, home, "scripts.inspect_data", [path, "--format=sft", f"--out_dir={home / 'out'}"])
    assert message.startswith(f"1 bad rows in {path}")


@pytest.mark.parametrize(
    "line",
    [b'{"text": ""}', b'{"text": 5}', b'{"conversations": []}', b"\xff", b'{"text": "ab', b"5", b'{"text": "\\ud83d"}'],
)
def test_a_bad_text_row_stops_before_the_first_step(line, home, capsys):
    path = home / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--data_path={path}"))
    assert message.startswith(f"{path}:2: ")


def test_a_bad_held_out_row_stops_before_the_first_step(home, capsys):
    path = write_rows(home / "texts_val.jsonl", [{"text": "fine"}, {"txt": "?"}])
    assert fails(capsys, home, "trainer.train_pretrain", pretrain(home)).startswith(f"{path}:2: ")


@pytest.mark.parametrize("script", ["trainer.train_pretrain", "trainer.train_full_sft", "scripts.inspect_data"])
@pytest.mark.parametrize("content", [None, b"", b"\n \n", "folder"])
def test_missing_and_empty_files(script, content, home, capsys):
    path = home / "bad.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    flags = {"trainer.train_pretrain": pretrain, "trainer.train_full_sft": sft}
    flags = flags[script](home, f"--data_path={path}") if script in flags else [path, f"--out_dir={home / 'out'}"]
    message = fails(capsys, home, script, flags)
    wanted = {None: "does not exist", "folder": "is a folder"}.get(content, "is empty")
    assert str(path) in message and wanted in message


@pytest.mark.parametrize("path", ["", ".", "/", ".."])
def test_a_folder_for_a_data_file(path, home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    for script, flags in ("trainer.train_pretrain", pretrain(home)), ("trainer.train_full_sft", sft(home)):
        assert "is a folder, not a file" in fails(capsys, home, script, [*flags, f"--data_path={path}"])
        assert "is a folder, not a file" in fails(capsys, home, script, [*flags, f"--val_path={path}"])
    assert "is a folder, not a file" in fails(capsys, home, "scripts.inspect_data", [path])


def test_missing_held_out_file(home, capsys):
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--val_path={home / 'no.jsonl'}"))
    assert "no.jsonl does not exist" in message


def test_no_answer_within_a_row(home, capsys):
    path = write_rows(home / "long.jsonl", [{"conversations": [{"role": "user", "content": "why " * 99}, TURNS[1]]}])
    message = fails(capsys, home, "trainer.train_full_sft", sft(home, f"--data_path={path}"))
    assert str(path) in message and "--max_seq_len" in message


# ------------------------------------------------------------------------------------------------- weights, tokenizer


def save_model(path, **sizes):
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **sizes}))
    save_weights(model, path, stage="pretrain", tokens_seen=0, data_path="x", data_hash="h", trained_length=64)
    return path


def test_tokenizer_with_more_tokens_than_the_model(home, capsys):
    path = save_model(home / "out" / "pretrain_64.pth", vocab_size=100)
    for script, flags in (
        ("trainer.train_full_sft", sft(home)),
        ("eval_model", [f"--weight={path}", "--prompt=Hi", "--device=cpu"]),
    ):
        message = fails(capsys, home, script, flags)
        assert "6400" in message and "100" in message and "tokenizer" in message


@pytest.mark.parametrize(
    ("flag", "sides"),
    [
        ("--num_hidden_layers=4", ("num_hidden_layers 2", "4")),
        ("--hidden_size=128", ("pretrain_128.pth", "pretrain_64.pth")),
    ],
)
def test_weights_of_another_size_name_both_sides(flag, sides, home, capsys):
    message = fails(capsys, home, "trainer.train_full_sft", sft(home, flag))
    assert all(side in message for side in sides)


def test_path_of_another_size_names_both_sides(home, capsys):
    flags = sft(home, f"--from_weight={home / 'out' / 'pretrain_64.pth'}", "--hidden_size=128")
    message = fails(capsys, home, "trainer.train_full_sft", flags)
    assert "hidden_size 64" in message and "128" in message
    flags = [f"--weight={home / 'out' / 'full_sft_64.pth'}", "--preset=minimind2", "--prompt=Hi", "--device=cpu"]
    message = fails(capsys, home, "eval_model", flags)
    assert "hidden_size 64" in message and "768" in message


@pytest.mark.parametrize("size", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("script", ["trainer.train_full_sft", "eval_model"])
def test_truncated_weights(script, size, home, capsys):
    name = "pretrain_64.pth" if script == "trainer.train_full_sft" else "full_sft_64.pth"
    path = home / "out" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    flags = (
        sft(home) if script == "trainer.train_full_sft" else [f"--out_dir={home / 'out'}", "--prompt=x", "--device=cpu"]
    )
    message = fails(capsys, home, script, flags)
    assert name in message and "cut short" in message


def test_truncated_json_beside_the_weights(home, capsys):
    path = home / "out" / "pretrain_64.json"
    path.write_bytes(path.read_bytes()[:50])
    assert "pretrain_64.json" in fails(capsys, home, "trainer.train_full_sft", sft(home))


def test_weights_that_would_run_code_are_refused(home, capsys):
    path = home / "evil.pth"
    torch.save({"x": Path("anything")}, path)  # needs the full unpickler
    assert "evil.pth" in fails(capsys, home, "trainer.train_full_sft", sft(home, f"--from_weight={path}"))


@pytest.mark.parametrize("name", ["nowhere.pth", "folder/nowhere.pth", "/nowhere/x.pth"])
def test_a_missing_path_is_named_as_it_was_given(name, home, capsys, monkeypatch):
    monkeypatch.chdir(home)
    message = fails(capsys, home, "trainer.train_full_sft", sft(home, f"--from_weight={name}"))
    assert message.startswith(f"{name} does not exist")


def test_a_missing_stage_names_its_script_and_what_there_is(home, capsys):
    message = fails(capsys, home, "trainer.train_full_sft", sft(home, "--from_weight=grpo"))
    assert "grpo" in message and "does not exist" in message
    assert "train_grpo.py" in message and "pretrain_64.pth" in message
    assert "pretain" in fails(capsys, home, "trainer.train_full_sft", sft(home, "--from_weight=pretain"))


def test_no_weights_at_all(home, capsys):
    message = fails(capsys, home, "eval_model", [f"--out_dir={home / 'empty'}", "--prompt=x", "--device=cpu"])
    assert "full_sft" in message and "train_full_sft.py" in message


def test_missing_tokenizer(home, capsys):
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--tokenizer_path={home}"))
    assert "tokenizer.json" in message and str(home) in message


# --------------------------------------------------------------------------------------------------- device and usage


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize(
    "script", ["trainer.train_pretrain", "trainer.train_full_sft", "eval_model", "scripts.quickstart"]
)
def test_device_that_is_not_there(script, home, capsys):
    flags = {"trainer.train_pretrain": pretrain(home), "trainer.train_full_sft": sft(home)}
    flags = [*flags.get(script, [f"--out_dir={home / 'out'}"]), "--device=cuda"]
    assert fails(capsys, home, script, flags, code=2).startswith("--device cuda cannot be used here")


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "cuda:99", ""])
def test_devices_that_do_not_exist(device, home, capsys):
    assert "--device" in fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--device={device}"), code=2)


@pytest.mark.parametrize("script", ["trainer.train_pretrain", "eval_model"])
def test_float16_on_a_cpu(script, home, capsys):
    flags = [
        *(pretrain(home) if "train" in script else [f"--out_dir={home / 'out'}"]),
        "--device=cpu",
        "--dtype=float16",
    ]
    assert "bfloat16 or float32" in fails(capsys, home, script, flags, code=2)


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT has no value"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT has no value"),
        ({**LAUNCHED, "RANK": ""}, "variables RANK has no value"),
        ({**LAUNCHED, "RANK": "first"}, "RANK is 'first', not a number"),
        ({**LAUNCHED, "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', not a number"),
        ({**LAUNCHED, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        ({**LAUNCHED, "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a number"),
    ],
)
def test_half_a_launcher(variables, words, home, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start = importlib.import_module("trainer.runtime.start")
    monkeypatch.setattr("test_errors.run_in_process", start.run_training)  # it asks for the rank when a run ends
    monkeypatch.setattr(start.time, "sleep", lambda seconds: None)
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home), code=2)
    assert words in message


# ---------------------------------------------------------------------------------------- places that cannot be written


@pytest.fixture
def small_disk(tmp_path):
    """mount(megabytes, flags) -> a file system of that size in memory; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command")
        if done.returncode:
            pytest.skip("only root can mount a small disk")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("script", ["trainer.train_pretrain", "trainer.train_full_sft"])
def test_out_dir_below_a_file(script, home, capsys):
    flags = (pretrain if script == "trainer.train_pretrain" else sft)(home, f"--out_dir={home / 'chats.jsonl' / 'out'}")
    message = fails(capsys, home, script, flags)
    assert "chats.jsonl" in message


def test_out_dir_on_a_read_only_disk(home, capsys, small_disk):
    place = small_disk("size=1m", "ro")
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--out_dir={place / 'out'}"))
    assert str(place) in message and "read-only" in message


def test_out_dir_without_permission(home, capsys, monkeypatch):
    """Root may write everywhere, so the refusal is acted."""

    def refuse(self, *args, **keys):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        message = fails(capsys, home, "trainer.train_pretrain", pretrain(home))
    assert "permission denied" in message and str(home / "out") in message


def full_disk_open(room):
    """A stand-in for open, whose files hold `room` bytes together."""
    left = [room]

    class FullDisk(io.FileIO):
        def write(self, data):
            left[0] -= memoryview(data).nbytes
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    return lambda path, mode="r", **keys: (FullDisk if mode == "wb" else open)(path, mode, **keys)


@pytest.mark.parametrize("room", [0, 1000, 300_000, "json"])
def test_disk_full_while_weights_are_written(room, home, capsys, monkeypatch):
    size = (home / "out" / "pretrain_64.pth").stat().st_size
    logs = {path: path.read_bytes() for path in (home / "out").glob("*.*")}
    shutil.rmtree(home / "out" / "logs")  # the new run begins its own
    with monkeypatch.context() as patch:
        patch.setattr(loading, "open", full_disk_open(size + 10 if room == "json" else room), raising=False)
        message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, "--seed=1"))
    assert "disk is full" in message
    assert {path: path.read_bytes() for path in (home / "out").glob("*.*")} == logs
    loading.load_model(home / "out" / "pretrain_64.pth")


@pytest.mark.parametrize("room", [0, 20])
def test_disk_full_while_data_is_tokenised(room, home, capsys, monkeypatch):
    path = write_rows(home / "new.jsonl", [{"text": f"Another sentence {i}."} for i in range(9)])
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "open", full_disk_open(room), raising=False)
        message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--data_path={path}"))
    assert "disk is full" in message
    assert len(list((home / "out" / "cache").iterdir())) == 2  # those of the earlier runs


@pytest.mark.parametrize(("size", "replaced"), [("7m", []), ("9m", ["pretrain_64.pth"])])
def test_a_real_disk_fills_up(size, replaced, home, capsys, small_disk):
    """Room for one run (1 MB of weights, 5.6 MB of checkpoint), not for new weights, or not for a checkpoint."""
    place = small_disk(f"size={size}")
    out = place / "out"
    module = importlib.import_module("trainer.train_pretrain")
    flags = pretrain(home, f"--out_dir={out}", "--save_interval=2")
    module.main(module.parse_args(flags))
    before = {path: path.read_bytes() for path in [*out.glob("*.*"), *out.glob("checkpoints/*")]}
    assert len(before) == 3
    assert "disk is full" in fails(capsys, home, "trainer.train_pretrain", [*flags, "--seed=1"])
    assert sorted(path.name for path in before if path.read_bytes() != before[path]) == replaced
    loading.load_model(out / "pretrain_64.pth")
    read_checkpoint(out / "checkpoints" / "pretrain_64_resume.pth")
    assert not list(out.rglob("*.tmp"))


def test_a_real_disk_fills_up_while_tokenising(home, capsys, small_disk):
    out = small_disk("size=200k") / "out"
    path = write_rows(home / "new.jsonl", [{"text": f"Sentence number {i} of a long file. " * 20} for i in range(2000)])
    message = fails(capsys, home, "trainer.train_pretrain", pretrain(home, f"--data_path={path}", f"--out_dir={out}"))
    assert "disk is full" in message
    assert not list((out / "cache").iterdir())


# --------------------------------------------------------------------------------------------------- as real processes


def test_a_process_ends_with_the_sentence_and_its_code(home, run_script):
    flags = ["--data_path", "no.jsonl", "--out_dir", "out", "--device", "cpu"]
    done = run_script("trainer/train_full_sft.py", flags, cwd=home)
    sentence = "error: no.jsonl does not exist; give a JSON lines file with --data_path\n"
    assert (done.returncode, done.stderr) == (1, sentence)
    done = run_script("trainer/train_pretrain.py", ["--device", "cpu", "--dtype", "float16"], cwd=home)
    assert done.returncode == 2 and done.stderr.startswith("error: --dtype float16") and done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(home, run_script):
    done = run_script("scripts/inspect_data.py", ["no.jsonl", "--debug"], cwd=home)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no.jsonl does not exist" in done.stderr


def test_programming_errors_keep_their_traceback():
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_in_process(lambda: None, main)


def test_runtime_errors_keep_their_traceback_but_for_a_full_disk(capsys, tmp_path):
    def main(error):
        def write(file):
            try:
                raise error
            except Exception:  # torch.save does the same
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

        loading.write_files({tmp_path / "a.pth": write})

    with pytest.raises(RuntimeError):
        run_in_process(lambda: ValueError(), main)
    with pytest.raises(SystemExit):
        run_in_process(lambda: OSError(errno.ENOSPC, "No space left on device"), main)
    assert capsys.readouterr().err == "error: the disk is full: free some space or choose another --out_dir\n"
    assert list(tmp_path.iterdir()) == []
