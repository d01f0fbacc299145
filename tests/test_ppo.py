"""PPO: rewards of tokens, GAE, whitening and both losses by hand and by an independent program; what a critic sees."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from small_rl import actor_of, checkpoint_of, rewarded_for_even_ids, start_of, train_small
from small_runs import plain_sgd

from trainer import train_ppo
from trainer.rewards import Reply
from trainer.runtime import start
from trainer.runtime.engine import Engine
from trainer.runtime.rl import unequal
from trainer.runtime.steps import MicroBatch
from trainer.train_ppo import (
    explained,
    gae,
    policy_loss,
    token_rewards,
    token_values,
    value_loss,
    whiten,
)

MASK = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])

# --------------------------------------------------------------------------------------------- rewards and advantages


def test_rewards_of_tokens_by_hand():
    old, ref = torch.full((2, 5), -1.0), torch.tensor([[9.0, -1.5, -1, -0.5, 9], [9, 9, -2, 9, 9]])
    found = token_rewards(torch.tensor([2.0, -1.0]), old, ref, MASK, 0.1)
    torch.testing.assert_close(found, torch.tensor([[0, -0.05, 0, 2 + 0.05, 0], [0, 0, -1 - 0.1, 0, 0]]))


@pytest.mark.parametrize(
    ("lam", "wanted"),
    [  # R = 0.1, 0.2, 1; V = 0.5, 0.4, 0.3: deltas 0, 0.1, 0.7
        (1.0, [0.8, 0.8, 0.7]),  # what comes, 1.3, 1.2 and 1, less V
        (0.95, [0.95 * (0.1 + 0.95 * 0.7), 0.1 + 0.95 * 0.7, 0.7]),
        (0.0, [0.0, 0.1, 0.7]),
    ],
)
def test_gae_by_hand(lam, wanted):
    rewards, values = torch.zeros(2, 5), torch.full((2, 5), 7.0)  # what stands outside the replies must not matter
    rewards[0, 1:4], values[0, 1:4] = torch.tensor([0.1, 0.2, 1.0]), torch.tensor([0.5, 0.4, 0.3])
    rewards[1, 2], values[1, 2] = -1, 0.25
    advantages, returns = gae(rewards, values, MASK, 1.0, lam)
    torch.testing.assert_close(advantages, torch.tensor([[0, *wanted, 0], [0, 0, -1.25, 0, 0]]))
    torch.testing.assert_close(returns, (advantages + values) * MASK)
    assert (advantages != 0).sum() <= MASK.sum()


def test_discount_by_hand():
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
    advantages, _ = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), 0.8, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.8 * 0.25 - 0.5 + 0.8 * 0.5 * 0.75, 0.75]]))


def test_a_reply_to_the_last_column_is_whole():
    mask = torch.tensor([[False, True, True]])
    advantages, _ = gae(torch.tensor([[0, 0, 1.0]]), torch.zeros(1, 3), mask, 1.0, 1.0)
    assert advantages.tolist() == [[0, 1, 1]]
    assert token_rewards(torch.tensor([3.0]), torch.zeros(1, 3), torch.zeros(1, 3), mask, 0.1).tolist() == [[0, 0, 3]]


def test_a_perfect_critic_leaves_no_advantage():
    rewards = torch.randn(2, 5) * MASK
    values = rewards.flip(1).cumsum(1).flip(1)  # what really comes
    advantages, returns = gae(rewards, values, MASK, 1.0, 0.95)
    assert advantages.abs().max() < 1e-6 and whiten(advantages, MASK).abs().max() < 0.01
    torch.testing.assert_close(explained(values, returns, MASK), torch.ones(1))
    assert explained(torch.randn(2, 5), torch.ones(2, 5), MASK).tolist() == [0]
    assert explained(torch.full((2, 5), 0.7), returns, MASK).item() == pytest.approx(0, abs=1e-5)


def test_whitening_by_hand():
    values = torch.tensor([[50.0, 1, 2, 3, 50], [50, 50, 6, 50, 50]])
    deviation = np.std([1, 2, 3, 6], ddof=1) + 1e-4
    wanted = torch.tensor([[0, -2 / deviation, -1 / deviation, 0, 0], [0, 0, 3 / deviation, 0, 0]])
    torch.testing.assert_close(whiten(values, MASK), wanted.float())


def test_equal_rewards_say_nothing():
    replies = [Reply([], "", row=0), Reply([], "", row=1), Reply([], "")]  # the last one only fills up
    assert unequal(torch.tensor([1.0, 0.5, 0.0]), replies).tolist() == [True, True, False]
    assert not unequal(torch.tensor([1.0, 1.0, 0.0]), replies).any()


# -------------------------------------------------------------------------------------------------------------- losses


def test_losses_by_hand():
    mask, old = torch.tensor([[True, True, True, False]]), torch.full((1, 4), -1.0)
    ratios, advantages = torch.tensor([[1.5, 0.5, 0.5, 9.0]]), torch.tensor([[2.0, 2.0, -1.0, 5.0]])
    losses, logged = policy_loss(old + ratios.log(), old, advantages, mask, 0.2)
    torch.testing.assert_close(losses, torch.tensor([[-2.4, -1.0, 0.8, 0.0]]))
    assert logged["clip_fraction"].tolist() == [[1, 0, 1, 0]]
    values, before = torch.tensor([[1.0, 0.1, -1.0, 9.0]]), torch.zeros(1, 4)
    losses = value_loss(values, before, torch.tensor([[1.0, 0.5, 0.0, 0.0]]), mask, 0.2)
    wanted = [[0.5 * 0.8**2, 0.5 * 0.4**2, 0.5, 0.0]]  # the first is right, but it has moved too far at once
    torch.testing.assert_close(losses, torch.tensor(wanted))


def reference_losses(new, old, advantages, values, old_values, returns, mask, eps):
    """Token means of both losses, token by token in Python's floats."""
    policy, value, count = 0.0, 0.0, int(mask.sum())
    for i, t in mask.nonzero().tolist():
        ratio = (new[i, t] - old[i, t]).exp()
        limited = min(max(ratio, torch.tensor(1 - eps)), torch.tensor(1 + eps))
        policy = policy - torch.min(ratio * advantages[i, t], limited * advantages[i, t])
        low, high = old_values[i, t] - eps, old_values[i, t] + eps
        near = torch.min(torch.max(values[i, t], low), high)
        value = value + 0.5 * torch.max((values[i, t] - returns[i, t]) ** 2, (near - returns[i, t]) ** 2)
    return policy / count, value / count


@pytest.mark.parametrize("dirt", [0.0, 200.0, float("inf")])
def test_losses_and_gradients_against_a_reference(dirt):
    """What stands at masked places, 200 apart or infinite, changes neither."""
    generator = torch.Generator().manual_seed(0)
    new, old, advantages, values, old_values, returns = (torch.randn(3, 6, generator=generator) for _ in range(6))
    mask = (torch.arange(6) >= 1) & (torch.arange(6) < torch.tensor([6, 3, 2])[:, None])
    found = []
    for ours in True, False:
        leaf, V = new.masked_fill(~mask, dirt).requires_grad_(), values.clone().requires_grad_()
        if ours:
            losses, _ = policy_loss(leaf, old, advantages, mask, 0.2)
            policy = losses.sum() / mask.sum()
            value = value_loss(V, old_values, returns, mask, 0.2).sum() / mask.sum()
        else:
            policy, value = reference_losses(leaf, old, advantages, V, old_values, returns, mask, 0.2)
        found.append((policy, value, *torch.autograd.grad(policy, leaf), *torch.autograd.grad(value, V)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_value_of_a_token_is_from_before_it():
    scores = torch.tensor([[1.0, 2, 3, 4]])
    batch = MicroBatch([], {"input_ids": scores, "attention_mask": scores}, {}, 0, 0)
    values, _ = token_values(lambda **inputs: SimpleNamespace(scores=scores), batch)
    assert values.tolist() == [[0, 1, 2, 3]]


# ---------------------------------------------------------------------------------------------------- runs of a script


train = partial(train_small, train_ppo)


def critic_of(folder):
    weights = checkpoint_of(folder, "ppo_actor")["engines"]["critic"]["weights"]
    return torch.cat([value.flatten() for value in weights.values()])


def test_gradients_do_not_depend_on_how_a_step_is_split(tmp_path):
    ends = []
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        for batch in 8, 4, 1:
            folder = tmp_path / str(batch)
            flags = [f"--batch_size={batch}", f"--accumulation_steps={8 // batch}", "--learning_rate=1"]
            train(folder, *flags, "--max_steps=1", "--grad_clip=0", "--minibatches=1", "--critic_learning_rate=0.1")
            ends.append((actor_of(folder, "ppo_actor"), critic_of(folder)))
    for actor, critic in ends[1:]:
        torch.testing.assert_close(actor, ends[0][0], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(critic, ends[0][1], atol=1e-5, rtol=1e-3)
    assert (ends[0][0] - start_of(tmp_path / "8")).abs().max() > 1e-3


def test_a_run_is_whole(tmp_path):
    log = train(tmp_path, "--eval_interval=1")
    names = {"reward", "accuracy", "reply_tokens", "cut", "entropy", "loss", "value_loss", "kl", "kl_old", "explained"}
    names |= {"clip_fraction", "updates", "value", "lr", "critic_lr", "critic_grad_norm", "val_reward", "val_accuracy"}
    assert all(names <= line.keys() for line in log) and log[0]["updates"] == 4
    assert log[0]["value"] == 0 != log[1]["value"]  # the head starts at zero
    assert abs(log[0]["kl"]) < 1e-4 and log[0]["critic_lr"] == pytest.approx(3 * log[0]["lr"])
    assert (tmp_path / "ppo_actor_32.pth").exists()


def test_actor_and_critic_never_hold_their_activations_at_once(tmp_path, monkeypatch):
    """Each is done with a micro-batch, backward too, before the other reads it."""
    events = []

    def noted(name, function):
        def call(*args, **keys):
            if torch.is_grad_enabled():
                events.append(name)
            return function(*args, **keys)

        return call

    monkeypatch.setattr(train_ppo, "token_logprobs", noted("actor", train_ppo.token_logprobs))
    monkeypatch.setattr(train_ppo, "token_values", noted("critic", train_ppo.token_values))
    monkeypatch.setattr(Engine, "backward", noted("backward", Engine.backward))
    train(tmp_path, "--max_steps=1", "--minibatches=1", "--inner_epochs=1")
    assert events == ["actor", "backward", "critic", "backward"] * 8


def test_a_cut_reply_pays(tmp_path):
    """All replies of a random model are cut: rewards are lower by the penalty, and so is what the critic learns."""
    logs = [train(tmp_path / str(p), f"--cut_penalty={p}", "--max_steps=1", "--learning_rate=0") for p in (0, 2)]
    assert logs[0][0]["cut"] == 1 and logs[1][0]["reward"] == pytest.approx(logs[0][0]["reward"] - 2)
    assert logs[1][0]["value_loss"] > logs[0][0]["value_loss"]
    assert logs[1][0]["val_reward"] == logs[0][0]["val_reward"]  # held-out replies are told as they are


def test_the_critic_from_the_reward_model(tmp_path):
    log = train(tmp_path, "--critic_weight=reward", "--learning_rate=0", "--max_steps=1")
    judge = torch.load(tmp_path / "reward_32.pth", weights_only=True)
    weights = checkpoint_of(tmp_path, "ppo_actor")["engines"]["critic"]["weights"]
    assert not weights.pop("score.weight").any() and judge.pop("score.weight").any()
    assert all(torch.equal(weights[name], judge[name].float()) for name in weights) and log[0]["value"] == 0


def test_updates_stop_at_the_target_kl(tmp_path):
    log = train(tmp_path, "--target_kl=1e-7", "--learning_rate=1e-2", "--inner_epochs=4")
    assert all(1 <= line["updates"] < 8 for line in log)


def test_the_reward_rises_and_the_critic_foresees_it(tmp_path):
    flags = ["--max_steps=20", "--num_generations=8", "--learning_rate=2e-2", "--top_k=0", "--target_kl=1"]
    with rewarded_for_even_ids():
        log = train(tmp_path, *flags, "--beta=0", "--cut_penalty=0")
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert log[-1]["value"] > 0.3
