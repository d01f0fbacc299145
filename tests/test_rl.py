"""What the reinforcement-learning scripts have in common: mixtures, checks of a run, what a resume must agree on."""

from types import SimpleNamespace

import pytest
from small_rl import train_small

from model.errors import InputError
from trainer import train_grpo, train_ppo, train_spo
from trainer.rewards import Term
from trainer.runtime import watch
from trainer.runtime.rl import settings

STAGES = [train_grpo, train_ppo, train_spo]

# ---------------------------------------------------------------------------------------------------- runs of a script


@pytest.mark.parametrize("script", STAGES)
def test_mixtures_train_with_their_balance_loss(script, tmp_path):
    assert all(1 <= line["peak_expert_load"] <= 4 for line in train_small(script, tmp_path, use_moe=True))
    assert len(list(tmp_path.glob("*_32_moe.pth"))) == 3  # beside the policy's and the reward model's


@pytest.mark.parametrize("script", [train_ppo, train_spo])  # train_grpo says more: see there
def test_a_constant_reward_ends_the_run_with_the_reason(script, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "DEAD_STEPS", 2)
    with pytest.raises(InputError, match="nothing was learned in 2 steps"):
        train_small(script, tmp_path, "--rewards=format=1", "--max_steps=5")


@pytest.mark.parametrize("script", [train_ppo, train_spo])
def test_a_fault_in_scoring_is_caught_before_the_first_update(script, tmp_path, monkeypatch):
    scoring = script.token_logprobs

    def hot(net, batch, args):
        return scoring(net, batch, SimpleNamespace(**{**vars(args), "temperature": 1.3}))

    monkeypatch.setattr(script, "token_logprobs", hot)
    with pytest.raises(InputError, match="what was sampled is not what is scored: before the first update of step 1"):
        train_small(script, tmp_path)


# -------------------------------------------------------------------------------------------------------- settings


def found(script, *flags, weight=1.0, judged=None):
    """settings() of a run with these flags, rewarded by answers and, where a path is named, by a reward model."""
    terms = [Term("answer", weight, None)]
    terms += [Term("reward_model", 0.5, SimpleNamespace(path=judged))] if judged else []
    return settings(script.parse_args(list(flags)), terms, None)


@pytest.mark.parametrize("script", STAGES)
def test_flags_of_the_algorithm_must_agree_and_those_of_the_machine_need_not(script):
    before = found(script)
    own = {"--max_new_tokens=9", "--temperature=0.5", "--top_k=9", "--reasoning=1", "--inner_epochs=3", "--beta=0.7"}
    for flag in own:
        name = flag.split("=")[0]
        assert name in {key for key, value in found(script, flag).items() if before[key] != value}
    same = "--batch_size=1", "--device=cpu", "--reward_model=reward", "--out_dir=elsewhere", "--log_interval=7"
    assert found(script, *same) == before
    assert found(script, weight=2.0) != before


def test_a_reward_model_is_known_by_its_weights_wherever_they_are(tmp_path):
    """A file, and a folder whose configuration counts too."""
    path, copy, folder = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "folder"
    folder.mkdir()
    for file in path, copy, folder / "model.safetensors", folder / "config.json":
        file.write_bytes(b"weights")
    known = [found(train_grpo, judged=judge) for judge in (path, copy, folder)]
    assert known[0] == known[1] != known[2] and known[0]["--rewards"] == "answer=1,reward_model=0.5"
    assert "reward model weights" not in found(train_grpo)
    for judge, file in (path, path), (folder, folder / "model.safetensors"), (folder, folder / "config.json"):
        before = found(train_grpo, judged=judge)
        file.write_bytes(b"others")
        after = found(train_grpo, judged=judge)
        assert {key for key in before if before[key] != after[key]} == {"reward model weights"}
