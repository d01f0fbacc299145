"""The estimate of a run's memory, against what a step takes, and the refusal of what cannot fit."""

import errno
import gc
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import Training, measure_memory
from small_rl import write_world

from model.errors import run_script
from model.generation import Engine
from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_grpo, train_ppo, train_pretrain
from trainer.runtime import memory, rl, steps
from trainer.runtime.run import Run

CPU = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, words = (
        random.Random(0),
        ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain"],
    )
    rows = [{"text": " ".join(rng.choice(words) for _ in range(300))} for _ in range(90)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
@pytest.mark.parametrize(
    "stage, more",
    [
        ("pretrain", ["--batch_size=64"]),
        ("pretrain", ["--batch_size=16"]),
        ("pretrain", ["--batch_size=16", "--use_moe"]),
        ("lora", ["--batch_size=24", "--lora_targets=all"]),
        ("distillation", ["--batch_size=16", "--teacher=full_sft", "--teacher_hidden_size=128"]),
        (
            "ppo",
            ["--batch_size=16", "--num_generations=2", "--max_new_tokens=230", "--rewards=format=1", "--max_steps=1"],
        ),
    ],
)
def test_estimate_is_near_the_peak_of_a_step(stage, more, data, tmp_path):
    flags = [*CPU, "--hidden_size=128", "--num_hidden_layers=4", "--max_seq_len=256", "--max_steps=2"]
    flags += [f"--out_dir={tmp_path}", "--accumulation_steps=1", *more]
    if stage == "pretrain":
        flags.append(f"--data_path={data}")
    else:
        save_weights(
            MiniMindForCausalLM(MiniMindConfig(hidden_size=128, num_hidden_layers=4)), tmp_path / "full_sft_128.pth",
            stage="full_sft", tokens_seen=0, data_path="x", data_hash="h", trained_length=256,
        )  # fmt: skip
        turns = [("user", "tell"), ("assistant", "the quick brown fox " * 55)]
        row = {"conversations": [{"role": role, "content": content} for role, content in turns]}
        (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 60)
        flags += [f"--data_path={tmp_path / 'chats.jsonl'}", "--from_weight=full_sft"]
    path = tmp_path / "memory.json"
    run = Training(stage, flags, tmp_path / "run", hook=(measure_memory, path))
    assert run.wait() == [0], run.err()
    estimate, measured = json.loads(path.read_text())
    assert measured > 100 * 2**20
    assert 0.6 < estimate / measured < 1.7


def test_what_cannot_fit_is_refused_with_what_would(data, tmp_path, monkeypatch, capsys):
    flags = [*CPU, "--hidden_size=64", "--num_hidden_layers=2", "--max_seq_len=64", f"--data_path={data}"]
    flags += [f"--out_dir={tmp_path}", "--batch_size=512", "--accumulation_steps=2", "--max_steps=1"]
    kept = {name: tmp_path / name for name in ("pretrain_64.pth", "pretrain_64.json")}
    for path in kept.values():
        path.write_text("of an earlier run")
    monkeypatch.setattr(memory, "free_memory", lambda device: 300 * 2**20)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train_pretrain.parse_args(flags), train_pretrain.main)
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert "pretrain 1/" not in out and err.startswith("error: batch size 512 with rows of 64 needs about")
    assert all(path.read_text() == "of an earlier run" for path in kept.values())
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*_resume.pth"))
    rows, accumulation = map(int, re.search(r"--batch_size (\d+) --accumulation_steps (\d+) would fit", err).groups())
    assert 1 < rows < 512 and rows * accumulation >= 1024 > rows * (accumulation - 1)
    again = [*flags, f"--batch_size={rows}", f"--accumulation_steps={accumulation}", "--out_dir", str(tmp_path / "b")]
    train_pretrain.main(train_pretrain.parse_args(again))  # what was advised is not refused


def test_a_batch_is_no_larger_than_the_data(tmp_path, monkeypatch, capsys):
    """A few rows fit, whatever --batch_size says; the step is the same."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two words"}\n{"text": "the third one"}\n')
    flags = [*CPU, "--hidden_size=64", "--num_hidden_layers=2", "--max_seq_len=64", "--packing=0", "--max_steps=2"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 300 * 2**20)
    losses = []
    for batch_size in (3, 100_000):
        out = tmp_path / str(batch_size)
        more = [f"--data_path={path}", f"--out_dir={out}", f"--batch_size={batch_size}", "--log_interval=1"]
        train_pretrain.main(train_pretrain.parse_args([*flags, *more]))
        losses.append([json.loads(line)["loss"] for line in (out / "logs" / "pretrain_64.jsonl").open()])
        assert "a step: 1 x 3 rows = " in capsys.readouterr().out
    assert losses[0] == losses[1]


def test_not_even_a_row(data, tmp_path, monkeypatch):
    flags = [*CPU, "--hidden_size=64", "--num_hidden_layers=2", "--max_seq_len=64", f"--data_path={data}"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**20)
    with pytest.raises(memory.InputError, match="not even one row fits"):
        train_pretrain.main(train_pretrain.parse_args([*flags, f"--out_dir={tmp_path}"]))


SHARED = [
    OSError(errno.ENOSPC, "No space left on device"),  # of a semaphore
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("unable to write to file </torch_81_3_0>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that dataloader's workers "
                 "are out of shared memory. Please try to raise your shared memory limit."),
]  # fmt: skip


@pytest.mark.parametrize("error", SHARED, ids=str)
def test_shared_memory_of_loader_processes_is_told_from_a_disk(error, data, tmp_path, monkeypatch):
    monkeypatch.setattr(steps.DataLoader, "__iter__", lambda self: (_ for _ in ()).throw(error))
    flags = [*CPU, "--hidden_size=64", "--num_hidden_layers=2", "--max_seq_len=64", f"--data_path={data}"]
    flags += [f"--out_dir={tmp_path}", "--max_steps=1"]
    with pytest.raises(memory.InputError, match=r"/dev/shm is full or cannot be written: .* --num_workers 0"):
        train_pretrain.main(train_pretrain.parse_args([*flags, "--num_workers=1"]))
    with pytest.raises(type(error)) as same:  # no process, no shared memory
        train_pretrain.main(train_pretrain.parse_args([*flags, "--num_workers=0"]))
    assert same.value is error


def test_a_loader_that_was_not_made_leaves_no_traceback(data, tmp_path, monkeypatch):
    """torch's own half of one, which is thrown away later."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    lost = []
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    flags = [*CPU, "--hidden_size=64", "--num_hidden_layers=2", "--max_seq_len=64", f"--data_path={data}"]
    flags += [f"--out_dir={tmp_path}", "--max_steps=1", "--num_workers=1"]
    with pytest.raises(memory.InputError, match="/dev/shm"):
        train_pretrain.main(train_pretrain.parse_args(flags))
    gc.collect()
    assert not lost


def test_a_file_that_loaders_cannot_read_is_told_as_such():
    assert not memory.lacks_shared_memory(OSError(errno.EACCES, "Permission denied", "out/cache/ids.bin"))
    assert not memory.lacks_shared_memory(RuntimeError("shapes cannot be multiplied"))


def test_the_probe_leaves_no_trace(tmp_path):
    """No gradient, no random number drawn, whatever the dropout."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, dropout=0.5)).train()
    run = Run(train_pretrain.parse_args([*CPU, "--max_seq_len=64", f"--out_dir={tmp_path}"]), "pretrain")
    before = torch.get_rng_state()
    fixed, per_row = memory.estimate_memory(model, run)
    assert fixed > 4 * sum(p.numel() for p in model.parameters()) and per_row > 64 * 64 * 4
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_what_rl_needs_beside_its_policy():
    """By hand: a critic's gradients and optimizer state; an engine's own weights, its keys and values."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))  # 2 key heads of 8
    numbers = sum(p.numel() for p in model.parameters())
    assert memory.training_bytes(model, "adamw") == 12 * numbers and memory.training_bytes(model, "muon") == 8 * numbers
    model.lm_head.weight.requires_grad_(False)
    assert memory.training_bytes(model, "muon") == 8 * (numbers - model.lm_head.weight.numel())
    cache = 2 * 2 * 2 * 8 * (64 * 257)  # layers, keys and values, heads, width; 64 slots of 256 tokens and one more
    assert memory.sampling_bytes(model, 40, 160, 4) == 4 * (numbers + cache)
    engine = Engine(model, max_batch=64)
    engine.decoder.reserve(40, 160)
    assert engine.decoder.cache.numel() == cache


@pytest.mark.parametrize("script", [train_grpo, train_ppo])
def test_rl_counts_what_it_needs_beside_its_policy(script, tmp_path, monkeypatch):
    there, opened = [], rl.open_reference

    def check(model, run, logits, beside, critic):
        assert beside == memory.sampling_bytes(model, 42, args.max_seq_len, 4)  # 32 replies, or 42 to held-out prompts
        assert bool(critic) == (script is train_ppo)
        assert there == ["reference"]  # it has its memory already when what is free is asked for

    monkeypatch.setattr("trainer.runtime.run.check_memory", check)
    monkeypatch.setattr(rl, "open_reference", lambda *args: there.append("reference") or opened(*args))
    flags = ["--batch_size=4", "--accumulation_steps=2", "--num_generations=4", "--max_steps=1"]
    args = script.parse_args([*write_world(tmp_path), *flags])
    held_out = tmp_path / "prompts_val.jsonl"
    held_out.write_text(held_out.read_text() * 14)
    script.main(args)


@pytest.mark.parametrize("optimizer, numbers", [("adamw", 3), ("muon", 2)])  # each 4 bytes, a gradient among them
def test_a_critic_by_hand(optimizer, numbers, tmp_path):
    """One of the policy's size adds what its weights are trained with, a larger one its longer rows too."""
    flags = [*CPU, "--max_seq_len=64", f"--out_dir={tmp_path}", f"--optimizer={optimizer}"]
    run = Run(train_pretrain.parse_args(flags), "pretrain")
    model, *critics = (
        kind(MiniMindConfig(hidden_size=64, num_hidden_layers=layers))
        for kind, layers in ((MiniMindForCausalLM, 2), (MiniMindForScoring, 2), (MiniMindForScoring, 6))
    )
    fixed, per_row = memory.estimate_memory(model, run)
    for critic, longer in zip(critics, (1.0, 7 / 3), strict=True):  # all layers, and the gradients of one
        with_critic, row = memory.estimate_memory(model, run, critic=critic)
        weights = sum(p.numel() for p in critic.parameters())
        assert with_critic - fixed == pytest.approx(4 * numbers * weights, rel=0.02)
        assert row / per_row == pytest.approx(longer, rel=0.1)


V1 = {
    "memory.limit_in_bytes": 1000,
    "memory.usage_in_bytes": 900,
    "memory.stat": "cache 7\ntotal_active_file 60\ntotal_inactive_file 40",
}
V2 = {"memory.max": 1000, "memory.current": 900, "memory.stat": "anon 800\nactive_file 60\ninactive_file 40"}
LIMITS = {
    "none": ("0::/\n", {}, []),
    "v2, the top of a container's tree": ("0::/\n", {"": V2}, [200]),
    "v2, no limit": ("0::/\n", {"": V2 | {"memory.max": "max"}}, []),
    "v2, on a group above too": ("0::/a/b\n", {"a/b": V2, "a": V2 | {"memory.current": 950}}, [200, 150]),
    "v2, more used than allowed": ("0::/a\n", {"a": V2 | {"memory.current": 1300}}, [0]),
    "v1": ("3:cpu:/x\n4:hugetlb,memory:/a\n0::/\n", {"memory/a": V1}, [200]),
    "v1, named as the host names it": ("4:memory:/docker/123\n", {"memory": V1}, [200]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_memory_of_a_container(name, tmp_path):
    groups, tree, expected = LIMITS[name]
    (tmp_path / "groups").write_text(groups)
    for folder, files in tree.items():
        (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (tmp_path / "tree" / folder / file).write_text(f"{content}\n")
    assert memory.container_memory(tmp_path / "groups", tmp_path / "tree") == expected


def test_free_memory_is_no_more_than_the_container_has(monkeypatch):
    monkeypatch.setattr(memory, "container_memory", lambda: [5 * 2**20, 3 * 2**20])
    assert memory.free_memory(torch.device("cpu")) == 3 * 2**20


def test_free_memory_of_this_machine():
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
