"""Held-out means, shared among the ranks."""

import math
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from dataset.lm_dataset import token_byte_counts
from trainer.runtime.distributed import sum_over_ranks, world_size
from trainer.runtime.steps import MicroBatch, micro_batches, split_rows


def token_loss(model: nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Of a language model: - sum_t log p(x_t | x_<t) over the targets of a micro-batch, in nats."""
    return {"loss": model(**batch.inputs, return_logits=False).token_losses.sum()}


@torch.no_grad()
def evaluate(model: nn.Module, val_set, run, totals: Callable, whole: bool = True, tokenizer=None) -> dict[str, float]:
    """Held-out means of what totals(model, batch) sums up: {"loss": ...} -> {"val_loss": ...}.

    Means over the targets; a total that is a pair (sum, count) is a mean over its own count. With a tokenizer, val_bpb
    too: the sum called ce, else the loss, as nats, in bits per byte of the targets' text. Over the whole held-out set,
    or (so that it costs little during a run) its first --eval_rows rows; every rank gets the result.
    """
    began = time.monotonic()
    model.eval()
    rows = range(len(val_set) if whole else min(len(val_set), run.args.eval_rows))
    size = getattr(val_set, "eval_rows_at_once", run.batch_size)
    mine = [batch for step in split_rows(rows, size * world_size(), size) for batch in step]
    bytes_of = token_byte_counts(tokenizer).to(run.device) if tokenizer else None
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for batch in micro_batches(val_set, run, mine):
        with run.autocast():
            of_batch = totals(model, batch)
        for name, value in of_batch.items():
            total, count = value if isinstance(value, tuple) else (value, batch.targets)
            sums[name] += float(total)
            counts[name] += float(count)
        if tokenizer:
            labels = batch.inputs["labels"]
            counts["bytes"] += int(bytes_of[labels[labels != -100]].sum())
    both = sum_over_ranks([*sums.values(), *counts.values()], run.device)
    sums, counts = dict(zip(sums, both, strict=False)), dict(zip(counts, both[len(sums) :], strict=True))
    model.train()
    run.logs.pause(time.monotonic() - began)  # left out of tokens/s
    means = {f"val_{name}": total / (counts[name] or 1) for name, total in sums.items()}
    if tokenizer:
        means["val_bpb"] = sums.get("ce", sums["loss"]) / math.log(2) / max(counts["bytes"], 1)
    return means
