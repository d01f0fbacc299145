"""What every later stage shares with pretraining: exact resume, equal weights on any number of ranks, ZeRO."""

import json
import signal

import processes
import pytest
import torch
from processes import Training

from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM

STEPS = 8  # of 8 rows; an epoch of 29 rows has 8 8 8 5: its last step leaves the second rank with a blank row
COMMON = ["--device=cpu", "--dtype=float32", "--packing=0", "--log_interval=2", "--eval_interval=4"]
STAGES = {  # script: (name of its files, data, its own flags)
    "lora": ("lora_identity_64", "chats", ["--lora_rank=4", "--lora_targets=all"]),
    "dpo": ("rlhf_64", "pairs", ["--max_seq_len=128"]),
    "reward": ("reward_64", "pairs", ["--max_seq_len=128"]),
    "distillation": ("distill_64", "chats", ["--alpha=0.3", "--temperature=2"]),
    "distill_reason": ("reason_64", "thoughts", []),
}
ADAPTERS = "lora"
LOSSES = {  # after 2, 4, 6, 8 steps: what these runs were before the loop was shared
    "lora": [8.773106, 8.780560, 8.750655, 8.706614],
    "dpo": [0.687794, 0.672242, 0.652909, 0.635528],
    "reward": [0.692805, 0.690743, 0.685353, 0.676332],
    "distillation": [2.640309, 2.608205, 2.570918, 2.542112],
    "distill_reason": [8.787910, 8.630048, 8.498333, 8.406522],
}


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(count):
    """Rows of every format, of unequal lengths."""
    thought = "<think>\n{0} + 1 = {1}.\n</think>\n<answer>\n{1}\n</answer>"
    good = [turns(f"Question {i}?", "Answer, " * (1 + i % 4) + f"{i}.") for i in range(count)]
    bad = [turns(f"Question {i}?", "No. " * (1 + i % 3)) for i in range(count)]
    return {
        "chats": [{"conversations": turns} for turns in good],
        "pairs": [{"chosen": a, "rejected": b} for a, b in zip(good, bad, strict=True)],
        "thoughts": [{"conversations": turns(f"{i} + 1 = ?", thought.format(i, i + 1))} for i in range(count)],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a start, the same start with dropout, a teacher."""
    home = tmp_path_factory.mktemp("stages")
    for suffix, count in ("", 29), ("_val", 7):
        for name, rows in rows_of(count).items():
            (home / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"stage": "full_sft", "tokens_seen": 0, "data_path": "x", "data_hash": "h", "trained_length": 64}
    for seed, name, dropout in (0, "start", 0.0), (0, "dropout", 0.1), (1, "teacher", 0.0):
        torch.manual_seed(seed)
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, dropout=dropout))
        save_weights(model, home / f"{name}.pth", **keys)
    return home


def train(home, stage, out_dir, *flags, start="start", ranks=1, hook=None):
    _, data, own = STAGES[stage]
    length = [] if any("max_seq_len" in flag for flag in own) else ["--max_seq_len=64"]
    own = [*own, *length, *([f"--teacher={home / 'teacher.pth'}"] if stage == "distillation" else [])]
    files = [f"--data_path={home / data}.jsonl", f"--from_weight={home / start}.pth", f"--out_dir={out_dir}"]
    flags = [*COMMON, *own, *files, f"--max_steps={STEPS}", "--optimizer=adamw", *flags]
    return Training(stage, flags, out_dir / "run", ranks, hook)


def checkpoint_of(out_dir, stage):
    """The content, weights and optimizer of the one model on top."""
    content = torch.load(out_dir / "checkpoints" / f"{STAGES[stage][0]}_resume.pth", weights_only=True)
    return content | content["engines"]["model"]


def log_of(out_dir, stage):
    """The log without what depends on the clock."""
    lines = (out_dir / "logs" / f"{STAGES[stage][0]}.jsonl").read_text().splitlines()
    timed = ("tokens_per_s", "elapsed_s", "peak_memory_mb")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def ended_well(*runs):
    for run in runs:
        assert set(run.wait()) == {0}, run.err()


@pytest.fixture(scope="module", params=STAGES)
def resumed(request, home, tmp_path_factory):
    """Folders of an undisturbed run, and of one that was killed after its fourth step and resumed."""
    stage, folder = request.param, tmp_path_factory.mktemp("resumed")
    flags = ["--batch_size=8", "--save_interval=2"]
    peace = train(home, stage, folder / "peace", *flags, start="dropout")
    killed = train(home, stage, folder / "killed", *flags, start="dropout", hook=(processes.slow_steps,))
    killed.signal_at(f"{STAGES[stage][0].removesuffix('_64')} 4/", signal.SIGKILL)
    assert killed.wait() == [-signal.SIGKILL], killed.err()
    again = train(home, stage, folder / "killed", *flags, "--from_resume=1", start="dropout")
    ended_well(peace, again)
    assert "resumed after step" in again.out()
    return stage, folder


def test_a_killed_and_resumed_run_ends_with_the_same_bits(resumed):
    stage, folder = resumed
    whole, broken = (checkpoint_of(folder / name, stage) for name in ("peace", "killed"))
    assert whole["place"]["step"] == broken["place"]["step"] == STEPS
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, broken["weights"][name]), name
    assert whole["optimizer"].keys() == broken["optimizer"].keys() != set()
    for name, state in whole["optimizer"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(broken["optimizer"][name][key])), (name, key)
    assert log_of(folder / "peace", stage) == log_of(folder / "killed", stage)


@pytest.fixture(scope="module", params=STAGES)
def split(request, home, tmp_path_factory):
    """(stage, folder): the same steps as 1 process x 8 rows, 2 x 4, 1 x 4 x 2, and 2 x 4 through ZeRO."""
    stage, folder = request.param, tmp_path_factory.mktemp("split")
    runs = {
        "1 x 8": train(home, stage, folder / "1 x 8", "--batch_size=8"),
        "2 x 4": train(home, stage, folder / "2 x 4", "--batch_size=4", ranks=2),
        "1 x 4 x 2": train(home, stage, folder / "1 x 4 x 2", "--batch_size=4", "--accumulation_steps=2"),
        "ZeRO": train(home, stage, folder / "ZeRO", "--batch_size=4", "--deepspeed", ranks=2),
    }
    ended_well(*runs.values())
    return stage, folder, runs


def test_weights_and_meters_do_not_depend_on_how_a_step_is_split(split):
    stage, folder, _ = split
    one, first = checkpoint_of(folder / "1 x 8", stage)["weights"], log_of(folder / "1 x 8", stage)
    assert {"val_loss", "loss", "grad_norm"} <= first[-1].keys()
    for name in "2 x 4", "1 x 4 x 2", "ZeRO":
        other = checkpoint_of(folder / name, stage)["weights"]
        assert one.keys() == other.keys()
        for key, weight in one.items():
            assert (weight - other[key]).norm() <= 2e-5 * weight.norm(), (name, key)
        for a, b in zip(first, log_of(folder / name, stage), strict=True):
            for key in a.keys() & b.keys() - {"grad_norm"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (name, key)


def test_losses_are_those_recorded(split):
    stage, folder, _ = split
    assert [line["loss"] for line in log_of(folder / "1 x 8", stage)] == pytest.approx(LOSSES[stage], rel=1e-4)


def test_replicas_stay_equal_to_the_bit(split):
    _, _, runs = split
    assert torch.equal(runs["2 x 4"].weights(0), runs["2 x 4"].weights(1))


def test_every_stage_learns_and_an_adapter_alone_moves(split, home):
    stage, folder, _ = split
    start = torch.load(home / "start.pth", weights_only=True)
    trained = checkpoint_of(folder / "1 x 8", stage)["weights"]
    moved = [name for name, weight in trained.items() if name in start and not torch.equal(weight, start[name].float())]
    assert (moved == []) == (stage == ADAPTERS)
    if stage == ADAPTERS:
        assert all(trained[name].any() for name in trained if name.endswith(".lora.B.weight"))
