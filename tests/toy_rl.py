"""A script shaped as the reinforcement-learning stages are, to try the loop on: two models with an optimizer each, the
inference engine between steps, several updates from a rollout, prompts drawn by resumable state. A toy, not a stage.

The reward is the share of even tokens in a reply; the tracker of a prompt is the mean reward that it had so far.
"""

import argparse
import math

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import BLANK
from model.generation import Engine as Sampler
from model.generation import Request
from model.heads import MiniMindForScoring
from trainer.runtime.distributed import gather
from trainer.runtime.flags import COUNT, common_parser, number
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, run_training
from trainer.runtime.steps import MicroBatch

CONTROL = {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
VOCABULARY = [*CONTROL.values(), *map(str, range(3, 32))]
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)})), **CONTROL
)
REPLY = 6  # tokens
ROOM = 12  # of a prompt and its reply


class Prompts(torch.utils.data.Dataset):
    """Prompts of unequal length, left-padded; rows have no labels."""

    data_hash, data_path = "toy", "toy.jsonl"

    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.ids = [rng.integers(3, len(VOCABULARY), 2 + i % 4).tolist() for i in range(count)]
        self.set_epoch(0)

    def set_epoch(self, epoch):
        self.order = np.random.default_rng([7, epoch]).permutation(len(self.ids))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[self.order[index]] if index != BLANK else []
        row = torch.zeros(2, ROOM - REPLY, dtype=torch.int64)
        if ids:
            row[0, -len(ids) :], row[1, -len(ids) :] = torch.tensor(ids), 1
        return {"input_ids": row[0], "attention_mask": row[1], "prompt": torch.tensor(self.order[index] if ids else -1)}

    def count_targets(self, batch):
        return int((batch["prompt"] >= 0).sum())

    def describe(self, index):
        return f"toy.jsonl:{self.order[index] + 1}"

    def summary(self):
        return f"{len(self)} prompts"

    def tokens_per_row(self):
        return 4


class Trackers:
    """Reward and visits of every prompt, alike on all ranks; those with the lowest mean are drawn first."""

    def __init__(self, prompts):
        self.prompts, self.reward, self.visits = prompts, torch.zeros(len(prompts)), torch.zeros(len(prompts))

    def draw(self, count):
        means = (self.reward / self.visits.clamp(min=1)).numpy()[self.prompts.order]
        return np.argsort(means, kind="stable")[:count].tolist()

    def add(self, numbers, rewards):
        for of_rank in gather(list(zip(numbers.tolist(), rewards.tolist(), strict=True))):
            for prompt, reward in of_rank:
                if prompt >= 0:
                    self.reward[prompt] += reward
                    self.visits[prompt] += 1

    def state_dict(self):
        return {"reward": self.reward.clone(), "visits": self.visits.clone()}

    def load_state_dict(self, state):
        self.reward, self.visits = state["reward"].clone(), state["visits"].clone()


def roll_out(sampler, step, group):
    """A reply to each of the rank's prompts, `group` times, with the log-probabilities it was sampled with."""
    rows, numbers, kept = [], [], []
    for batch in step.batches:
        real = iter(batch.rows)
        for ids, mask, prompt in zip(*batch.inputs.values(), batch.extra["prompt"], strict=True):
            row = next(real) if prompt >= 0 else BLANK
            rows += [row] * group
            numbers += [int(prompt)] * group
            kept.append(ids[mask > 0].tolist() or [1])
    requests = [
        Request(prompt, max_new_tokens=REPLY, stop_ids=[], n=group, seed=1000 * step.number + max(n, 0))
        for prompt, n in zip(kept, numbers[::group], strict=True)
    ]
    results = sampler.generate(requests)
    prompts = [prompt for prompt in kept for _ in range(group)]
    size = len(rows), ROOM
    ids, labels, mask = torch.zeros(size).long(), torch.full(size, -100), torch.zeros(size).long()
    old = torch.zeros(size)
    for i, (prompt, result, row) in enumerate(zip(prompts, results, rows, strict=True)):
        begin, end = len(prompt), len(prompt) + len(result.ids)
        ids[i, :end], mask[i, :end] = torch.tensor(prompt + result.ids), 1
        if row != BLANK:
            labels[i, begin:end], old[i, begin:end] = ids[i, begin:end], torch.tensor(result.logprobs)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    tokens = int((labels >= 0).sum())
    return MicroBatch(rows, inputs, {"old": old, "prompt": torch.tensor(numbers)}, tokens, tokens)


def held_out(sampler, actor, model, batch):
    """The mean reward of held-out prompts, greedily."""
    prompts = [ids[mask > 0].tolist() for ids, mask in zip(*batch.inputs.values(), strict=True) if mask.any()]
    greedy = {"max_new_tokens": REPLY, "stop_ids": [], "temperature": 0}
    with actor.gathered():
        sampler.refresh()
        results = sampler.generate([Request(prompt, **greedy) for prompt in prompts])
    return {"reward": torch.tensor(sum(reward_of(torch.tensor(result.ids)).item() for result in results))}


def reward_of(ids):
    return (ids % 2 == 0).float().mean(-1)


def parse_args(argv=None):
    parser = common_parser(__doc__, data="toy", from_weight="none", epochs=1, lr={"adamw": 1e-2})
    parser.add_argument("--critic_learning_rate", type=number(float, 0), default=3e-3)
    parser.add_argument("--group", type=COUNT, default=2)
    parser.add_argument("--ppo_epochs", type=COUNT, default=2)
    parser.add_argument("--parts", type=COUNT, default=2)
    parser.add_argument("--target_kl", type=float, default=math.inf)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    run = Run(args, "toy")
    run.tokenizer = TOKENIZER
    policy = build_model(run)
    torch.manual_seed(1)
    critic_model = MiniMindForScoring(policy.config)
    sampler = Sampler(policy)
    prompts, val_set = Prompts(13), Prompts(3)
    run.plan(policy, prompts)
    actor = make_engine(policy, run)
    critic = make_engine(critic_model, run, args.critic_learning_rate)
    trackers = Trackers(prompts)
    totals = lambda model, batch: held_out(sampler, actor, model, batch)  # noqa: E731
    engines = {"actor": actor, "critic": critic}
    with run.training(engines, prompts, val_set, totals, extra={"trackers": trackers}, draw=trackers.draw) as steps:
        for step in steps:
            with actor.gathered():
                sampler.refresh()
                rollout = roll_out(sampler, step, args.group)
            mask = rollout.inputs["labels"] >= 0  # (N, T)
            rewards = reward_of(rollout.inputs["input_ids"].masked_fill(~mask, 1)) * ROOM / REPLY  # (N,)
            trackers.add(rollout.extra["prompt"], rewards)
            rollout.extra["returns"] = rewards
            step.note_samples(reward=rewards[mask.any(1)], length=mask.sum(1)[mask.any(1)])
            for number, update in enumerate(step.updates(rollout, mask.sum(1), args.ppo_epochs, args.parts)):
                for batch in update.micro_batches(actor, critic):
                    kept = batch.inputs["labels"] >= 0
                    output = actor(**batch.inputs, return_logits=False, equal_weights=False)
                    ids_and_mask = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
                    values = critic(**ids_and_mask).scores  # (B, T)
                    ratio_log = (-output.token_losses - batch.extra["old"]) * kept
                    if number == 0:
                        assert ratio_log.abs().max() < 1e-3, "what was sampled is not what is scored"
                    returns = batch.extra["returns"][:, None]
                    advantages = (returns - values.detach()) * kept
                    ratio = ratio_log.exp()
                    policy_losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)) * kept
                    value_losses = (values - returns).square() * kept
                    kl = (ratio - 1 - ratio_log).detach() * kept
                    update.note(batch, output, policy_losses, value_loss=value_losses.sum(), kl=kl.sum())
                    actor.backward(policy_losses.sum() / update.targets + update.balance(output, batch))
                    critic.backward(value_losses.sum() / update.targets)
                actor.update(args.grad_clip)
                critic.update(args.grad_clip)
                if update.mean("kl") > args.target_kl:
                    break
            step.note_samples(updates=torch.tensor([number + 1.0]))
    print(f"wrote {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
