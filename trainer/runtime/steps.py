"""Batches and steps: which rows a process takes in which step, the schedule over the steps, evaluation."""

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.lm_dataset import BLANK, PackedDataset, token_byte_counts
from trainer.runtime.distributed import rank, sum_over_ranks, world_size
from trainer.runtime.flags import DECAY_RATIO

ESTIMATE_AFTER = 3  # steps of this run; the first ones are slower


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, noted while a step was computed and obeyed after it."""

    def __init__(self, signal_number: int):
        self.exit_code = 128 + signal_number


MODEL_INPUTS = ("input_ids", "labels", "attention_mask")


class MicroBatch(NamedTuple):
    """One forward's worth of rows on one rank: numbers in the dataset, tensors (B, T) on the device, and counts."""

    rows: list[int]
    inputs: dict[str, torch.Tensor]  # what the model takes
    extra: dict[str, torch.Tensor]  # what only the loss takes
    tokens: int  # padding left out
    targets: float  # what the loss is a mean over


class Step(NamedTuple):
    """What one rank does in an optimizer step.

    targets, rows: of all its micro-batches and all ranks, divided by the number of ranks, because gradients are means
    over the ranks: sum of losses / targets is the mean over the whole step, however it is split.
    """

    number: int
    schedule: float  # place in the schedule, see Run.schedule_at
    batches: list[MicroBatch]
    targets: float
    rows: float


def micro_batches(dataset: PackedDataset, run, rows: list[list[int]]) -> Iterator[MicroBatch]:
    """Load the named rows, a list of numbers for each micro-batch, onto the run's device."""
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=run.args.num_workers, pin_memory=run.device.type == "cuda",
        generator=torch.Generator(),  # else each pass would draw from the generator that dropout uses
        worker_init_fn=leave_group,
    )  # fmt: skip
    for numbers, batch in zip(rows, loader, strict=True):
        tokens, targets = int((batch["attention_mask"] > 0).sum()), dataset.count_targets(batch)
        tensors = {key: value.to(run.device, non_blocking=True) for key, value in batch.items()}
        inputs = {key: tensors.pop(key) for key in MODEL_INPUTS}
        yield MicroBatch([row for row in numbers if row != BLANK], inputs, tensors, tokens, targets)


def leave_group(worker: int) -> None:
    """In a loader's process: Ctrl-C and launchers signal whole groups, and the run still wants its batches."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def split_rows(rows: range, per_step: int, batch_size: int) -> Iterator[list[list[int]]]:
    """This rank's micro-batches of each step: per_step rows are dealt out to the ranks in turn.

    Every rank gets equally many micro-batches of equal sizes: where rows run out, BLANK ones stand in.
    """
    for begin in range(0, len(rows), per_step):
        of_step = rows[begin : begin + per_step]
        share = math.ceil(len(of_step) / world_size())
        mine = list(of_step[rank() :: world_size()])
        mine += [BLANK] * (share - len(mine))
        yield [mine[i : i + batch_size] for i in range(0, share, batch_size)]


def rows_per_step(run) -> int:
    return run.batch_size * run.args.accumulation_steps * world_size()


def count_steps(dataset: PackedDataset, run) -> int:
    """Optimizer steps at the end of the run, those of a run that it resumes included; sets the schedule over them."""
    per_epoch = math.ceil(len(dataset) / rows_per_step(run))
    left_in_epoch = math.ceil((len(dataset) - run.row) / rows_per_step(run))
    left = left_in_epoch + per_epoch * (run.args.epochs - run.epoch - 1)
    total = run.args.max_steps or run.step + max(left, 0)
    run.schedule, run.schedule_steps = (0, 0, 1), total
    if run.checkpoint and tuple(run.checkpoint["place"]["length"]) == (run.args.epochs, run.args.max_steps):
        start, run.schedule_steps = run.checkpoint["place"]["schedule"]
        run.schedule = (start, run.step, (run.schedule_steps - start) / max(total - run.step, 1))
    return total


def training_steps(dataset: PackedDataset, run, total_steps: int) -> Iterator[Step]:
    """Yield the steps that are left, epoch after epoch, from where the run stands.

    The last step of an epoch takes the rows that are left, so none leaks into the next epoch. A signal that any rank
    has noted ends the run here, between two steps.
    """
    run.logs.start_clock(run.tokens)
    while True:
        dataset.set_epoch(run.epoch)
        per_step = rows_per_step(run)
        plan = list(split_rows(range(run.row, len(dataset)), per_step, run.batch_size))
        batches = micro_batches(dataset, run, [rows for step in plan for rows in step])
        for micro_steps in plan:
            window = list(islice(batches, len(micro_steps)))
            counts = [sum(b.targets for b in window), sum(b.tokens for b in window), run.stop_signal]
            targets, tokens, stop_signal = sum_over_ranks(counts, run.device)
            if stop_signal:
                raise Stopped(run.stop_signal or signal.SIGTERM)
            rows = min(per_step, len(dataset) - run.row)
            run.step, run.row, run.tokens = run.step + 1, run.row + rows, run.tokens + int(tokens)
            if run.args.trace_samples:
                trace(dataset, run, window)
            began = time.monotonic() - run.logs.paused
            schedule = run.schedule_at(run.step)
            yield Step(run.step, schedule, window, max(targets, 1) / world_size(), rows / world_size())
            if run.is_main and run.step == min(run.resumed_at + ESTIMATE_AFTER, total_steps):
                run.logs.estimate(run.step, time.monotonic() - run.logs.paused - began)
            if run.step >= total_steps:
                return
        run.epoch, run.row = run.epoch + 1, 0


def trace(dataset: PackedDataset, run, window: list[MicroBatch]) -> None:
    """Add the rows that this rank takes in this step, by their number in the file's packing, to its trace."""
    line = {"step": run.step, "epoch": run.epoch, "rows": [int(dataset.order[row]) for b in window for row in b.rows]}
    with (run.logs.folder / f"{run.name}_samples.{rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def learning_rate_at(
    step: float, total_steps: int, peak: float, warmup_ratio: float, decay_ratio: float = DECAY_RATIO
) -> float:
    """Warm-up, flat, then linear to zero over the last decay_ratio of the steps (arXiv 2405.18392); step 1, 2, ..."""
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    decay_steps = math.ceil(decay_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if step <= total_steps - decay_steps:
        return peak
    return min(peak, peak * (total_steps - step + 1) / decay_steps)  # between two whole steps it would exceed it


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Every `interval` steps, ten times a run where none is given, and always at the end."""
    interval = interval or max(total_steps // 10, 1)
    return step % interval == 0 or step == total_steps


def expert_meters(output) -> dict[str, float]:
    """Tokens of the busiest expert of any layer, over an even share: 1 (even) to E (all on one). Dense: nothing."""
    load = output.expert_load  # (layers, E)
    return {} if load is None else {"peak_expert_load": float((load / load.mean(-1, keepdim=True).clamp(min=1)).max())}


@torch.no_grad()
def evaluate(
    model: nn.Module, val_set: PackedDataset, run, totals: Callable, whole: bool = True, tokenizer=None
) -> dict[str, float]:
    """Held-out means per target of what totals(model, batch) sums up: {"loss": ...} -> {"val_loss": ...}.

    With a tokenizer, val_bpb too: the sum called ce, else the loss, as nats, in bits per byte of the targets' text.
    Over the whole held-out set, or (so that it costs little during a run) its first --eval_rows rows; the ranks share
    the rows, and every rank gets the result.
    """
    began = time.monotonic()
    model.eval()
    rows = range(len(val_set) if whole else min(len(val_set), run.args.eval_rows))
    mine = [batch for step in split_rows(rows, run.batch_size * world_size(), run.batch_size) for batch in step]
    bytes_of = token_byte_counts(tokenizer).to(run.device) if tokenizer else None
    sums: Counter[str] = Counter()
    for batch in micro_batches(val_set, run, mine):
        with run.autocast():
            sums.update({name: float(value) for name, value in totals(model, batch).items()})
        sums["targets"] += batch.targets
        if tokenizer:
            labels = batch.inputs["labels"]
            sums["bytes"] += int(bytes_of[labels[labels != -100]].sum())
    sums = dict(zip(sums, sum_over_ranks(list(sums.values()), run.device), strict=True))
    model.train()
    run.logs.pause(time.monotonic() - began)  # left out of tokens/s
    targets, n_bytes = max(sums.pop("targets"), 1), sums.pop("bytes", None)
    means = {f"val_{name}": value / targets for name, value in sums.items()}
    if n_bytes is None:
        return means
    return means | {"val_bpb": sums.get("ce", sums["loss"]) / math.log(2) / max(n_bytes, 1)}
