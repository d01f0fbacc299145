"""The reinforcement-learning scripts as processes: killed and resumed, two ranks by torchrun, ZeRO, replicas apart."""

import importlib
import json
import re
import signal

import processes
import pytest
import torch
from processes import Torchrun, Training
from small_rl import actor_of, checkpoint_of, log_of, same, start_of, write_world

FLAGS = {
    "grpo": ["--num_generations=4", "--beta=0.1", "--weight_decay=0.1"],
    "ppo": ["--num_generations=2"],
    "spo": ["--beta=0.1", "--spo_first_samples=1"],
}
NAMES = {"ppo": "ppo_actor"}  # of what a script writes, where it is not its own
OF_A_RANK = {"explained", "degenerate", "nonzero_advantages"}  # computed on each rank and then averaged
STAGES = list(FLAGS)
ONE = ["--batch_size=4", "--accumulation_steps=2"]
TWO = ["--batch_size=2", "--accumulation_steps=2"]


def flags_of(stage, folder, *more):
    return [*write_world(folder), *FLAGS[stage], *ONE, "--max_steps=6", "--save_interval=2", "--eval_interval=2", *more]


@pytest.mark.parametrize("stage", STAGES)
def test_a_reply_with_what_it_earned_is_shown_every_few_steps(stage, tmp_path, capsys):
    script = importlib.import_module(f"trainer.train_{stage}")
    more = ["--log_interval=2", "--max_steps=4", "--eval_interval=100", "--rewards=reward_model=1,length=0.5,answer=2"]
    script.main(script.parse_args([*flags_of(stage, tmp_path), *more]))
    lines = capsys.readouterr().out.splitlines()
    number = r"-?\d+\.\d\d"
    told = rf"  reward {number}  reward_model {number}  length {number}  answer {number}"
    asked = r"""  'Say something\. .*\d' -> ['"].*['"]"""
    shown = [i for i, line in enumerate(lines) if re.fullmatch(asked + told, line)]
    steps = [i for i, line in enumerate(lines) if re.match(rf"{NAMES.get(stage, stage)} [24]/4  ", line)]
    assert len(steps) == 2 and shown == [i - 1 for i in steps]  # before each line of the log


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_it_ends_with_the_same_bits(stage, tmp_path):
    """Everything that is state: policy, optimizer, prompt order, random numbers, what the checks have seen."""
    whole, cut, more = tmp_path / "whole", tmp_path / "cut", ["--dynamic_sampling=1"] * (stage == "grpo")
    run = Training(stage, flags_of(stage, whole, *more), whole / "run")
    killed = Training(stage, flags_of(stage, cut, *more), cut / "run", hook=(processes.slow_updates,))
    killed.signal_at(f"{NAMES.get(stage, stage)} 3/", signal.SIGKILL)
    assert run.wait() == [0], run.err()
    assert killed.wait() == [-signal.SIGKILL] and checkpoint_of(cut, NAMES.get(stage, stage))["place"]["step"] == 2
    again = Training(stage, flags_of(stage, cut, *more, "--from_resume=1"), cut / "run")
    assert again.wait() == [0], again.err()
    assert "resumed after step 2" in again.out()
    expected, found = checkpoint_of(whole, NAMES.get(stage, stage)), checkpoint_of(cut, NAMES.get(stage, stage))
    for part in "engines", "extra", "random":
        assert same(expected[part], found[part]), part
    assert log_of(whole, NAMES.get(stage, stage)) == log_of(cut, NAMES.get(stage, stage))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_by_torchrun_are_one(stage, tmp_path):
    """The same updates from a rank's whole rollout; an epoch of 13 prompts leaves one rank a blank prompt."""
    ends = {}
    for name, own in ("one", ONE), ("two", TWO):
        folder = tmp_path / name
        flags = [*flags_of(stage, folder), *own, "--minibatches=1", "--max_steps=5"]
        if name == "one":
            run = Training(stage, flags, folder / "run")
            assert run.wait() == [0], run.err()
        else:
            run = Torchrun(
                ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"],
                stage,
                flags,
                folder / "run",
            )
            assert run.wait() == 0, run.err()
        ends[name] = actor_of(folder, NAMES.get(stage, stage))
    assert (ends["one"] - ends["two"]).norm() < 1e-4 * ends["one"].norm()
    assert (ends["one"] - start_of(tmp_path / "one")).norm() > 1e-3 * ends["one"].norm()
    one, two = (log_of(tmp_path / name, NAMES.get(stage, stage)) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - OF_A_RANK:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def drift():
    """A process whose weights leave those of the others, as where gradients cross no more."""
    from trainer.runtime.engine import Engine

    update = Engine.update

    def drifting(self, max_norm):
        update(self, max_norm)
        with torch.no_grad():
            next(self.model.parameters()).add_(1e-6)

    Engine.update = drifting


def test_replicas_that_part_end_the_run(tmp_path):
    flags = [*flags_of("grpo", tmp_path), *TWO]
    run = Training("grpo", flags, tmp_path / "run", ranks=2, hook=(drift,))
    assert 1 in run.wait()
    assert "after step 5 process 1 has other weights than process 0" in run.err(0) + run.err(1)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_takes_the_same_updates(stage, tmp_path):
    """ZeRO 2 on two ranks."""
    (tmp_path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    ends = []
    for name, ranks, own in ("one", 1, ONE), ("zero", 2, [*TWO, f"--deepspeed={tmp_path / 'zero2.json'}"]):
        folder = tmp_path / name
        flags = [*flags_of(stage, folder), *own, "--minibatches=1", "--max_steps=3"]
        run = Training(stage, flags, folder / "run", ranks)
        assert set(run.wait()) == {0}, run.err()
        ends.append(actor_of(folder, NAMES.get(stage, stage)))
    assert (ends[0] - ends[1]).norm() < 1e-4 * ends[0].norm()
