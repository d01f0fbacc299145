"""What the reinforcement-learning stages need of the loop (tests/toy_rl.py), on one process, two, and with ZeRO."""

import contextlib
import json
import signal
from itertools import pairwise

import processes
import pytest
import torch
from processes import Training
from small_rl import checkpoint_of, log_of, same
from toy_rl import VOCABULARY

from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM

STEPS = 8
COMMON = ["--device=cpu", "--dtype=float32", "--optimizer=adamw", "--max_seq_len=16"]
COMMON += ["--log_interval=1", "--eval_interval=4", f"--max_steps={STEPS}", "--warmup_ratio=0"]
KINDS = {  # an epoch of 13 prompts has steps of 8 and 5: two ranks get a blank prompt in every second step
    "one process": (1, ["--batch_size=4", "--accumulation_steps=2"]),
    "DDP": (2, ["--batch_size=2", "--accumulation_steps=2"]),
    "ZeRO": (2, ["--batch_size=2", "--accumulation_steps=2", "--deepspeed"]),
}

SPLITS = KINDS | {  # of the same updates
    "one after another": (1, ["--batch_size=1", "--accumulation_steps=8"]),
    "ZeRO 3": (2, ["--batch_size=2", "--accumulation_steps=2", "--deepspeed=zero3.json"]),
}
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # else small weights stay whole


def train(out_dir, kind, *flags, hook=None):
    ranks, own = SPLITS[kind]
    start = out_dir / "start.pth"
    if not start.exists():
        start.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1, vocab_size=len(VOCABULARY)))
        save_weights(
            model, start, stage="toy", tokens_seen=0, data_path="x", data_hash="h", trained_length=16,
        )  # fmt: skip
    return Training(
        "toy_rl",
        [*COMMON, *own, f"--from_weight={start}", f"--out_dir={out_dir}", *flags],
        out_dir / "run",
        ranks,
        hook,
    )


@pytest.fixture(scope="module", params=KINDS)
def peace(request, tmp_path_factory):
    """(kind, folder, run) of an undisturbed run."""
    folder = tmp_path_factory.mktemp("peace")
    run = train(folder, request.param, "--save_interval=3")
    assert set(run.wait()) == {0}, run.err()
    return request.param, folder, run


def test_a_run_is_whole(peace):
    """Two models with two optimizers in one checkpoint, meters from samples and updates, the actor alone written."""
    _, folder, run = peace
    log, saved = log_of(folder, "toy"), checkpoint_of(folder, "toy")
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    wanted = {"reward", "length", "updates", "loss", "value_loss", "kl", "lr", "grad_norm"}
    assert all(wanted | {"critic_lr", "critic_grad_norm"} <= line.keys() for line in log)
    assert [line["step"] for line in log if "val_reward" in line] == [4, 8]
    assert all(line["length"] == 6 and line["updates"] == 4 for line in log)
    assert [line["lr"] for line in log] == pytest.approx([line["critic_lr"] / 0.3 for line in log])
    prompts = (8, 5)  # of 4.5 tokens or so; 2 replies of 6 to each
    grown = [b["tokens"] - a["tokens"] - 12 * prompts[b["step"] % 2 == 0] for a, b in pairwise(log)]
    assert all(2 * n <= tokens <= 5 * n for tokens, n in zip(grown, (5, 8) * 4, strict=False))
    assert saved["engines"].keys() == {"actor", "critic"} and saved["format"] == 2
    assert "score.weight" in saved["engines"]["critic"]["weights"]
    for engine in saved["engines"].values():
        assert all(float(state["step"]) == 4 * STEPS for state in engine["optimizer"].values())
    written = torch.load(folder / "toy_32.pth", weights_only=True)
    weights = saved["engines"]["actor"]["weights"]
    assert all(torch.equal(written[name], value.half()) for name, value in weights.items())
    assert saved["extra"]["trackers"]["visits"].sum() == 2 * (8 + 5) * STEPS // 2
    if len(run.ranks) == 2:
        assert torch.equal(run.weights(0), run.weights(1))


def test_the_reward_rises(peace):
    log = log_of(peace[1], "toy")
    assert log[-1]["reward"] > log[0]["reward"] + 0.05 and log[-1]["val_reward"] > 0.6, log


def test_killed_and_resumed_it_ends_with_the_same_bits(peace, tmp_path):
    kind, folder, _ = peace
    hook = (processes.slow_updates,)
    killed = train(tmp_path, kind, "--save_interval=3", hook=hook).signal_at("toy 5/", signal.SIGKILL)
    codes = killed.wait()
    assert codes[0] == -signal.SIGKILL, killed.err()
    assert checkpoint_of(tmp_path, "toy")["place"]["step"] == 3
    again = train(tmp_path, kind, "--save_interval=3", "--from_resume=1")
    assert set(again.wait()) == {0}, again.err()
    assert "resumed after step 3" in again.out()
    whole, resumed = checkpoint_of(folder, "toy"), checkpoint_of(tmp_path, "toy")
    for part in "engines", "extra", "random":
        assert same(whole[part], resumed[part]), part
    assert log_of(folder, "toy") == log_of(tmp_path, "toy")


def test_a_signal_waits_for_the_end_of_the_rollout(tmp_path):
    hook = (processes.slow_updates,)
    run = train(tmp_path, "one process", "--save_interval=100", hook=hook).signal_at("toy 2/", signal.SIGTERM)
    assert run.wait() == [143], run.err()
    saved = checkpoint_of(tmp_path, "toy")
    step = saved["place"]["step"]
    assert 2 <= step < STEPS
    assert all(float(state["step"]) == 4 * step for state in saved["engines"]["critic"]["optimizer"].values())


@pytest.fixture(scope="module")
def whole_rollouts(tmp_path_factory):
    """Runs whose updates take a whole rollout each: then all kinds take the same steps."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "zero3.json").write_text(json.dumps(ZERO_3))
    flags = ["--ppo_epochs=2", "--parts=1", "--max_steps=3", "--learning_rate=1e-3"]
    with contextlib.chdir(folder):
        runs = [train(folder / kind, kind, *flags) for kind in SPLITS]
    for run in runs:
        assert set(run.wait()) == {0}, run.err()
    return folder


@pytest.mark.parametrize("kind", list(SPLITS)[1:])
def test_an_update_does_not_depend_on_how_it_is_split(kind, whole_rollouts):
    one, other = (checkpoint_of(whole_rollouts / name, "toy")["engines"] for name in ("one process", kind))
    for name in "actor", "critic":
        a, b = (torch.cat([x.flatten() for x in e[name]["weights"].values()]) for e in (one, other))
        assert (a - b).norm() < 1e-4 * a.norm(), name
    for a, b in zip(log_of(whole_rollouts / "one process", "toy"), log_of(whole_rollouts / kind, "toy"), strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("kind", ["one process", "DDP"])
def test_all_ranks_stop_a_rollout_together(kind, tmp_path):
    """The mean that update.mean() gives is that of all ranks: none waits for another that has stopped."""
    run = train(tmp_path, kind, "--target_kl=1e-6", "--max_steps=3", "--ppo_epochs=4", "--learning_rate=0.1")
    assert set(run.wait()) == {0}, run.err()
    assert all(1 <= line["updates"] < 8 for line in log_of(tmp_path, "toy"))


def test_gradients_cross_the_ranks_once_an_update(tmp_path):
    counts = []
    for batch in 1, 4:
        path = tmp_path / f"{batch}.count"
        flags = [f"--batch_size={batch}", f"--accumulation_steps={4 // batch}", "--max_steps=2"]
        run = train(tmp_path / str(batch), "DDP", *flags, hook=(processes.count_buckets, path))
        assert run.wait() == [0, 0], run.err()
        counts.append(json.loads(path.read_text()))
    assert counts[0] == counts[1] > 0 and counts[0] % (2 * 4) == 0


def test_another_critic_is_refused(tmp_path):
    """Before a weight is read: a checkpoint names what it holds."""
    assert train(tmp_path, "one process", "--max_steps=1").wait() == [0]
    path = tmp_path / "checkpoints" / "toy_32_resume.pth"
    for change, words in (
        (lambda engines: engines["critic"]["weights"].popitem(), "another size of the critic"),
        (lambda engines: engines.pop("critic"), "holds ['actor'], this stage has ['actor', 'critic']"),
    ):
        content = checkpoint_of(tmp_path, "toy")
        change(content["engines"])
        torch.save(content, path)
        run = train(tmp_path, "one process", "--max_steps=2", "--from_resume=1")
        assert run.wait() == [1] and words in run.err() and run.err().count("\n") == 1, run.err()
