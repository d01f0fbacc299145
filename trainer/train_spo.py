"""Single-stream policy optimisation (arXiv 2509.13232): one reply a prompt, against what this prompt has got so far.

Each prompt keeps a Beta tracker of its rewards, mapped to [0, 1], in place of a group of rivals or a critic:

    v   = a / (a + b)                      read before any update of the step
    A   = R - v                            whitened over all replies of the step (--whiten token: over their tokens)
    rho = clip(2^(-D / 0.06), 0.875, 0.96) how much of the past counts, the less the further the policy has moved
    a   = rho a + R     b = rho b + 1 - R  once a visit, after the update of the actor

D is the mean over the tokens of |log pi_then - log pi_now| on the reply that the prompt got at its last visit, so the
tracker keeps that reply; at the first visit D is 0. The paper gives no number for D's half-life: 0.06 is its authors'
code. Trackers start at a = b = 1/2, so that the first reward counts; with --spo_first_samples n, s of which are right,
at v = (s + 1/2) / (n + 1) with weight a + b = 1 / (1 - 0.875) = 8.

    loss = mean over tokens of - min(r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A) [+ beta k3_t]
           with r_t and k3_t as in train_grpo.py

A step takes different prompts, drawn with the weight sqrt(v (1 - v)) + 0.05: those that are neither sure nor hopeless.
Trackers and last replies are in the checkpoint. As one reply a prompt is little, a step takes many prompts: here
--accumulation_steps is 8 by default.

    python trainer/train_spo.py
    torchrun --nproc_per_node 2 trainer/train_spo.py --spo_first_samples 4
    deepspeed --num_gpus 2 trainer/train_spo.py --deepspeed

Shapes: N replies of this rank, one a prompt; B of a micro-batch, T tokens of the longest prompt with its reply.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import BLANK, IGNORED, RLAIFDataset
from trainer.rewards import Reply, Term
from trainer.rollout import as_batch, logprobs_of, prompts_of, token_logprobs
from trainer.runtime.distributed import gather, rank, sum_over_ranks, world_size
from trainer.runtime.flags import number
from trainer.runtime.rl import Task, parse_rl, report, rl_parser, unequal
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, run_training

LEAST_KEPT, MOST_KEPT, HALF_LIFE = 0.875, 0.96, 0.06
EXPLORE = 0.05  # weight of a prompt whose outcome is sure


class Trackers:
    """a and b of every prompt, alike on all ranks, and its last reply: ids and the log-probabilities of its tokens."""

    def __init__(self, prompts: RLAIFDataset, run: Run):
        self.prompts, self.run = prompts, run
        self.a, self.b = np.full(len(prompts), 0.5), np.full(len(prompts), 0.5)
        self.ids: list[list[int]] = [[] for _ in range(len(prompts))]
        self.logprobs: list[list[float]] = [[] for _ in range(len(prompts))]

    def values(self) -> np.ndarray:
        """v of every prompt."""
        return self.a / (self.a + self.b)

    def start_from(self, successes: np.ndarray, samples: int) -> None:
        """Believe first samples of every prompt, whose rewards add up to `successes`."""
        v, weight = (successes + 0.5) / (samples + 1), 1 / (1 - LEAST_KEPT)
        self.a, self.b = weight * v, weight * (1 - v)

    def draw(self, count: int) -> list[int]:
        """So many different rows of the dataset, alike on all ranks: those whose outcome is open are drawn sooner."""
        v = self.values()[self.prompts.order]
        weights = np.sqrt(v * (1 - v)) + EXPLORE
        rng = np.random.default_rng([self.run.args.seed, self.run.step])
        return rng.choice(len(v), count, replace=False, p=weights / weights.sum()).tolist()

    def last_replies(self, replies: list[Reply]) -> list[Reply]:
        """What the prompts of these replies got at their last visit: empty ones at the first."""
        seen = [bool(reply.number >= 0 and self.ids[reply.number]) for reply in replies]
        return [
            r._replace(ids=self.ids[r.number], logprobs=self.logprobs[r.number]) if s else Reply([], "")
            for r, s in zip(replies, seen, strict=True)
        ]

    def add(self, replies: list[Reply], rewards: list[float], distances: list[float]) -> None:
        """Count the rewards in [0, 1] of this rank's replies, and those of all others; keep the replies."""
        own = zip(replies, rewards, distances, strict=True)
        own = [(r.number, reward, far, r.ids, r.logprobs) for r, reward, far in own if r.row != BLANK]
        for i, reward, far, ids, logprobs in (visit for of_rank in gather(own) for visit in of_rank):
            rho = min(max(2 ** (-far / HALF_LIFE), LEAST_KEPT), MOST_KEPT)
            self.a[i] = rho * self.a[i] + reward
            self.b[i] = rho * self.b[i] + 1 - reward
            self.ids[i], self.logprobs[i] = list(ids), list(logprobs)

    def state_dict(self) -> dict:
        """As a checkpoint holds it: the replies one behind another."""
        state = {"a": torch.from_numpy(self.a), "b": torch.from_numpy(self.b)}
        state["lengths"] = torch.tensor([len(ids) for ids in self.ids])
        state["ids"] = torch.tensor([i for ids in self.ids for i in ids], dtype=torch.int32)
        state["logprobs"] = torch.tensor([x for of_reply in self.logprobs for x in of_reply], dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict) -> None:
        self.a, self.b = state["a"].numpy().copy(), state["b"].numpy().copy()
        lengths = state["lengths"].tolist()
        self.ids = [part.tolist() for part in state["ids"].split(lengths)]
        self.logprobs = [part.tolist() for part in state["logprobs"].split(lengths)]


def unit_rewards(rewards: Tensor, terms: list[Term]) -> Tensor:
    """Rewards in [0, 1]: 0 without any gain, 1 with all of them; penalties pull down as far as 0."""
    ranges = [(term.weight * low, term.weight * high) for term in terms for low, high in (term.range,)]
    gains = [pair for pair in ranges if max(pair) > 0] or ranges
    low, high = sum(map(min, gains)), sum(map(max, gains))
    return ((rewards - low) / (high - low or 1)).clamp(0, 1)


def whiten(advantages: Tensor, weights: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over all ranks, each reply with its weight: (N,), (N,) -> (N,), 0 where the weight is."""
    A, w = advantages.double(), weights.double()
    total, squares, weight, n = sum_over_ranks(
        [float((w * A).sum()), float((w * A**2).sum()), float(w.sum()), float((w > 0).sum())], advantages.device
    )
    mean = total / max(weight, 1)
    variance = max(squares / max(weight, 1) - mean**2, 0.0) * n / max(n - 1, 1)
    return ((advantages - mean) / (variance**0.5 + 1e-4)) * (weights > 0)


def spo_loss(
    new: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, mask: Tensor, args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities (B, T), advantages (B,), mask (B, T) -> loss of each token, and what is logged, (B, T) each."""
    log_ratio = (new - old).masked_fill(~mask, 0.0)  # before exp: elsewhere there is anything
    ratio, A = log_ratio.exp(), advantages[:, None]
    losses = -torch.minimum(ratio * A, ratio.clamp(1 - args.eps_low, 1 + args.eps_high) * A) * mask
    clipped = ((ratio > 1 + args.eps_high) & (A > 0)) | ((ratio < 1 - args.eps_low) & (A < 0))
    logged = {"kl_old": (ratio - 1 - log_ratio).detach(), "clip_fraction": clipped.float()}
    if ref is not None:
        apart = (ref - new).masked_fill(~mask, 0.0)
        logged["kl"] = (apart.exp() - apart - 1).detach()
        losses = losses + args.beta * (apart.exp() - apart - 1)
    return losses, logged


def distances(replies: list[Reply], actor, prompts: RLAIFDataset, run: Run) -> Tensor:
    """D of each earlier reply, (N,): how far the policy has moved on it since it was sampled."""
    then = as_batch(replies, prompts, run.device)
    now = logprobs_of(actor, then, run)
    mask = then.inputs["labels"] != IGNORED
    return ((now - then.extra["old"]).abs() * mask).sum(1) / mask.sum(1).clamp(min=1)


def sample_first(trackers: Trackers, task: Task, actor, samples: int) -> None:
    """So many replies to every prompt, shared among the ranks, from which the trackers start."""
    mine = range(rank(), len(task.prompts), world_size())
    _, rewards = task.answer(actor, [(0, prompt) for prompt in mine], samples, draw=(0,))
    earned = unit_rewards(rewards["reward"], task.terms).view(-1, samples).sum(1).tolist()
    successes = np.zeros(len(task.prompts))
    for of_rank in gather(list(zip(mine, earned, strict=True))):
        for prompt, total in of_rank:
            successes[prompt] = total
    trackers.start_from(successes, samples)


# ------------------------------------------------------------------------------------------------------------ training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = rl_parser(__doc__, generations=1)
    parser.set_defaults(accumulation_steps=8)
    group = parser.add_argument_group("policy optimisation")
    group.add_argument("--eps_low", type=number(float, 0, 1), default=0.2, help="clip below 1 - eps (default: 0.2)")
    group.add_argument("--eps_high", type=number(float, 0), default=0.28, help="clip above 1 + eps (default: 0.28)")
    group.add_argument("--beta", type=number(float, 0), default=0.0, help="weight of a KL term, k3 (default: 0)")
    group.add_argument("--whiten", choices=["sequence", "token"], default="sequence", help="advantages, over what")
    group.add_argument("--spo_first_samples", type=number(int, 0), default=0, help="replies at the start (default: 0)")
    return parse_rl(parser, argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "spo")

    # 2. The policy
    policy = build_model(run)

    # 3. Prompts with their trackers, what replies are rewarded for, the engine that samples; with --beta the reference
    task = Task(policy, run)
    trackers = Trackers(task.prompts, run)

    # 4. The loop: a step samples a reply to each of its prompts, and learns from them in several updates
    actor = make_engine(policy, run)
    if args.spo_first_samples and not run.checkpoint:
        sample_first(trackers, task, actor, args.spo_first_samples)
    totals, extra = task.totals(actor), {"trackers": trackers, "watch": task.watch}
    data = task.prompts, task.val_set
    with run.training({"actor": actor}, *data, totals, extra=extra, draw=trackers.draw) as steps:
        for step in steps:
            # a. The policy answers; each reply is compared with what its prompt has got so far
            replies, rewards = task.answer(actor, prompts_of(step.batches), draw=(step.number,))
            earned = unit_rewards(rewards["reward"], task.terms)
            v = torch.tensor([trackers.values()[reply.number] for reply in replies], dtype=torch.float32)
            lengths = torch.tensor([float(len(reply.ids)) for reply in replies])  # 0 of those that only fill up
            advantages = whiten(earned - v, lengths if args.whiten == "token" else (lengths > 0).float())
            report(step, task.watch, replies, rewards, advantages, unequal(earned, replies))
            step.note_samples(tracked=v[lengths > 0], unit_reward=earned[lengths > 0])

            # b. As a batch, with the log-probabilities that the tokens were drawn with, and those of the reference
            rollout = as_batch(replies, task.prompts, run.device)
            rollout.extra["advantages"] = advantages.to(run.device)
            if task.reference:
                rollout.extra["reference"] = task.reference_logprobs(rollout)

            # c. Updates from shuffled parts of the rollout
            updates = step.updates(rollout, lengths, args.inner_epochs, args.minibatches)
            for count, update in enumerate(updates):
                for batch in update.micro_batches(actor):
                    new, mask, output = token_logprobs(actor, batch, args)
                    old, ref = batch.extra["old"], batch.extra.get("reference")
                    if count == 0:
                        task.watch.first_minibatch((new.detach() - old)[mask])
                    losses, logged = spo_loss(new, old, ref, batch.extra["advantages"], mask, args)
                    update.note(batch, output, losses, **{name: (x * mask).sum() for name, x in logged.items()})
                    actor.backward(losses.sum() / update.targets + update.balance(output, batch))
                actor.update(args.grad_clip)

            # d. The trackers take in what was earned, and forget the more the further the policy has moved
            moved = distances(trackers.last_replies(replies), actor, task.prompts, run)
            step.note_samples(moved=moved[(lengths > 0).to(run.device)])
            trackers.add(replies, earned.tolist(), moved.tolist())
            task.finish(step)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 6 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
