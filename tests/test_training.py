"""The training loop: exact accumulation, schedule, repeatability, validation numbers, log, files."""

import json
import math
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from small_runs import (
    CHATS,
    SEQ,
    STAGES,
    TEXTS,
    data_of,
    dataset_of,
    new_run,
    plain_sgd,
    read_log,
    train,
    weights_of,
    write_data,
    write_rows,
)
from torch.nn import functional as F

from dataset.lm_dataset import file_hash
from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from trainer import train_full_sft, train_pretrain
from trainer.runtime import evaluation, start
from trainer.runtime.devices import pick_dtype
from trainer.runtime.engine import Engine
from trainer.runtime.evaluation import evaluate, token_loss
from trainer.runtime.flags import ROOT
from trainer.runtime.meters import peak_expert_load
from trainer.runtime.run import Run
from trainer.runtime.steps import MicroBatch, Update, count_steps, learning_rate_at, split_rows, training_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("script", STAGES)
@pytest.mark.parametrize("packing", ["0", "1"])
def test_accumulation_is_exact(script, packing, data, tmp_path):
    """Batch 8 x 1 and 2 x 4 see the same rows and end with the same weights, a short last step included."""
    runs = []
    for batch, accumulation in (8, 1), (2, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", f"--packing={packing}"]
        flags += ["--max_steps=4", "--learning_rate=0.3", "--grad_clip=0"]
        with mock.patch.object(start, "build_optimizer", plain_sgd):
            runs.append(train(script, tmp_path / str(batch), data_of(script, data), *flags))
    one, many = (weights_of(run.model) for run in runs)
    assert (one - many).norm() < 1e-6 * one.norm()
    for a, b in zip(runs[0].log, runs[1].log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_accumulation_is_exact_with_the_shipped_optimizers(optimizer, data, tmp_path):
    runs = []
    for batch, accumulation in (8, 1), (2, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", f"--optimizer={optimizer}"]
        runs.append(train(train_pretrain, tmp_path / str(batch), data / "texts.jsonl", *flags))
    one, many = (weights_of(run.model) for run in runs)
    assert (one - many).norm() < 1e-4 * one.norm()  # rounding grows where a gradient is almost 0


@pytest.mark.parametrize("script", STAGES)
def test_logged_loss_is_the_mean_over_all_targets_of_all_steps(script, data, tmp_path, tokenizer):
    """At learning rate 0 the loss of each step can be computed apart; one log line tells the mean of two steps."""
    flags = ["--learning_rate=0", "--batch_size=2", "--accumulation_steps=2", "--packing=0", "--max_steps=4"]
    flags += ["--log_interval=2", "--eval_interval=4", "--val_path=" + str(data_of(script, data))]
    run = train(script, tmp_path, data_of(script, data), *flags)
    dataset = dataset_of(script, data, tokenizer, tmp_path, packing=False)
    steps = []
    for first in range(0, 16, 4):
        rows = [dataset[i] for i in range(first, min(first + 4, len(dataset)))]
        if rows:
            nats, targets = zip(*(nats_by_hand(run.model, row) for row in rows), strict=True)
            steps.append(sum(nats) / sum(targets))
    if len(dataset) < 16:  # three steps make an epoch; the fourth is the first of the next
        dataset.set_epoch(1)
        nats, targets = zip(*(nats_by_hand(run.model, dataset[i]) for i in range(4)), strict=True)
        steps.append(sum(nats) / sum(targets))
    assert [r["step"] for r in run.log] == [2, 4]
    assert run.log[0]["loss"] == pytest.approx(sum(steps[:2]) / 2, rel=1e-5)
    assert run.log[1]["loss"] == pytest.approx(sum(steps[2:]) / 2, rel=1e-5)
    assert run.log[0]["lr"] == 0


def nats_by_hand(model, row):
    """(nats, targets) of one row, document by document, from its logits."""
    nats, targets = 0.0, 0
    model.eval()
    for number in range(1, int(row["attention_mask"].max()) + 1):
        inside = row["attention_mask"] == number
        ids, labels = row["input_ids"][inside], row["labels"][inside]
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        nats += F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum").item()
        targets += int((labels[1:] != -100).sum())
    return nats, targets


def test_every_row_once_in_each_epoch_and_no_window_over_its_border(data, tokenizer, tmp_path):
    dataset = dataset_of(train_pretrain, data, tokenizer, tmp_path, packing=False)  # 22 rows
    run = new_run(tmp_path, "--batch_size=3", "--accumulation_steps=3", "--epochs=1")
    per_epoch = count_steps(dataset, run)
    assert per_epoch == 3  # micro-batches 3 3 3 | 3 3 3 | 3 1
    run.logs.open("pretrain_64", 2 * per_epoch)
    seen, windows, steps = [], [], []
    for step in training_steps(dataset, run, 2 * per_epoch):
        steps.append(step.number)
        windows.append([len(batch.rows) for batch in step.batches])
        assert step.rows == sum(windows[-1]) and step.targets == sum(batch.targets for batch in step.batches)
        seen.append([tuple(ids.tolist()) for batch in step.batches for ids in batch.inputs["input_ids"]])
    assert steps == [1, 2, 3, 4, 5, 6]
    assert windows == [[3, 3, 3], [3, 3, 3], [3, 1]] * 2
    all_rows = sorted(tuple(dataset[i]["input_ids"].tolist()) for i in range(len(dataset)))
    first, second = ([row for window in epoch for row in window] for epoch in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == all_rows
    assert first != second  # another order


def test_max_steps_wins_over_epochs(data, tokenizer, tmp_path):
    path = data / "texts.jsonl"
    flags = ["--packing=0", "--batch_size=8"]  # 22 rows: 3 steps an epoch
    assert train(train_pretrain, tmp_path / "a", path, *flags, "--epochs=5", "--max_steps=2").log[-1]["step"] == 2
    assert train(train_pretrain, tmp_path / "b", path, *flags, "--epochs=1", "--max_steps=5").log[-1]["step"] == 5
    run = new_run(tmp_path / "c", "--epochs=4", "--batch_size=8")
    assert count_steps(dataset_of(train_pretrain, data, tokenizer, tmp_path, packing=False), run) == 12


# ------------------------------------------------------------------------------------------------------- the schedule


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    rates = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10:60] == [2.0] * 50
    assert rates[60:] == pytest.approx([2.0 * (40 - i) / 40 for i in range(40)])
    assert (
        rates[-1] == pytest.approx(2.0 / 40) and learning_rate_at(101, 100, 2.0, 0.1) == 0
    )  # zero is one step further


def test_learning_rate_between_whole_steps_stays_between_theirs():
    """A resumed run with another batch size stands there."""
    whole = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(1, 101)]
    for step, (before, after) in enumerate(pairwise(whole), start=1):
        assert min(before, after) <= learning_rate_at(step + 0.3, 100, 2.0, 0.1) <= max(before, after)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 1000])
def test_learning_rate_without_warm_up_starts_at_the_peak(total):
    rates = [learning_rate_at(step, total, 1.0, 0.0) for step in range(1, total + 1)]
    assert rates[0] == 1.0
    assert all(0 < later <= earlier for earlier, later in pairwise(rates))


def test_schedule_reaches_the_optimizer(data, tmp_path):
    log = train(train_pretrain, tmp_path, data / "texts.jsonl", "--max_steps=5", "--learning_rate=0.01").log
    assert [r["lr"] for r in log] == pytest.approx([learning_rate_at(s, 5, 0.01, 0.02) for s in range(1, 6)])
    still = train(train_pretrain, tmp_path / "0", data / "texts.jsonl", "--learning_rate=0", "--weight_decay=1")
    torch.manual_seed(42)
    assert torch.equal(weights_of(still.model), weights_of(MiniMindForCausalLM(still.model.config)))


# ------------------------------------------------------------------------------------------------ repeats, learning


def test_same_seed_gives_equal_bits_and_another_seed_does_not(data, tmp_path):
    path = data / "texts.jsonl"
    first, again, other = (
        weights_of(train(train_pretrain, tmp_path / name, path, f"--seed={seed}").model)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_workers_change_nothing(data, tmp_path):
    path = data / "texts.jsonl"
    alone = train(train_pretrain, tmp_path / "a", path, "--max_steps=2").model
    helped = train(train_pretrain, tmp_path / "b", path, "--max_steps=2", "--num_workers=1").model
    assert torch.equal(weights_of(alone), weights_of(helped))


@pytest.mark.parametrize("script", STAGES)
def test_loss_falls(script, data, tmp_path):
    log = train(script, tmp_path, data_of(script, data), "--max_steps=25", "--learning_rate=0.01").log
    assert log[0]["loss"] > 8 and log[-1]["loss"] < 4.5
    assert log[-1]["val_loss"] < 4.5


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("script", STAGES)
def test_evaluate_equals_a_direct_computation(script, data, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, dropout=0.5)).train()
    dataset = dataset_of(script, data, tokenizer, tmp_path)
    nats, targets = map(sum, zip(*(nats_by_hand(model, dataset[i]) for i in range(len(dataset))), strict=True))
    texts = TEXTS if script is train_pretrain else [answer for _, answer in CHATS]
    n_bytes = sum(len(text.encode()) for text in texts)  # the end token is no text
    for batch_size in (1, 3, 64):
        model.train()
        run = new_run(tmp_path, f"--batch_size={batch_size}")
        meters = evaluate(model, dataset, run, token_loss, tokenizer=tokenizer)
        assert model.training
        assert meters["val_loss"] == pytest.approx(nats / targets, rel=1e-5)
        assert meters["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_an_evaluation_is_not_in_the_speed(data, tokenizer, tmp_path, monkeypatch):
    """Its seconds, told by a clock of the test's own, are a pause of the log."""
    now, run = [0.0], new_run(tmp_path, "--batch_size=8")
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: now[0])
    run.logs.open("pretrain_64", 9)
    run.logs.start_clock(0)

    def slow(model, batch):
        now[0] += 2.0
        return token_loss(model, batch)

    dataset = dataset_of(train_pretrain, data, tokenizer, tmp_path, packing=False)  # 22 rows: three batches
    now[0] += 5.0
    evaluate(MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=1)), dataset, run, slow)
    assert now[0] == 11.0
    run.logs.write(1, 100, {"loss": 1.0}, 0)
    assert run.logs.records[0]["tokens_per_s"] == 100 / 5.0


def test_peak_expert_load_by_hand(tmp_path):
    """The busiest expert of any layer, over the even share of its layer; a layer without tokens has none."""
    load = torch.tensor([[3.0, 1.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert peak_expert_load(load, torch.device("cpu")) == {"peak_expert_load": 2.0}
    assert peak_expert_load(None, torch.device("cpu")) == {}


def test_expert_load_is_that_of_all_micro_batches(tmp_path):
    """And not of the last one: 3 + 1 tokens for one expert, 5 + 7 for the other, whose even share is 8."""
    run = new_run(tmp_path)
    update = Update(run, [], 1, 1)
    for load in [[3.0, 5.0]], [[1.0, 7.0]]:
        batch = MicroBatch([0], {}, {}, 0, 0)
        update.note(batch, SimpleNamespace(expert_load=torch.tensor(load)), torch.zeros(1, 1))
    assert peak_expert_load(update.expert_load, run.device) == {"peak_expert_load": 1.5}


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("script", STAGES)
def test_log_curve_and_weights(script, data, tmp_path, tokenizer):
    run = train(script, tmp_path, data_of(script, data), "--packing=0", "--epochs=1", "--max_steps=3")
    stage = script.__name__.split("train_")[1]
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s", "peak_memory_mb"}
    assert [r["step"] for r in run.log] == [1, 2, 3]
    for record in run.log:
        assert wanted | {"val_loss", "val_bpb"} == set(record)  # 3 steps: evaluated at each
        assert all(math.isfinite(value) for value in record.values())
        assert record["tokens_per_s"] > 0 and record["peak_memory_mb"] > 10
    assert run.log[0]["elapsed_s"] < run.log[-1]["elapsed_s"]

    dataset = dataset_of(script, data, tokenizer, tmp_path, packing=False)
    rows = [dataset[i] for i in range(len(dataset))]
    real = [int((row["attention_mask"] > 0).sum()) for row in rows]
    first_step = next(split_rows(range(len(dataset)), per_step=8, batch_size=8))
    assert first_step == [list(range(8))]
    assert run.log[0]["tokens"] == sum(real[:8]) < 8 * SEQ  # padding is no token
    if script is train_pretrain:  # three steps are the epoch: all text, a start and an end token a document
        ids = tokenizer(TEXTS, add_special_tokens=False).input_ids
        assert run.log[-1]["tokens"] == sum(map(len, ids)) + 2 * len(TEXTS)

    png = (tmp_path / "logs" / f"{stage}_64.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    state = torch.load(tmp_path / f"{stage}_64.pth", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}
    info = json.loads((tmp_path / f"{stage}_64.json").read_text(encoding="utf-8"))
    MiniMindForCausalLM(MiniMindConfig(**info["config"])).load_state_dict(state, strict=True)
    assert torch.equal(state["model.norm.weight"], run.model.model.norm.weight.half())
    assert (info["stage"], info["tokens_seen"], info["trained_length"]) == (stage, run.log[-1]["tokens"], SEQ)
    assert info["data_hash"] == file_hash(data_of(script, data)) and info["data_file"] == data_of(script, data).name
    assert info["config"]["hidden_size"] == 64 and info["config"]["num_hidden_layers"] == 2
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob(".*probe"))


def test_a_second_run_starts_its_log_anew(data, tmp_path):
    for steps in (3, 2):
        run = train(train_pretrain, tmp_path, data / "texts.jsonl", f"--max_steps={steps}")
    assert [r["step"] for r in run.log] == [1, 2]


def test_intervals(data, tmp_path):
    flags = ["--max_steps=7", "--log_interval=2", "--eval_interval=3", "--save_interval=5"]
    saved_at = []
    with mock.patch.object(Run, "save", lambda run: saved_at.append(run.step)):
        log = train(train_pretrain, tmp_path, data / "texts.jsonl", *flags).log
    assert [r["step"] for r in log] == [2, 3, 4, 6, 7]
    assert [r["step"] for r in log if "val_loss" in r] == [3, 6, 7]
    assert saved_at == [5, 7]


def test_no_held_out_file_no_validation(data, tmp_path):
    rows = write_rows(tmp_path / "alone.jsonl", [{"text": text} for text in TEXTS])
    assert all("val_loss" not in r for r in train(train_pretrain, tmp_path, rows).log)


# ---------------------------------------------------------------------------------------------- from stage to stage


def test_fine_tuning_starts_from_the_newest_pretrained_weights(data, tmp_path, capsys):
    texts, chats = data / "texts.jsonl", data / "chats.jsonl"
    train(train_pretrain, tmp_path, texts, "--hidden_size=32", "--max_seq_len=32")
    base = train(train_pretrain, tmp_path, texts, "--max_seq_len=128")
    os.utime(tmp_path / "pretrain_32.pth", (1, 1))
    flags = ["--device=cpu", "--dtype=float32", "--max_seq_len=64", "--max_steps=2", "--log_interval=1"]
    args = train_full_sft.parse_args([*flags, f"--data_path={chats}", f"--out_dir={tmp_path}", "--learning_rate=0"])
    train_full_sft.main(args)
    before, after = (torch.load(tmp_path / f"{name}_64.pth", weights_only=True) for name in ("pretrain", "full_sft"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # learning rate 0: nothing else changed them
    info = json.loads((tmp_path / "full_sft_64.json").read_text())
    log = read_log(tmp_path, train_full_sft)
    assert log[0]["tokens"] > base.log[-1]["tokens"] and info["tokens_seen"] == log[-1]["tokens"]
    assert info["trained_length"] == 128  # it learned to read 128 and is not shortened by a shorter stage
    assert "pretrain_64.pth" in capsys.readouterr().out


def test_from_weight_takes_none_a_path_and_sizes(data, tmp_path):
    chats = data / "chats.jsonl"
    base = train(train_pretrain, tmp_path / "base", data / "texts.jsonl", "--max_steps=1")
    start = train(train_full_sft, tmp_path / "a", chats, "--learning_rate=0").model
    assert not torch.equal(weights_of(start).half(), weights_of(base.model).half())
    path = tmp_path / "base" / "pretrain_64.pth"
    start = train(train_full_sft, tmp_path / "b", chats, "--learning_rate=0", f"--from_weight={path}").model
    assert torch.equal(weights_of(start).half(), weights_of(base.model).half())
    continued = train(train_pretrain, tmp_path / "base", data / "texts.jsonl", "--from_weight=pretrain")
    assert continued.log[0]["tokens"] > base.log[0]["tokens"]


# ------------------------------------------------------------------------------------- experts, precision, compiling


def test_balance_loss_trains_the_router_and_is_not_in_the_logged_loss(data, tmp_path):
    forward = MiniMindForCausalLM.forward

    def silent(self, *args, **keys):
        out = forward(self, *args, **keys)
        out.token_losses = out.token_losses * 0
        return out

    with (
        mock.patch.object(MiniMindForCausalLM, "forward", silent),
        mock.patch.object(start, "build_optimizer", plain_sgd),
    ):
        run = train(train_pretrain, tmp_path, data / "texts.jsonl", "--use_moe", "--learning_rate=1", "--max_steps=1")
    assert run.log[0]["loss"] == 0 and run.log[0]["grad_norm"] > 0
    torch.manual_seed(42)
    fresh = MiniMindForCausalLM(run.model.config).state_dict()
    changed = {name for name, value in run.model.state_dict().items() if not torch.equal(value, fresh[name])}
    assert {name for name in fresh if name.endswith("mlp.gate.weight")} <= changed
    assert (tmp_path / "pretrain_64_moe.pth").exists()


def test_mixture_learns(data, tmp_path):
    log = train(
        train_pretrain, tmp_path, data / "texts.jsonl", "--use_moe", "--max_steps=12", "--learning_rate=0.01"
    ).log
    assert log[-1]["loss"] < log[0]["loss"] - 1.5


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(data, tmp_path):
    path = data / "texts.jsonl"
    exact = train(train_pretrain, tmp_path / "a", path)
    rough = train(train_pretrain, tmp_path / "b", path, "--dtype=bfloat16")
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}
    losses = [[record["loss"] for record in run.log] for run in (exact, rough)]
    assert losses[0][0] != losses[1][0]  # before the first update: the forward pass itself was rougher
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaler_and_autocast_are_those_of_the_dtype(dtype, tmp_path):
    """A scaler for float16 alone; matrix products in what was asked for, gradients and weights in float32."""
    run = new_run(tmp_path)
    run.dtype = dtype
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), run, compiled=False)
    assert engine.scaler.is_enabled() is (dtype == torch.float16)
    products = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: products.append(out.dtype))
    ids = torch.arange(16)[None]
    engine.backward(engine(input_ids=ids, labels=ids, return_logits=False).token_losses.sum())
    assert products == [dtype]
    assert {p.grad.dtype for p in model.parameters()} == {p.dtype for p in model.parameters()} == {torch.float32}


def test_float16_clips_the_gradient_and_not_its_scaled_self(tmp_path):
    """The loss is scaled by 65,536: the norm told, and the length of the step, are those of the true gradient."""
    run = new_run(tmp_path)
    run.dtype = torch.float16
    weight = torch.nn.Linear(2, 1, bias=False)
    before = weight.weight.detach().clone()
    engine = Engine(weight, torch.optim.SGD(weight.parameters(), lr=0.5), run)
    for max_norm, moved in (2.0, [0.6, 0.8]), (0.0, [1.5, 2.0]):  # the gradient is (3, 4): clipped to 2, then whole
        engine.backward((weight.weight * torch.tensor([3.0, 4.0])).sum())
        engine.update(max_norm)
        assert engine.scaler.get_scale() == 65536 and float(engine.grad_norm) == pytest.approx(5.0)
        after = weight.weight.detach().clone()
        torch.testing.assert_close(before - after, torch.tensor([moved]), rtol=1e-4, atol=1e-6)
        before = after


def test_compiled_run_has_the_same_losses(data, tmp_path):
    """The graph is captured for real, the generated code is left out: a minute of g++ would test torch."""
    real, compiled = torch.compile, []

    def capture(model):
        compiled.append(model)
        return real(model, backend="eager")

    path = data / "texts.jsonl"
    with mock.patch.object(torch, "compile", capture):
        plain = train(train_pretrain, tmp_path / "a", path, "--use_compile=auto", "--max_steps=2")
        assert not compiled  # on a CPU it does not pay by itself
        fast = train(train_pretrain, tmp_path / "b", path, "--use_compile=1", "--max_steps=2")
    torch.compiler.reset()
    assert compiled
    assert [r["loss"] for r in fast.log] == pytest.approx([r["loss"] for r in plain.log], rel=1e-5)
    assert [r["val_loss"] for r in fast.log] == pytest.approx([r["val_loss"] for r in plain.log], rel=1e-4)
    assert set(torch.load(tmp_path / "b" / "pretrain_64.pth", weights_only=True)) == set(
        plain.model.state_dict()
    )  # no _orig_mod. prefix


@pytest.mark.parametrize(
    "cpuinfo, fast",
    [
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),  # half the speed of float32, measured
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("Features : asimd bf16", True),
    ],
)
def test_automatic_dtype_on_a_cpu(cpuinfo, fast, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: cpuinfo)
    assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32


FAULTS = """
import resource, torch
{setting}
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_of_freed_tensors_is_kept_on_a_cpu():
    def faults(setting):
        command = [sys.executable, "-c", FAULTS.format(setting=setting)]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert faults("") > 1000  # what is left out without the setting
    assert faults("from trainer.runtime.devices import pick_device; pick_device('cpu')") < 100
