"""What the reinforcement-learning scripts have in common: mixtures, checks of a run."""

from types import SimpleNamespace

import pytest
from small_rl import train_small

from model.errors import InputError
from trainer import train_grpo, train_ppo, train_spo
from trainer.runtime import watch

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
