"""SPO: trackers by hand, which prompts are drawn, whitening, the loss by trl's formula, runs of the script."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from small_rl import actor_of, checkpoint_of, rewarded_for_even_ids, start_of, train_small
from small_runs import plain_sgd
from test_grpo import settings, trl_loss

from trainer import train_spo
from trainer.rewards import Reply, Term
from trainer.runtime import start
from trainer.train_spo import HALF_LIFE, Trackers, spo_loss, unit_rewards, whiten


class Prompts:
    """So many prompts, in the order of an epoch."""

    def __init__(self, count):
        self.order = np.arange(count)[::-1]

    def __len__(self):
        return len(self.order)


def trackers_of(count, step=0):
    return Trackers(Prompts(count), SimpleNamespace(args=SimpleNamespace(seed=1), step=step))


def visit(number, ids=(5, 6), logprobs=(-1.0, -2.0)):
    return Reply([], "", None, ids, False, logprobs, number, row=0)


# ------------------------------------------------------------------------------------------------------------ trackers


def test_trackers_by_hand():
    trackers = trackers_of(3)
    assert trackers.values().tolist() == [0.5] * 3
    trackers.add([visit(0), visit(2), Reply([], "")], [1.0, 0.25, 1.0], [0.0, 0.0, 9.0])  # the last one only fills up
    assert trackers.a.tolist() == pytest.approx([0.96 * 0.5 + 1, 0.5, 0.96 * 0.5 + 0.25])  # at first D is 0
    assert trackers.b.tolist() == pytest.approx([0.96 * 0.5, 0.5, 0.96 * 0.5 + 0.75])
    assert trackers.values()[0] == pytest.approx(1.48 / 1.96)
    trackers.add([visit(0)], [0.0], [HALF_LIFE])  # half of the past: but not less than 0.875
    assert (trackers.a[0], trackers.b[0]) == pytest.approx((0.875 * 1.48, 0.875 * 0.48 + 1))
    trackers.add([visit(1)], [0.0], [0.006])
    rho = 2**-0.1
    assert 0.875 < rho < 0.96 and trackers.a[1] == pytest.approx(rho * 0.5)


def test_a_tracker_stays_positive_and_forgets():
    trackers = trackers_of(1)
    for i in range(400):
        trackers.add([visit(0)], [float(i < 200)], [0.0])
    assert 0 < trackers.a[0] < 0.01 and trackers.b[0] == pytest.approx(1 / 0.04, rel=1e-2)


def test_trackers_that_start_from_first_samples():
    trackers = trackers_of(3)
    trackers.start_from(np.array([0.0, 2.0, 4.0]), 4)
    assert trackers.values().tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert (trackers.a + trackers.b).tolist() == pytest.approx([8, 8, 8])


def test_the_last_reply_of_each_prompt_is_kept():
    trackers = trackers_of(3)
    now = [visit(0, (7,), (-0.5,)), visit(1, (8, 9), (-1.0, -1.5)), Reply([], "")]
    assert [reply.ids for reply in trackers.last_replies(now)] == [(), (), ()]
    trackers.add(now[:1], [1.0], [0.0])
    last = trackers.last_replies([visit(0), visit(1), Reply([], "")])
    assert [list(reply.ids) for reply in last] == [[7], [], []] and last[0].number == 0
    assert last[0].logprobs == [-0.5]


def test_trackers_in_a_checkpoint():
    trackers, again = trackers_of(4), trackers_of(4)
    trackers.add([visit(1), visit(3, (9,), (-0.1,))], [1.0, 0.3], [0.0, 0.0])
    again.load_state_dict(trackers.state_dict())
    assert again.ids == trackers.ids == [[], [5, 6], [], [9]] and again.logprobs == trackers.logprobs
    for t in trackers, again:
        t.add([visit(1)], [0.0], [0.01])
    assert again.a.tolist() == trackers.a.tolist() and again.draw(2) == trackers.draw(2)


def test_prompts_are_drawn_once_each_and_sooner_where_the_outcome_is_open():
    counts = np.zeros(10)
    for step in range(400):
        trackers = trackers_of(10, step)
        trackers.a[:] = trackers.b[:] = 1.0
        trackers.a[:5] = 1e6  # sure
        rows = trackers.draw(3)
        assert len(set(rows)) == 3
        counts[trackers.prompts.order[rows]] += 1
    assert counts[:5].max() < counts[5:].min() / 4  # 0.05 against 0.55
    assert trackers_of(10, 7).draw(10) != trackers_of(10, 8).draw(10) and sorted(trackers_of(10).draw(10)) == [
        *range(10)
    ]
    assert trackers_of(10, 7).draw(4) == trackers_of(10, 7).draw(4)


# ------------------------------------------------------------------------------------------------- rewards, advantages


def term(name, weight=1.0):
    return Term(name, weight, None)


@pytest.mark.parametrize(
    ("terms", "rewards", "mapped"),
    [
        ([term("answer"), term("length", 0.5)], [1, 0.75, 0, -0.5], [1, 0.75, 0, 0]),
        ([term("answer"), term("format", 1.0)], [2, 1, 0], [1, 0.5, 0]),
        ([term("reward_model")], [3, 0, -3], [1, 0.5, 0]),
        ([term("length", 0.5), term("repetition", 0.5)], [0, -0.5, -1], [1, 0.5, 0]),
    ],
)
def test_rewards_between_0_and_1(terms, rewards, mapped):
    assert unit_rewards(torch.tensor(rewards).float(), terms).tolist() == pytest.approx(mapped)


def test_whitening_by_hand():
    values = torch.tensor([1.0, 2, 6, 50])
    found = whiten(values, torch.tensor([1.0, 1, 1, 0]))
    assert found.tolist() == pytest.approx([-2 / np.sqrt(7), -1 / np.sqrt(7), 3 / np.sqrt(7), 0], rel=1e-3)
    lengths = torch.tensor([1.0, 1, 2, 0])
    by_token = whiten(values, lengths)
    assert float((by_token * lengths).sum()) == pytest.approx(0, abs=1e-5)  # what a mean over tokens takes in
    assert abs(float((found * lengths).sum())) > 0.5
    assert not whiten(torch.zeros(3), torch.ones(3)).any()


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_loss_and_gradient_are_those_of_trl(beta):
    generator = torch.Generator().manual_seed(0)
    new, old, ref = (-3 * torch.rand(6, 9, generator=generator) for _ in range(3))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 7, 2, 5])[:, None]
    advantages = torch.randn(6, generator=generator)
    args = settings("dapo", beta=beta, eps_high=0.28)
    leaf, other = new.masked_fill(~mask, 200.0).requires_grad_(), new.clone().requires_grad_()
    losses, _ = spo_loss(leaf, old, ref if beta else None, advantages, mask, args)
    wanted = trl_loss(other, old, ref, advantages, mask, args)
    torch.testing.assert_close(losses.sum() / mask.sum(), wanted)
    grads = torch.autograd.grad(losses.sum() / mask.sum(), leaf) + torch.autograd.grad(wanted, other)
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------------------------------------------- runs of a script


train = partial(train_small, train_spo)


def test_a_run_is_whole(tmp_path):
    log = train(tmp_path, "--max_steps=3", "--eval_interval=1", "--beta=0.1", "--learning_rate=1e-2")
    names = {"reward", "unit_reward", "tracked", "accuracy", "reply_tokens", "entropy", "moved", "loss", "kl", "kl_old"}
    assert all(names | {"clip_fraction", "nonzero_advantages", "val_reward"} <= line.keys() for line in log)
    assert log[0]["tracked"] == 0.5 and log[0]["moved"] == 0  # first visits
    assert log[2]["tracked"] != 0.5 and log[2]["moved"] > 0 and all(0 <= line["unit_reward"] <= 1 for line in log)
    assert (tmp_path / "spo_32.pth").exists()
    trackers = checkpoint_of(tmp_path, "spo")["extra"]["trackers"]
    visited = trackers["lengths"] > 0
    assert (
        8 <= int(visited.sum()) <= 13 and len(trackers["ids"]) == len(trackers["logprobs"]) == trackers["lengths"].sum()
    )
    assert (trackers["a"][~visited] == 0.5).all() and (trackers["a"] > 0).all() and (trackers["b"] > 0).all()


def test_first_samples_start_the_trackers(tmp_path):
    log = train(tmp_path, "--spo_first_samples=2", "--max_steps=1")
    assert log[0]["tracked"] != 0.5
    trackers = checkpoint_of(tmp_path, "spo")["extra"]["trackers"]
    assert (trackers["a"] + trackers["b"])[trackers["lengths"] == 0].tolist() == pytest.approx([8] * 5)


def test_gradients_do_not_depend_on_how_a_step_is_split(tmp_path):
    ends = []
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        for batch in 8, 4, 1:
            folder = tmp_path / str(batch)
            flags = [f"--batch_size={batch}", f"--accumulation_steps={8 // batch}", "--learning_rate=1"]
            train(folder, *flags, "--max_steps=1", "--grad_clip=0", "--minibatches=1")
            ends.append(actor_of(folder, "spo") - start_of(folder))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=1e-6, rtol=1e-3)
    assert ends[0].abs().max() > 1e-4


def test_the_reward_rises(tmp_path):
    flags = ["--max_steps=50", "--rewards=answer=1", "--batch_size=13", "--accumulation_steps=1", "--inner_epochs=2"]
    flags += ["--learning_rate=2e-2", "--top_k=0"]
    with rewarded_for_even_ids():
        rewards = [line["reward"] for line in train(tmp_path, *flags)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
