"""Steps that are not finite, signals, memory exhausted: how a run goes on or ends."""

import math
import os
import signal
from unittest import mock

import pytest
import torch
from small_runs import TEXTS, TINY, read_log, train, weights_of, write_data, write_rows

from model.errors import InputError, run_script
from model.loading import load_model
from model.model_minimind import MiniMindForCausalLM
from trainer import train_pretrain
from trainer.runtime import run as run_module
from trainer.runtime.checkpoint import read_checkpoint
from trainer.runtime.engine import Engine
from trainer.runtime.run import Run
from trainer.runtime.run_log import RunLog
from trainer.runtime.start import build_model
from trainer.runtime.steps import Update

MARK = "zebra"  # a word of one row alone


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def poison(when):
    """Forward whose losses are NaN in the rows (B,) that when(call, input_ids) names."""
    forward, calls = MiniMindForCausalLM.forward, [0]

    def poisoned(self, input_ids, **keys):
        out = forward(self, input_ids, **keys)
        if keys["labels"] is input_ids:  # the probe of the memory that a step will need
            return out
        calls[0] += 1
        bad = torch.as_tensor(when(calls[0], input_ids)).expand(len(input_ids))
        out.token_losses = out.token_losses * torch.where(bad, math.nan, 1.0)[:, None]
        return out

    return mock.patch.object(MiniMindForCausalLM, "forward", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_counted(data, tmp_path):
    seen = []
    accepts = Run.accepts

    def watch(self, engine):
        seen.append(weights_of(models[0]))
        return accepts(self, engine)

    models = []
    path = write_rows(tmp_path / "alone.jsonl", [{"text": text} for text in TEXTS])  # no evaluation: 1 call a step

    def keep(*args):
        models.append(build_model(*args))
        return models[0]

    flags = [*TINY, "--max_seq_len=64", "--max_steps=4", "--batch_size=8", f"--data_path={path}"]
    args = train_pretrain.parse_args([*flags, f"--out_dir={tmp_path}"])
    with (
        mock.patch.object(Run, "accepts", watch),
        mock.patch.object(train_pretrain, "build_model", keep),
        poison(lambda call, ids: call == 2),
    ):
        train_pretrain.main(args)
    after_1, after_2, after_3 = seen[1:]
    assert torch.equal(after_1, after_2) and not torch.equal(after_2, after_3)
    assert not torch.equal(seen[0], after_1)
    log = read_log(tmp_path, train_pretrain)
    assert [r.get("skipped_steps") for r in log] == [None, 1, 1, 1]
    assert log[1]["loss"] is None and log[3]["loss"] > 0  # no number, and it spoils no later line
    assert torch.isfinite(weights_of(models[0])).all()


def test_ten_bad_steps_in_a_row_end_the_run_at_the_row(data, tmp_path, tokenizer):
    rows = [{"text": text} for text in TEXTS[:7]]
    rows.insert(4, {"text": f"{MARK} {MARK}"})
    path = write_rows(tmp_path / "texts.jsonl", rows)
    marked = tokenizer(MARK, add_special_tokens=False).input_ids[-1]
    assert sum(marked in tokenizer(row["text"]).input_ids for row in rows) == 1
    flags = ["--packing=0", "--batch_size=8", "--max_steps=30"]
    with (
        poison(lambda call, ids: (ids == marked).any(1)),
        pytest.raises(InputError, match=r"10 steps in a row, last at .*learning_rate") as error,
    ):
        train(train_pretrain, tmp_path / "out", path, *flags)
    assert f"{path}:5;" in str(error.value)
    log = read_log(tmp_path / "out", train_pretrain)
    assert log[-1]["step"] == 9 and log[-1]["skipped_steps"] == 9


def test_the_row_named_is_the_bad_one_wherever_it_stands_in_the_step(data, tmp_path, tokenizer):
    rows = [{"text": text} for text in TEXTS[:7]] + [{"text": f"{MARK} {MARK}"}]
    path = write_rows(tmp_path / "texts.jsonl", rows)
    marked = tokenizer(MARK, add_special_tokens=False).input_ids[-1]
    flags = ["--packing=0", "--batch_size=1", "--accumulation_steps=8", "--max_steps=30"]
    with poison(lambda call, ids: (ids == marked).any(1)), pytest.raises(InputError) as error:
        train(train_pretrain, tmp_path / "out", path, *flags)
    assert f"{path}:8;" in str(error.value)


def test_nine_bad_steps_do_not_end_the_run(data, tmp_path):
    path = write_rows(tmp_path / "alone.jsonl", [{"text": text} for text in TEXTS])
    with poison(lambda call, ids: call % 10 != 0):
        log = train(train_pretrain, tmp_path, path, "--max_steps=20").log
    assert log[-1]["step"] == 20 and log[-1]["skipped_steps"] == 18


def interrupt_at(call, signal_number=signal.SIGINT):
    """Send this process a signal while the learning rate of the call-th step is set."""
    calls = [0]

    def set_learning_rate(engine, rate):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal_number)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate

    return mock.patch.object(Engine, "set_learning_rate", set_learning_rate)


def ends(*flags):
    """The exit code of a pretraining in this process."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train_pretrain.parse_args([*TINY, "--max_seq_len=64", *flags]), train_pretrain.main)
    return ended.value.code


def test_interrupt_before_anything_was_learned_leaves_earlier_weights_alone(data, tmp_path):
    train(train_pretrain, tmp_path, data / "texts.jsonl", "--max_steps=2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}
    assert len(before) == 2
    start_clock = RunLog.start_clock

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        start_clock(*args)

    with mock.patch.object(RunLog, "start_clock", interrupted):
        assert ends("--max_steps=2", "--seed=1", f"--data_path={data / 'texts.jsonl'}", f"--out_dir={tmp_path}") == 130
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pth")} == before


def test_a_second_interrupt_does_not_wait_for_the_step(data, tmp_path):
    with interrupt_at(3), mock.patch.object(Update, "note", lambda *_, **__: os.kill(os.getpid(), 2)):
        flags = ["--max_steps=9", "--save_interval=9", f"--data_path={data / 'texts.jsonl'}", f"--out_dir={tmp_path}"]
        assert ends(*flags) == 130
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob("*.tmp"))


def test_interim_evaluations_take_eval_rows_and_the_last_takes_all(data, tmp_path):
    rows = []
    evaluate = run_module.evaluate

    def counted(model, val_set, run, totals, *rest):
        def loss(model, batch):
            rows[-1] += len(batch.inputs["input_ids"])
            return totals(model, batch)

        rows.append(0)
        return evaluate(model, val_set, run, loss, *rest)

    val = write_rows(tmp_path / "val.jsonl", [{"text": text} for text in TEXTS[:7]])
    flags = [
        "--packing=0",
        f"--val_path={val}",
        "--max_steps=3",
        "--eval_interval=1",
        "--eval_rows=4",
        "--batch_size=2",
    ]
    with mock.patch.object(run_module, "evaluate", counted):
        train(train_pretrain, tmp_path, data / "texts.jsonl", *flags)
    assert rows == [4, 4, 7]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_finishes_the_step_and_keeps_the_weights(number, code, data, tmp_path, capsys):
    flags = ["--max_steps=9", "--save_interval=9", f"--data_path={data / 'texts.jsonl'}", f"--out_dir={tmp_path}"]
    before = signal.getsignal(signal.SIGINT)
    with interrupt_at(4, number):
        assert ends(*flags) == code
    model, info = load_model(tmp_path / "pretrain_64.pth")
    log = read_log(tmp_path, train_pretrain)
    assert log[-1]["step"] == 4 and info["tokens_seen"] == log[-1]["tokens"] > 0
    assert torch.isfinite(weights_of(model)).all() and not list(tmp_path.rglob("*.tmp"))
    assert "--from_resume 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_of_a_run_that_was_started_in_the_background(data, tmp_path):
    """A script's shell has what it starts with & ignore SIGINT; a run that is sent one stops and saves all the same."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        flags = ["--max_steps=9", f"--data_path={data / 'texts.jsonl'}", f"--out_dir={tmp_path}"]
        with interrupt_at(2):
            assert ends(*flags) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_checkpoint(tmp_path / "checkpoints" / "pretrain_64_resume.pth")["place"]["step"] == 2


def test_memory_exhausted_names_the_setting(data, tmp_path, capsys):
    def exhausted(*args, **keys):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    flags = [*TINY, "--max_seq_len=64", "--batch_size=8", f"--data_path={data / 'texts.jsonl'}"]
    flags += [f"--out_dir={tmp_path}", "--accumulation_steps=2"]
    with mock.patch.object(MiniMindForCausalLM, "forward", exhausted), pytest.raises(SystemExit) as ended:
        run_script(lambda: train_pretrain.parse_args(flags), train_pretrain.main)
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "--batch_size 4 --accumulation_steps 4" in message


def test_other_runtime_errors_are_not_called_memory(data, tmp_path):
    def broken(*args, **keys):
        raise RuntimeError("shapes cannot be multiplied")

    with mock.patch.object(MiniMindForCausalLM, "forward", broken), pytest.raises(RuntimeError, match="shapes"):
        train(train_pretrain, tmp_path, data / "texts.jsonl")
