"""GRPO and its variants: advantages, losses and k3 by hand and by trl's formula, gradients however a step is split."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from small_rl import actor_of, rewarded_for_even_ids, start_of, write_world
from small_runs import plain_sgd, read_log

from dataset.lm_dataset import BLANK
from model.errors import InputError
from model.loading import load_model
from trainer import train_grpo
from trainer.rewards import Reply
from trainer.runtime import rl, start, watch
from trainer.runtime.steps import MicroBatch, Step
from trainer.train_grpo import DEFAULTS, group_advantages, grpo_loss, parse_args, sample_groups

LOSS_TYPES = list(DEFAULTS)


# ---------------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2, 3, 0, 0, 1])
    advantages, signal = group_advantages(rewards, 4)
    half = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # deviations 1/2, unbiased variance 4 (1/4) / 3
    third = math.sqrt(2) + 1e-4  # 3 0 0 1: mean 1, variance (4 + 1 + 1 + 0) / 3
    wanted = [half, -half, -half, half, 0, 0, 0, 0, 2 / third, -1 / third, -1 / third, 0]
    torch.testing.assert_close(advantages, torch.tensor(wanted))
    assert signal.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    unscaled, _ = group_advantages(rewards, 4, scaled=False)
    assert unscaled.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 2, -1, -1, 0]


def test_rewards_that_differ_by_rounding_are_equal():
    third = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64).float() + torch.tensor([0.0, 3e-8])
    advantages, signal = group_advantages(third, 2)
    assert not signal.any() and not advantages.any()


# ---------------------------------------------------------------------------------------------------------------- loss


def settings(loss_type, **given):
    found = {"eps_low": 0.2, "eps_high": 0.2, "kl_unbiased": False, "max_new_tokens": 5, **DEFAULTS[loss_type]}
    return SimpleNamespace(loss_type=loss_type, **(found | given))


RATIOS = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 7.0]])  # the last token of the second reply is padding
MASK = torch.tensor([[True, True, True], [True, True, False]])
BY_HAND = {  # A = 2 and -1; sums over tokens of - min(r A, clip(r) A)
    # first: -2.4, -1.0, -2.0; second: 1.5, 0.8
    "grpo": (-(2.4 + 1 + 2) / 3 + (1.5 + 0.8) / 2) / 2,
    "dr_grpo": (-(2.4 + 1 + 2) + (1.5 + 0.8)) / 5 / 2,
    "dapo": (-(2 * 1.28 + 1 + 2) + (1.5 + 0.8)) / 5,
}


@pytest.mark.parametrize("loss_type", BY_HAND)
def test_clipped_losses_by_hand(loss_type):
    args = settings(loss_type, beta=0.0)
    old = torch.full((2, 3), -1.0)
    losses, logged = grpo_loss(old + RATIOS.log(), old, None, torch.tensor([2.0, -1.0]), MASK, args)
    divisor = 5 if loss_type == "dapo" else 2  # tokens, or replies
    assert float(losses.sum() / divisor) == pytest.approx(BY_HAND[loss_type], rel=1e-6)
    assert logged["clip_fraction"].tolist() == [[1, 0, 0], [0, 1, 0]] and "kl" not in logged
    expected = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.0)]
    assert logged["kl_old"][0].tolist() == pytest.approx(expected, abs=1e-6)
    assert losses[1, 2] == 0


def test_cispo_by_hand():
    """What is clipped is the weight of log pi, min(r, 1 + 0.25): a constant for the gradient, none of which is lost."""
    old = torch.full((2, 3), -1.0)
    new = (old + RATIOS.log()).requires_grad_()
    args = settings("cispo", eps_high=0.25)
    losses, logged = grpo_loss(new, old, None, torch.tensor([2.0, -1.0]), MASK, args)
    weights = torch.tensor([[1.25, 0.5, 1.0], [1.25, 0.5, 0.0]]) * torch.tensor([[2.0], [-1.0]])
    torch.testing.assert_close(losses, -weights * new.detach())
    (grad,) = torch.autograd.grad(losses.sum(), new)
    torch.testing.assert_close(grad, -weights)
    assert logged["clip_fraction"].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_k3_by_hand():
    """exp(d) - d - 1 of d = log ref - log pi: for d = log 2 it is 2 - log 2 - 1; it counts beta times."""
    new, ref = torch.zeros(1, 2), torch.tensor([[math.log(2), 99.0]])
    mask, none = torch.tensor([[True, False]]), torch.zeros(1)
    losses, logged = grpo_loss(new, new, ref, none, mask, settings("grpo", beta=0.5))
    k3 = 1 - math.log(2)
    assert losses.tolist() == [[pytest.approx(0.5 * k3), 0]] and logged["kl"].tolist() == [[pytest.approx(k3), 0]]


def test_the_gradient_of_the_unbiased_term_is_that_of_the_kl():
    """sum over V of pi (log pi - log ref), exactly: sampling every token once, weighted by its probability."""
    logits, ref = torch.randn(5, requires_grad=True), torch.randn(5).log_softmax(0)
    logprobs = logits.log_softmax(0)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)[0]
    found = {}
    for unbiased in True, False:
        new = logits.log_softmax(0)[:, None]  # five replies of a token
        args = settings("dapo", beta=1.0, kl_unbiased=unbiased)
        mask = torch.ones(5, 1, dtype=torch.bool)
        losses, _ = grpo_loss(new, new.detach(), ref[:, None], torch.zeros(5), mask, args)
        found[unbiased] = torch.autograd.grad((losses[:, 0] * logprobs.detach().exp()).sum(), logits)[0]
    torch.testing.assert_close(found[True], exact)
    assert (found[False] - exact).abs().max() > 1e-3


def trl_loss(new, old, ref, advantages, mask, args):
    """The loss as trl's GRPOTrainer writes it (its bound of cispo is the whole one, 1 + eps_high here)."""
    log_ratio = new - old
    coef_1 = torch.exp(log_ratio)
    coef_2 = torch.clamp(coef_1, 1 - args.eps_low, 1 + args.eps_high)
    advantages = advantages.unsqueeze(1)
    if args.loss_type == "cispo":
        per_token_loss = -torch.clamp(coef_1, max=1 + args.eps_high).detach() * advantages * new
    else:
        per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if args.beta:
        per_token_kl = torch.exp(ref - new) - (ref - new) - 1
        if args.kl_unbiased:
            per_token_kl = per_token_kl * coef_1
        per_token_loss = per_token_loss + args.beta * per_token_kl
    mask = mask.float()
    if args.loss_type == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if args.loss_type == "dr_grpo":
        return (per_token_loss * mask).sum() / (per_token_loss.size(0) * args.max_new_tokens)
    return (per_token_loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_those_of_trl(loss_type, beta, unbiased):
    generator = torch.Generator().manual_seed(0)
    new, old, ref = (-3 * torch.rand(6, 9, generator=generator) for _ in range(3))
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 7, 2, 5])[:, None]
    advantages = torch.randn(6, generator=generator)
    args = settings(loss_type, beta=beta, kl_unbiased=unbiased)
    leaf, other = new.clone().requires_grad_(), new.clone().requires_grad_()
    losses, _ = grpo_loss(leaf, old, ref if beta else None, advantages, mask, args)
    divisor = int(mask.sum()) if loss_type in ("dapo", "cispo") else 6
    wanted = trl_loss(other, old, ref, advantages, mask, args)
    torch.testing.assert_close(losses.sum() / divisor, wanted)
    grads = torch.autograd.grad(losses.sum() / divisor, leaf) + torch.autograd.grad(wanted, other)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("gap", [200.0, -200.0, math.inf, -math.inf])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_places_change_nothing(loss_type, gap):
    args = settings(loss_type, beta=0.1)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    old, clean = torch.full((2, 3), -1.0), torch.full((2, 3), -1.2)
    grads, sums = [], []
    for dirty in False, True:
        new = clean.masked_fill(~mask, gap) if dirty else clean.clone()
        new.requires_grad_()
        losses, logged = grpo_loss(new, old, old - 0.1, torch.tensor([1.0, -1.0]), mask, args)
        assert all(torch.isfinite(values[mask]).all() for values in logged.values())
        grads += torch.autograd.grad(losses.sum(), new)
        sums.append(float(losses.detach().sum()))
    assert torch.equal(*grads) and torch.isfinite(grads[0]).all() and sums[0] == sums[1]


# ------------------------------------------------------------------------------------------------------------- updates


class Alone:
    """What Step.updates needs of a run of one process."""

    device, batch_size, tokens = torch.device("cpu"), 2, 0
    args = SimpleNamespace(seed=0)


def rollout(n):
    ids = torch.arange(n)[:, None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return MicroBatch([*range(n - 1), BLANK], inputs, {}, 50, 50)


def test_updates_leave_out_what_has_no_signal_and_count_it_all_the_same():
    signal = torch.tensor([True, False, True, False, False, True, True, False])
    counts = torch.tensor([5, 9, 1, 9, 9, 2, 4, 0])
    step = Step(Alone(), 3, [], 1, 1)
    updates = list(step.updates(rollout(8), counts, epochs=2, parts=2, signal=signal))
    taken = [[int(i) for b in update.batches for i in b.inputs["input_ids"]] for update in updates]
    assert [sorted(a + b) for a, b in (taken[:2], taken[2:])] == [[0, 2, 5, 6]] * 2
    assert taken[:2] != taken[2:]
    for update, places in zip(updates, taken, strict=True):
        assert update.targets == pytest.approx(sum(int(counts[i]) for i in places) * 39 / 12)
        assert all(len(batch.rows) <= 2 for batch in update.batches)
    assert not list(step.updates(rollout(8), counts, signal=torch.zeros(8, dtype=torch.bool)))
    (one,) = step.updates(rollout(8), counts, parts=4, signal=torch.arange(8) == 1)
    assert one.targets == 39 and step.run.tokens == 150


def test_without_signals_every_sample_is_taken():
    step = Step(Alone(), 3, [], 1, 1)
    updates = list(step.updates(rollout(5), torch.ones(5), epochs=1, parts=2))
    taken = [int(i) for update in updates for b in update.batches for i in b.inputs["input_ids"]]
    assert taken == np.random.default_rng([0, 3, 0]).permutation(5).tolist()
    assert [update.targets for update in updates] == [3, 2]


# --------------------------------------------------------------------------------------------------- groups, resampled


def test_groups_without_a_signal_give_way_to_other_prompts():
    """A group has a signal where its prompt is even; then rewards are 1 for the first reply and 0 for the others."""
    asked = []

    def answer(actor, prompts, group, draw):
        asked.append(([number for _, number in prompts], draw))
        replies = [Reply([], f"{i}", None, (5,), number=n, row=row) for row, n in prompts for i in range(group)]
        return replies, {"reward": torch.tensor([float(r.number % 2 == 0 and r.text == "0") for r in replies])}

    batch = MicroBatch([0, 1, 2], {}, {"prompt": torch.tensor([4, 5, 7, -1])}, 0, 0)
    dataset = mock.MagicMock(order=np.arange(20))
    dataset.__len__.return_value = 20
    args = SimpleNamespace(num_generations=2, dynamic_sampling=30, seed=1)
    task = SimpleNamespace(args=args, prompts=dataset, answer=answer)
    replies, rewards = sample_groups(task, None, SimpleNamespace(batches=[batch], number=9))
    numbers = [reply.number for reply in replies[::2]]
    assert numbers[0] == 4 and numbers[3] == -1 and all(n % 2 == 0 for n in numbers[1:3])
    assert rewards["reward"].tolist() == [1, 0, 1, 0, 1, 0, 0, 0]
    assert asked[0] == ([4, 5, 7, -1], (9, 0)) and [draw for _, draw in asked] == [(9, i) for i in range(31)]
    assert len(asked[1][0]) == 2 and not asked[-1][0]


# ---------------------------------------------------------------------------------------------------- runs of a script


def train(folder, *flags, **sizes):
    """train_grpo.py in this process, in a world of its own -> its log."""
    flags = [*write_world(folder, **sizes), "--batch_size=4", "--accumulation_steps=2", "--max_steps=2", *flags]
    args = parse_args([*flags, "--num_generations=4"])
    train_grpo.main(args)
    return read_log(folder, train_grpo)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_do_not_depend_on_how_a_step_is_split(loss_type, tmp_path):
    ends = []
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        for batch in 8, 4, 1:
            folder = tmp_path / str(batch)
            flags = [f"--batch_size={batch}", f"--accumulation_steps={8 // batch}", "--learning_rate=1"]
            train(folder, *flags, f"--loss_type={loss_type}", "--max_steps=1", "--grad_clip=0", "--minibatches=1")
            ends.append(actor_of(folder, "grpo") - start_of(folder))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], atol=1e-6, rtol=1e-3)
    assert ends[0].abs().max() > 1e-4


def test_a_run_is_whole(tmp_path):
    log = train(tmp_path, "--inner_epochs=2", "--eval_interval=1", "--beta=0.1")
    assert [line["step"] for line in log] == [1, 2]
    names = {"reward", "reward_model", "accuracy", "lenient_accuracy", "reply_tokens", "cut", "entropy", "degenerate"}
    names |= {"nonzero_advantages", "loss", "kl", "kl_old", "clip_fraction", "lr", "grad_norm", "val_reward"}
    assert all(names | {"val_accuracy", "val_lenient_accuracy", "val_reply_tokens"} <= line.keys() for line in log)
    assert log[0]["degenerate"] == 0 and log[0]["nonzero_advantages"] == 1 and log[0]["reply_tokens"] <= 6
    model, info = load_model(tmp_path / "grpo_32.pth")
    assert info["stage"] == "grpo" and (tmp_path / "logs" / "grpo_32.png").stat().st_size > 5000
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights, actor_of(tmp_path, "grpo").half().float())


def test_the_reward_rises(tmp_path):
    flags = ["--max_steps=20", "--learning_rate=2e-2", "--top_k=0", "--inner_epochs=2"]
    with rewarded_for_even_ids():
        log = train(tmp_path, *flags, "--eval_interval=6")
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
    assert log[-1]["val_reward"] > 0.8


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_steps_without_a_signal_leave_the_weights_as_they_are(loss_type, tmp_path):
    """No gradient, no KL term, no weight decay, nothing of Adam's momentum: the same bits."""
    flags = ["--rewards=format=1", "--beta=0.5", "--weight_decay=0.5", f"--loss_type={loss_type}"]
    log = train(tmp_path, *flags)
    assert torch.equal(actor_of(tmp_path, "grpo"), start_of(tmp_path))
    assert all(line["degenerate"] == 1 and "loss" not in line for line in log)


def test_twenty_dead_steps_end_the_run_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "DEAD_STEPS", 2)
    with pytest.raises(InputError, match="every reply was cut at --max_new_tokens 6: raise it"):
        train(tmp_path, "--rewards=format=1", "--max_steps=5")


def test_a_resume_with_another_reward_model_is_refused(tmp_path):
    flags = [*write_world(tmp_path), "--batch_size=4", "--accumulation_steps=1", "--num_generations=2"]
    flags += ["--reward_model=reward", "--max_steps=1"]
    train_grpo.main(parse_args(flags))
    state = torch.load(tmp_path / "reward_32.pth", weights_only=True)
    torch.save(state | {"score.weight": state["score.weight"] + 1}, tmp_path / "reward_32.pth")
    with pytest.raises(InputError, match="written with reward model weights"):
        train_grpo.main(parse_args([*flags, "--from_resume=1", "--max_steps=2"]))


# ------------------------------------------------------------------------------------------------------ planted faults


def fault_of(name, monkeypatch):
    """Make train_grpo wrong in one place."""
    scoring, batching, sampler = train_grpo.token_logprobs, train_grpo.as_batch, rl.make_sampler

    def hot(net, batch, args):
        return scoring(net, batch, SimpleNamespace(**{**vars(args), "temperature": 1.3}))

    def unmasked(*args):
        batch = batching(*args)
        batch.inputs["labels"].copy_(batch.inputs["input_ids"])  # prompts are targets too
        return batch

    def with_dropout(policy, *args):
        made = sampler(policy, *args)
        for block in policy.model.layers:
            block.self_attn.dropout = 0.5
        return made

    if name == "temperature":
        monkeypatch.setattr(train_grpo, "token_logprobs", hot)
    elif name == "mask":
        monkeypatch.setattr(train_grpo, "as_batch", unmasked)
    else:
        monkeypatch.setattr(rl, "make_sampler", with_dropout)


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("fault", ["temperature", "mask", "dropout"])
def test_faults_in_scoring_are_caught_before_the_first_update(fault, truncated, tmp_path, monkeypatch):
    fault_of(fault, monkeypatch)
    with pytest.raises(InputError, match="what was sampled is not what is scored: before the first update of step 1"):
        train(tmp_path, f"--top_k={50 * truncated}")
    assert not (tmp_path / "grpo_32.pth").exists()


# --------------------------------------------------------------------------------------------------------------- flags


def test_defaults_of_the_loss_types():
    args = [parse_args([f"--loss_type={name}"]) for name in ("grpo", "dr_grpo", "dapo", "cispo")]
    assert [(a.beta, a.eps_high) for a in args] == [(0.04, 0.2), (0, 0.2), (0, 0.28), (0, 4)]
    assert parse_args(["--beta=0"]).beta == 0 and parse_args(["--dynamic_sampling"]).dynamic_sampling == 3
    assert parse_args([]).dynamic_sampling == 0


@pytest.mark.parametrize("flag", ["--num_generations=1", "--max_new_tokens=512", "--eps_low=2", "--rewards=x=1"])
def test_wrong_flags_are_usage_errors(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args([flag])
    assert ended.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_the_log_is_json(tmp_path):
    train(tmp_path, "--max_steps=1")
    assert json.loads((tmp_path / "logs" / "grpo_32.jsonl").read_text().splitlines()[0])["step"] == 1
