"""What the reinforcement-learning stages share beside the loop: flags, opening, held-out prompts, what is told."""

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataset.lm_dataset import BLANK, RLAIFDataset
from trainer.rewards import Reply, Term, accuracies, add_reward_flags, open_rewards, repetition_term, score
from trainer.rollout import at_once, logprobs_of, make_sampler, roll_out
from trainer.runtime.devices import synchronize
from trainer.runtime.engine import Engine
from trainer.runtime.flags import COUNT, SWITCH, common_parser, number
from trainer.runtime.memory import sampling_bytes
from trainer.runtime.reference import open_reference, weights_hash
from trainer.runtime.run import Run
from trainer.runtime.start import open_data, weights_file_hash
from trainer.runtime.steps import MicroBatch, Step
from trainer.runtime.watch import Watch

START = "full_sft, or reason with --reasoning 1"


def rl_parser(doc: str, generations: int, least: int = 1, inner_epochs: int = 1) -> argparse.ArgumentParser:
    """The flags of all RL stages: the common ones, rewards, sampling, updates of a rollout; defaults of some.

    generations 1: no choice of how many replies; least: what --num_generations must be.
    """
    parser = common_parser(doc, "rlaif-mini.jsonl", START, 1, lr={"adamw": 1e-4, "muon": 3e-4})
    add_reward_flags(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=COUNT, default=128, help="tokens of a reply at most (default: 128)")
    parser.set_defaults(num_generations=generations)
    if generations > 1:
        told = f"replies to a prompt (default: {generations})"
        group.add_argument("--num_generations", type=number(int, least), default=generations, help=told)
    group.add_argument(
        "--temperature", type=number(float, 0.01, 100), default=1.0, help="of sampling and scoring (default: 1)"
    )
    group.add_argument("--top_p", type=number(float, 0.01, 1), default=1.0, help="nucleus sampling (default: 1, off)")
    group.add_argument("--top_k", type=number(int, 0), default=0, help="sample from so many tokens (default: 0, off)")
    group.add_argument(
        "--min_p", type=number(float, 0, 1), default=0.0, help="least share of the likeliest token (default: 0, off)"
    )
    group.add_argument(
        "--reasoning", **SWITCH, default=False,
        help="1: replies are <think> ... </think> <answer> ... </answer>, rewarded for that form too (default: 0)",
    )  # fmt: skip
    group = parser.add_argument_group("updates")
    told = f"passes over a rollout (default: {inner_epochs})"
    group.add_argument("--inner_epochs", type=COUNT, default=inner_epochs, help=told)
    group.add_argument("--minibatches", type=COUNT, default=2, help="updates of a pass (default: 2)")
    return parser


def parse_rl(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked together, with the weights to start from where none are named."""
    args = parser.parse_args(argv)
    if args.max_new_tokens >= args.max_seq_len:
        parser.error(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in {args.max_seq_len} tokens")
    if args.from_weight == START:
        args.from_weight = "reason" if args.reasoning else "full_sft"
    return args


class Task:
    """What an RL stage sets its policy to: prompts, held-out ones, the terms of the reward, the engine that samples.

    reference: the policy as the run began, frozen, where anything is weighed against it (--beta), else None.
    """

    def __init__(self, policy: nn.Module, run: Run, critic: nn.Module | None = None):
        self.args = args = run.args
        self.reference = None
        if args.beta:
            self.reference = copy.deepcopy(open_reference(args, policy, run)).eval().requires_grad_(False)
        kind = partial(RLAIFDataset, reply=args.max_new_tokens)
        self.prompts, self.val_set = open_data(kind, "rlaif-mini.jsonl", "rlaif.jsonl", run)
        self.terms = open_rewards(args, run, self.prompts, run.tokenizer)
        held_out = min(len(self.val_set), self.val_set.eval_rows_at_once) if self.val_set else 0
        replies = min(at_once(run), max(run.batch_size * args.accumulation_steps * args.num_generations, held_out))
        itemsize = 4 if run.device.type == "cpu" else run.dtype.itemsize
        beside = sampling_bytes(policy, replies, args.max_seq_len, itemsize)
        run.plan(policy, self.prompts, beside=beside, critic=critic)
        run.settings = settings(args, self.terms, self.reference)
        self.policy, self.run = policy, run
        self.sampler, self.watch = make_sampler(policy, run.tokenizer, run), Watch(run)
        self.seconds: Counter[str] = Counter()  # of the step in hand

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the seconds of a part of the step."""
        synchronize(self.run.device)
        began = time.perf_counter()
        self.seconds.setdefault("began", began)
        yield
        synchronize(self.run.device)
        self.seconds[part] += time.perf_counter() - began

    def answer(
        self, actor: Engine, asked: list[tuple[int, int]], group: int = 1, draw: tuple[int, ...] | None = None
    ) -> tuple[list[Reply], dict[str, Tensor]]:
        """`group` replies of the policy as it is now to each prompt, and what they are rewarded with, {term: (N,)}."""
        with actor.gathered():
            with self.timed("sampling"):
                self.sampler.refresh()
                replies = roll_out(self.sampler, asked, self.prompts, self.args, group, draw)
            with self.timed("reward"):
                return replies, score(self.terms, replies)

    def reference_logprobs(self, rollout: MicroBatch) -> Tensor:
        """log pi of the replies under the reference, (N, T)."""
        with self.timed("scoring"):
            return logprobs_of(self.reference, rollout, self.run)

    def finish(self, step: Step) -> None:
        """The end of a step: what its parts took, for the log; whether the replicas are still alike."""
        synchronize(self.run.device)
        whole = time.perf_counter() - self.seconds.pop("began")
        seconds = {f"{part}_s": torch.tensor([value]) for part, value in self.seconds.items()}
        step.note_samples(**seconds, step_s=torch.tensor([whole]))
        self.seconds.clear()
        self.watch.replicas(self.policy)

    def totals(self, actor: Engine) -> Callable[[nn.Module, MicroBatch], dict]:
        """What is told of held-out prompts, see evaluate()."""
        return partial(self.held_out, actor)

    def held_out(self, actor: Engine, model: nn.Module, batch: MicroBatch) -> dict:
        """The likeliest reply to each held-out prompt: reward, accuracies and length, summed."""
        asked = [(0, number) for number in batch.extra["prompt"].tolist() if number >= 0]
        with actor.gathered():
            self.sampler.refresh()
            replies = roll_out(self.sampler, asked, self.val_set, self.args, draw=None)
        right = accuracies(replies, self.args.reasoning)
        right = {name: (values.sum(), len(values)) for name, values in right.items()}
        lengths = sum(len(reply.ids) for reply in replies)
        return {"reward": score(self.terms, replies)["reward"].sum(), "reply_tokens": lengths, **right}


def settings(args: argparse.Namespace, terms: list[Term], reference: nn.Module | None) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on with: flags that RL alone has, and weights."""
    common = vars(common_parser("", "", "", 1, lr={"adamw": 0.0}).parse_args([]))
    own = {name: value for name, value in vars(args).items() if name not in common}
    paths = ("rewards", "reward_model", "critic_weight", "trust_remote_code")  # the weights count, not where they are
    found = {f"--{name}": value for name, value in own.items() if name not in paths}
    found["--rewards"] = ",".join(f"{term.name}={term.weight:g}" for term in terms)
    for name, _, judge in terms:
        if name == "reward_model":
            found["reward model weights"] = weights_file_hash(judge.path)
    return found | ({"reference weights": weights_hash(reference)} if reference else {})


def unequal(rewards: Tensor, replies: list[Reply]) -> Tensor:
    """Whether the reward of each reply of this rank is above or below their mean, (N,): else it says nothing."""
    real = torch.tensor([reply.row != BLANK for reply in replies], dtype=torch.bool)
    mean = rewards[real].mean() if real.any() else 0.0
    return ((rewards - mean).abs() > 1e-6) & real


def report(
    step: Step, watch: Watch, replies: list[Reply], rewards: dict[str, Tensor], advantages: Tensor, signal: Tensor
) -> None:
    """Note what the replies of this rank came to, (N,) each, for the log and for the checks; show one of them."""
    args = step.run.args
    real = torch.tensor([reply.row != BLANK for reply in replies], dtype=torch.bool)
    there = [reply for reply in replies if reply.row != BLANK]
    values = {name: value[real] for name, value in rewards.items()}
    values |= accuracies(there, args.reasoning)
    values["reply_tokens"] = torch.tensor([float(len(reply.ids)) for reply in there])
    values["cut"] = torch.tensor([float(reply.cut) for reply in there])
    values["entropy"] = torch.tensor([-sum(reply.logprobs) / len(reply.ids) for reply in there])
    values["repetition"] = torch.tensor([repetition_term(reply) for reply in there])
    step.note_samples(**values, degenerate=~signal[real], nonzero_advantages=advantages[real] != 0)
    watch.rollout(values, signal[real])
    if there and step.run.is_main and step.number % args.log_interval == 0:
        told = "  ".join(f"{name} {float(value[real][0]):.2f}" for name, value in rewards.items())
        print(f"  {there[0].turns[-1]['content']!r:.100} -> {there[0].text!r:.200}  {told}", flush=True)
