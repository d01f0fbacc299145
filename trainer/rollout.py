"""Prompts -> sampled replies, with the log-probabilities they were sampled with; and the same of any policy, to train.

Sampling is the inference engine's (model/generation.py), whose weights follow the policy's; training takes the ids that
were sampled, never text that is tokenised again. A reply's end token is a part of it; one that was cut has none.

The distribution is softmax(logits / temperature) over what top-k, top-p and min-p leave. old, the log-probability that
a token was drawn with, and new, what token_logprobs says of it, are both of that distribution, so that the ratio
exp(new - old) is 1 before the first update. A token that the policy would no longer keep counts as kept.

Shapes: N samples of this rank, G to a prompt, one behind another; T tokens of the longest prompt with its reply.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import BLANK, IGNORED, RLAIFDataset
from model.generation import Engine, Request
from model.loss import target_places
from model.outputs import MiniMindOutput
from model.sampling import Truncation
from trainer.rewards import Reply, Term, accuracies, add_reward_flags, open_rewards, repetition_term, score
from trainer.runtime.flags import COUNT, SWITCH, common_parser, number
from trainer.runtime.reference import weights_hash
from trainer.runtime.run import Run
from trainer.runtime.start import open_data
from trainer.runtime.steps import MicroBatch, Step
from trainer.runtime.watch import Watch

START = "full_sft, or reason with --reasoning 1"
GREEDY = {"temperature": 0.0}
MOST_AT_ONCE = {"cuda": 256}  # sequences that the engine decodes together; elsewhere 64


def rl_parser(doc: str, generations: int, least: int = 1) -> argparse.ArgumentParser:
    """The flags of all RL stages: the common ones, sampling, rewards, how often a rollout is used."""
    parser = common_parser(doc, data="rlaif-mini.jsonl", from_weight=START, epochs=1, lr={"adamw": 1e-4, "muon": 3e-4})
    add_reward_flags(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--max_new_tokens", type=COUNT, default=128, help="tokens of a reply at most (default: 128)")
    group.add_argument(
        "--num_generations", type=number(int, least), default=generations,
        help=f"replies to a prompt (default: {generations})",
    )  # fmt: skip
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


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with its dropout off for good: the engine knows none, so scoring may have none either."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def make_sampler(policy: nn.Module, tokenizer: PreTrainedTokenizerBase, run: Run) -> Engine:
    """The engine that samples from the policy."""
    at_once, context = MOST_AT_ONCE.get(run.device.type, 64), run.args.max_seq_len
    policy = without_dropout(policy)
    return Engine(policy, tokenizer, max_batch=at_once, context=context, prefill_chunk=2048, dtype=run.dtype)


def settings(args: argparse.Namespace, terms: list[Term], reference: nn.Module | None, *names: str) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on with: these flags, and those of all RL stages."""
    names += ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "reasoning", "num_generations")
    found = {f"--{name}": getattr(args, name) for name in names}
    found["--rewards"] = ",".join(f"{term.name}={term.weight:g}" for term in terms)
    return found | ({"reference weights": weights_hash(reference)} if reference else {})


def prompts_of(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    """(row, number) of every prompt that this rank has in a step."""
    prompts = []
    for batch in batches:
        rows = iter(batch.rows)  # blank ones are not among them
        prompts += [(next(rows) if n >= 0 else BLANK, n) for n in batch.extra["prompt"].tolist()]
    return prompts


def roll_out(
    sampler: Engine,
    prompts: list[tuple[int, int]],
    dataset: RLAIFDataset,
    args: argparse.Namespace,
    group: int = 1,
    draw: tuple[int, ...] | None = (),
) -> list[Reply]:
    """`group` sampled replies to each prompt. draw: whose random numbers, with --seed; None: the likeliest reply."""
    how = (
        {key: getattr(args, key) for key in ("temperature", "top_p", "top_k", "min_p")} if draw is not None else GREEDY
    )
    requests = []
    for _, prompt in prompts:
        if prompt >= 0:
            seed = np.random.SeedSequence([args.seed, prompt, *(draw or ())]).generate_state(1, np.uint64)
            requests.append(Request(dataset.ids[prompt], args.max_new_tokens, seed=int(seed[0]), n=group, **how))
    results = iter(sampler.generate(requests))
    replies = []
    for row, prompt in prompts:
        for _ in range(group):
            if prompt < 0:
                replies.append(Reply([], ""))
                continue
            result = next(results)
            replies.append(
                Reply(
                    dataset.turns[prompt], result.text.strip(), dataset.answers[prompt], result.ids,
                    result.finish_reason == "length", result.logprobs, prompt, row,
                )
            )  # fmt: skip
    return replies


def as_batch(replies: list[Reply], dataset: RLAIFDataset, device: torch.device) -> MicroBatch:
    """Prompts with their replies as right-padded rows: input_ids, attention_mask, labels on the replies, old (N, T)."""
    prompts = [dataset.ids[reply.number] if reply.number >= 0 else [] for reply in replies]
    T = max(1, *(len(prompt) + len(reply.ids) for prompt, reply in zip(prompts, replies, strict=True)))
    input_ids = torch.full((len(replies), T), dataset.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels, old = torch.full_like(input_ids, IGNORED), torch.zeros(len(replies), T)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        begin, end = len(prompt), len(prompt) + len(reply.ids)
        input_ids[i, :end] = torch.tensor([*prompt, *reply.ids], dtype=torch.int64)
        attention_mask[i, :end] = 1
        labels[i, begin:end] = input_ids[i, begin:end]
        old[i, begin:end] = torch.tensor(reply.logprobs)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs = {name: x.to(device) for name, x in inputs.items()}
    tokens = sum(len(reply.ids) for reply in replies)
    return MicroBatch([reply.row for reply in replies], inputs, {"old": old.to(device)}, tokens, tokens)


def token_logprobs(net: Callable, batch: MicroBatch, args: argparse.Namespace) -> tuple[Tensor, Tensor, MiniMindOutput]:
    """log pi of every token of the replies under a model or the engine around it -> (B, T), where they are (B, T).

    0 elsewhere. The head is computed at those tokens alone and a chunk of them at a time (model/loss.py).
    """
    labels, attention_mask = batch.inputs["labels"], batch.inputs["attention_mask"]
    truncation = Truncation(args.top_k, args.top_p, args.min_p)
    output = net(
        **batch.inputs,
        return_logits=False,
        equal_weights=False,
        temperature=args.temperature,
        truncation=None if truncation == Truncation() else truncation,
        target_places=target_places(labels, attention_mask),
    )
    return -output.token_losses, labels != IGNORED, output


@torch.no_grad()
def in_parts(compute: Callable[[MicroBatch], Tensor], rollout: MicroBatch, run: Run) -> Tensor:
    """compute(some of the rollout) -> (B, t), of all of it: (N, T); a micro-batch of similar lengths at a time."""
    values = torch.zeros_like(rollout.extra["old"])
    order = rollout.inputs["attention_mask"].sum(1).argsort().cpu().numpy()
    for begin in range(0, len(order), run.batch_size):
        places = order[begin : begin + run.batch_size]
        with run.autocast():
            found = compute(rollout.take(places, 0))
        values[torch.from_numpy(places).to(values.device), : found.shape[1]] = found.float()
    return values


def reference_logprobs(reference: nn.Module, rollout: MicroBatch, run: Run) -> Tensor:
    """log pi of the replies under a frozen model, (N, T)."""
    return in_parts(lambda part: token_logprobs(reference, part, run.args)[0], rollout, run)


def held_out(model, batch: MicroBatch, sampler: Engine, actor, prompts: RLAIFDataset, terms: list[Term], args) -> dict:
    """The likeliest reply to each held-out prompt: reward, accuracies and length, summed."""
    asked = [(0, number) for number in batch.extra["prompt"].tolist() if number >= 0]
    with actor.gathered():
        sampler.refresh()
        replies = roll_out(sampler, asked, prompts, args, draw=None)
    right = {name: (values.sum(), len(values)) for name, values in accuracies(replies, args.reasoning).items()}
    lengths = sum(len(reply.ids) for reply in replies)
    return {"reward": score(terms, replies)["reward"].sum(), "reply_tokens": lengths, **right}


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
