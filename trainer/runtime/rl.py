"""What the reinforcement-learning stages share beside the loop: flags, opening, held-out prompts, what is told."""

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import BLANK, RLAIFDataset
from model.generation import Engine
from trainer.rewards import Reply, Term, accuracies, add_reward_flags, open_rewards, repetition_term, score
from trainer.rollout import roll_out
from trainer.runtime.flags import COUNT, SWITCH, common_parser, number
from trainer.runtime.reference import weights_hash
from trainer.runtime.run import Run
from trainer.runtime.start import open_data
from trainer.runtime.steps import MicroBatch, Step
from trainer.runtime.watch import Watch

START = "full_sft, or reason with --reasoning 1"


def rl_parser(doc: str, generations: int, least: int = 1) -> argparse.ArgumentParser:
    """The flags of all RL stages: the common ones, rewards, sampling. generations 1: no choice of how many replies."""
    parser = common_parser(doc, data="rlaif-mini.jsonl", from_weight=START, epochs=1, lr={"adamw": 1e-4, "muon": 3e-4})
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
    return parser


def parse_rl(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked together, with the weights to start from where none are named."""
    args = parser.parse_args(argv)
    if args.max_new_tokens >= args.max_seq_len:
        parser.error(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in {args.max_seq_len} tokens")
    if args.from_weight == START:
        args.from_weight = "reason" if args.reasoning else "full_sft"
    return args


def open_prompts(
    args: argparse.Namespace, run: Run, tokenizer: PreTrainedTokenizerBase
) -> tuple[RLAIFDataset, RLAIFDataset | None, list[Term]]:
    """Prompts to train on, held-out ones, and the terms that replies to them are rewarded with."""
    kind = partial(RLAIFDataset, reply=args.max_new_tokens)
    prompts, val_set = open_data(kind, "rlaif-mini.jsonl", "rlaif.jsonl", tokenizer, run)
    return prompts, val_set, open_rewards(args, run, prompts, tokenizer)


def settings(args: argparse.Namespace, terms: list[Term], reference: nn.Module | None, *names: str) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on with: these flags, and those of all RL stages."""
    names += ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "reasoning", "num_generations")
    found = {f"--{name}": getattr(args, name) for name in names}
    found["--rewards"] = ",".join(f"{term.name}={term.weight:g}" for term in terms)
    return found | ({"reference weights": weights_hash(reference)} if reference else {})


def held_out(model, batch: MicroBatch, sampler: Engine, actor, prompts: RLAIFDataset, terms: list[Term], args) -> dict:
    """The likeliest reply to each held-out prompt: reward, accuracies and length, summed."""
    asked = [(0, number) for number in batch.extra["prompt"].tolist() if number >= 0]
    with actor.gathered():
        sampler.refresh()
        replies = roll_out(sampler, asked, prompts, args, draw=None)
    right = {name: (values.sum(), len(values)) for name, values in accuracies(replies, args.reasoning).items()}
    lengths = sum(len(reply.ids) for reply in replies)
    return {"reward": score(terms, replies)["reward"].sum(), "reply_tokens": lengths, **right}


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
