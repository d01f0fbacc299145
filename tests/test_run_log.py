"""What a run tells: progress line, estimate, JSON lines, curve, SwanLab."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from trainer import train_pretrain
from trainer.runtime import run as run_module
from trainer.runtime import run_log
from trainer.runtime.engine import Engine
from trainer.runtime.run_log import RunLog, clock, format_meter, keep_steps, plot_stages, read_records

TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--max_seq_len=64"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Sentence {i}. " + "the quick brown fox jumps. " * (i % 4)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(data, *flags):
    flags = [*TINY, f"--data_path={data}", f"--out_dir={data.parent / 'out'}", "--batch_size=4", *flags]
    train_pretrain.main(train_pretrain.parse_args(flags))
    return data.parent / "out" / "logs"


def log(tmp_path, **keys):
    run = RunLog(tmp_path, "pretrain", torch.device("cpu"))
    run.open("pretrain_64", **{"total_steps": 10, **keys})
    run.start_clock(0)
    return run


def test_progress_and_estimate(data, capsys):
    train(data, "--max_steps=5", "--log_interval=2")
    out = capsys.readouterr().out
    number = r"[\d.,]+"
    fields = f"loss {number}  lr {number}e-03  grad_norm {number}  tokens_per_s {number}  elapsed_s {number}"
    assert re.findall(rf"^pretrain (\d)/5  {fields}  peak_memory_mb {number}  eta \d+:\d\d$", out, re.MULTILINE) == [
        "1", "2", "3", "4", "5",
    ]  # fmt: skip
    lines = out.splitlines()
    (estimate,) = (i for i, line in enumerate(lines) if " s a step: about " in line)
    assert re.match(r"[\d.]+ s a step: about \d+:\d\d for the 2 steps to come, .* peak memory so far [\d,]+ MB$",
                    lines[estimate])  # fmt: skip
    assert lines[estimate - 1].startswith("pretrain 3/5") and lines[estimate + 1].startswith("pretrain 4/5")


def test_the_arithmetic_stands_before_the_first_step(data, capsys):
    train(data, "--max_steps=2", "--accumulation_steps=2", "--packing=0")
    out = capsys.readouterr().out
    before = out[: out.index("pretrain 1/2")]
    assert "0.5M parameters on cpu, muon at 0.003, float32" in before and "in 20 rows of 64" in before
    assert re.search(r"a step: 2 x 4 rows = \d+ tokens\n2 steps = ", before)
    assert re.search(r"memory: about [\d.]+ GB more", before)


def test_what_a_line_holds(tmp_path, capsys):
    run = log(tmp_path)
    run.write(1, 100, {"loss": 2.5, "lr": 1e-3, "grad_norm": float("inf")}, 0)
    run.write(2, 100, {"loss": float("nan")}, 1)
    first, second = read_records(run.path)
    assert first.keys() == {
        "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s", "peak_memory_mb",
    }  # fmt: skip
    assert first["grad_norm"] is None and second["loss"] is None  # NaN would be no JSON
    assert second["skipped_steps"] == 1 and "tokens_per_s" not in second
    out = capsys.readouterr().out
    assert "loss 2.500" in out and "lr 1.0e-03" in out and "grad_norm not finite" in out and "skipped_steps 1" in out


def test_pauses_are_left_out_of_the_speed(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    run = log(tmp_path)
    now[0] = 10.0
    run.pause(6.0)  # an evaluation
    run.write(1, 400, {"loss": 1.0}, 0)
    assert run.records[0]["tokens_per_s"] == 100 and run.records[0]["elapsed_s"] == 10


def test_only_an_opened_log_writes(tmp_path, capsys):
    """That of rank 0."""
    run = RunLog(tmp_path, "pretrain", torch.device("cpu"))
    run.start_clock(0)
    run.write(1, 10, {"loss": 1.0}, 0)
    run.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_resumed_log_goes_on_after_its_checkpoint(tmp_path):
    run = log(tmp_path)
    for step in 1, 2, 3:
        run.write(step, 10 * step, {"loss": 1.0 / step}, 0)
    run.close()
    with run.path.open("a") as file:
        file.write('{"step": 4, "loss"')  # killed in the middle of a line
    again = log(tmp_path, resumed_at=2)
    again.write(3, 30, {"loss": 7.0}, 0)
    assert [(r["step"], r["loss"]) for r in read_records(run.path)] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    anew = log(tmp_path)
    assert read_records(anew.path) == []


def test_samples_are_cut_off_after_a_step(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    keep_steps(path, 3)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


def test_a_log_is_replaced_at_once(tmp_path, monkeypatch):
    """No moment at which the lines of a resumed run are not on the disk."""
    run = log(tmp_path)
    run.write(1, 10, {"loss": 1.0}, 0)
    before = run.path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.loading.os.fsync", full)
    with pytest.raises(OSError):
        log(tmp_path, resumed_at=1)
    assert run.path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_curve_without_numbers_is_no_warning(tmp_path, recwarn):
    run = log(tmp_path)
    run.write(1, 10, {"loss": float("nan")}, 1)
    run.close()
    assert (tmp_path / "pretrain_64.png").read_bytes().startswith(b"\x89PNG") and not len(recwarn)


def test_the_curve_needs_no_backend(tmp_path, monkeypatch):
    """MPLBACKEND may name one that is not there, as a notebook's is not in what the notebook starts."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)  # it is what opens backends
    run = log(tmp_path)
    run.write(1, 10, {"loss": 2.0}, 0)
    run.close()
    assert (tmp_path / "pretrain_64.png").read_bytes().startswith(b"\x89PNG")


def test_the_stages_are_drawn_together(tmp_path, monkeypatch):
    """A panel a figure, a curve a stage; what a log lacks, or had no number for, leaves no trace."""
    figures, save = [], run_log.save_figure
    monkeypatch.setattr(run_log, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    sampled = {"reward": [0.5, None, 1.0], "accuracy": [0.25, 0.5, 0.75], "reply_tokens": [9.0, 8.0, 7.0]}
    logs = {}
    for stage, more in ("grpo", {"kl": [0.0, 0.1, 0.2], "val_accuracy": [None, None, 0.5]}), ("spo", {}):
        figures_of = sampled | more
        rows = [{"elapsed_s": i, **{name: values[i] for name, values in figures_of.items()}} for i in range(3)]
        logs[stage] = tmp_path / f"{stage}.jsonl"
        run_log.write_records(logs[stage], rows)
    plot_stages(logs, tmp_path / "stages.png")
    reward, right, length, kl = ({line.get_label(): line for line in axes.lines} for axes in figures[0].axes)
    assert reward.keys() == length.keys() == {"grpo", "spo"} and kl.keys() == {"grpo"}
    assert right.keys() == {"grpo", "spo", "grpo, held out"}
    assert reward["spo"].get_xydata().tolist() == [[0, 0.5], [2, 1.0]]
    assert right["grpo, held out"].get_xydata().tolist() == [[2, 0.5]]
    assert right["grpo"].get_color() == right["grpo, held out"].get_color() != right["spo"].get_color()
    assert (tmp_path / "stages.png").read_bytes().startswith(b"\x89PNG")


def fail(*_):
    raise ValueError("Key backend: 'nowhere' is not a valid value\nfor backend")


def test_a_curve_that_fails_is_a_note(data, monkeypatch, capsys):
    monkeypatch.setattr(RunLog, "plot", fail)
    logs = train(data, "--max_steps=1")
    err = capsys.readouterr().err
    assert err == "note: the curve was not drawn: Key backend: 'nowhere' is not a valid value\n"
    assert (logs.parent / "pretrain_64.pth").exists()


def test_a_curve_that_fails_hides_no_error(fake, data, monkeypatch, capsys):
    monkeypatch.setattr(RunLog, "plot", fail)
    monkeypatch.setattr(run_module.Run, "save", lambda *_: 1 / 0)
    monkeypatch.setattr(fake, "finish", fail)
    with pytest.raises(ZeroDivisionError):
        train(data, "--max_steps=1", "--use_wandb")
    assert capsys.readouterr().err == ""


def test_how_numbers_are_shown():
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600, 36061)] == ["0:00", "0:59", "1:01", "1:00:00", "10:01:01"]
    shown = [format_meter(*pair) for pair in (("lr", 3e-4), ("loss", 2.34567), ("tokens_per_s", 12345.6), ("n", 7))]
    assert shown == ["3.0e-04", "2.346", "12,346", "7"]


# ------------------------------------------------------------------------------------------------------------- SwanLab


class FakeSwanLab:
    """Notes what is asked of it."""

    def __init__(self):
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **keys):
        self.inits.append(keys)
        return SimpleNamespace(id=keys.get("id") or f"experiment{len(self.inits)}")

    def log(self, meters, step):
        self.logged.append((step, meters))

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch, tmp_path):
    swanlab = pytest.importorskip("swanlab")
    fake = FakeSwanLab()
    for name in ("init", "log", "finish"):
        monkeypatch.setattr(swanlab, name, getattr(fake, name))
    for name in ("SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in there
    return fake


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"SWANLAB_API_KEY": "a-key"}, "online"),
        ({"SWANLAB_API_KEY": "a-key", "SWANLAB_MODE": "offline"}, "offline"),  # a user's own choice
    ],
)
def test_swanlab_gets_the_numbers_of_the_log(variables, mode, fake, data, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logs = train(data, "--max_steps=2", "--log_interval=1", "--use_wandb", "--wandb_project=Mine")
    ((init,), records) = fake.inits, read_records(logs / "pretrain_64.jsonl")
    assert (init["project"], init["name"], init["mode"]) == ("Mine", "pretrain_64", mode)
    assert init["config"]["batch_size"] == 4 and init["log_dir"] == str(logs / "swanlab")
    assert fake.logged == [(record["step"], record) for record in records] and fake.finished == 1
    assert f"SwanLab: {mode}, project Mine" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_experiment(fake, data):
    for flags in (["--max_steps=1"], ["--max_steps=2", "--from_resume=1"], ["--max_steps=3", "--from_resume=1"]):
        train(data, "--use_wandb", *flags)
    assert "id" not in fake.inits[0] and "resume" not in fake.inits[0]
    assert [(init["id"], init["resume"]) for init in fake.inits[1:]] == [("experiment1", "allow")] * 2
    train(data, "--use_wandb", "--max_steps=1")  # anew: another experiment
    assert "id" not in fake.inits[3]


def test_without_the_flag_swanlab_is_left_alone(fake, data):
    train(data, "--max_steps=1")
    assert not fake.inits and not fake.finished


def test_swanlab_ends_though_the_run_fails(fake, data, monkeypatch):
    monkeypatch.setattr(Engine, "set_learning_rate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(data, "--max_steps=1", "--use_wandb")
    assert fake.finished == 1


def test_missing_swanlab_is_one_sentence(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "swanlab", None)
    with pytest.raises(run_log.InputError, match="pip install swanlab"):
        train(data, "--max_steps=1", "--use_wandb")


def test_swanlab_offline_for_real(tmp_path, monkeypatch, capfd):
    """No account, no network: files beside the log."""
    pytest.importorskip("swanlab")
    for name in ("SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked for"))
    run = log(tmp_path)
    run.track("MiniMind", "pretrain_64", {"batch_size": 4})
    run.write(1, 10, {"loss": 1.0}, 0)
    run.close()
    (written,) = (tmp_path / "swanlab").glob("run-*/*.swanlab")
    assert written.stat().st_size > 0


def test_swanlab_gets_names_that_are_not_utf8(tmp_path, monkeypatch, capfd):
    """Bytes of another encoding come from the system as lone surrogates, which its files cannot hold."""
    pytest.importorskip("swanlab")
    for name in ("SWANLAB_API_KEY", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = log(tmp_path)
    run.track("Mine", "pretrain\udcb2_64", {"batch_size": 4, "data_path": "/data/\udcb2.jsonl"})
    run.write(1, 10, {"loss": 1.0}, 0)
    run.close()
    assert capfd.readouterr().err == ""
    (written,) = (tmp_path / "swanlab").glob("run-*/files/config.yaml")
    assert "/data/\\udcb2.jsonl" in written.read_text(encoding="utf-8")
    (tmp_path / "out\udce9").mkdir()
    with pytest.raises(run_log.InputError, match="not UTF-8: choose another --out_dir"):
        log(tmp_path / "out\udce9").track("Mine", "pretrain_64", {})
