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

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import BLANK, IGNORED, RLAIFDataset
from model.generation import Engine, Request
from model.loss import target_places
from model.outputs import MiniMindOutput
from model.sampling import Truncation
from trainer.rewards import Reply
from trainer.runtime.run import Run
from trainer.runtime.steps import MicroBatch

GREEDY = {"temperature": 0.0}
MOST_AT_ONCE = {"cuda": 256}  # sequences that the engine decodes together; elsewhere 64


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
    context, policy = run.args.max_seq_len, without_dropout(policy)
    return Engine(policy, tokenizer, max_batch=at_once(run), context=context, prefill_chunk=2048, dtype=run.dtype)


def at_once(run: Run) -> int:
    """Replies that are decoded together."""
    return MOST_AT_ONCE.get(run.device.type, 64)


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


def logprobs_of(net: Callable, rollout: MicroBatch, run: Run) -> Tensor:
    """log pi of the replies under a model or the engine around it, (N, T), without a gradient."""
    return in_parts(lambda part: token_logprobs(net, part, run.args)[0], rollout, run)
