"""Batches and steps: which rows a process takes in which optimizer step, and the schedule over the steps.

A dataset here is what dataset/lm_dataset.py has: len(), rows by number (BLANK: a row of padding) as dictionaries of
tensors with an "attention_mask", set_epoch(epoch), count_targets(batch), describe(row), order, summary(),
tokens_per_row(), data_path, data_hash.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from dataset.lm_dataset import BLANK
from model.attention import document_bounds
from model.loss import target_places
from trainer.runtime.distributed import gather, rank, sum_over_ranks, world_size
from trainer.runtime.flags import DECAY_RATIO
from trainer.runtime.memory import told_shared_memory

ESTIMATE_AFTER = 3  # steps of this run; the first ones are slower
INDICES = ("document_bounds", "target_places")  # into the whole batch
MODEL_INPUTS = ("input_ids", "labels", "attention_mask", *INDICES)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, noted while a step was computed and obeyed after it."""

    def __init__(self, signal_number: int):
        self.exit_code = 128 + signal_number


class MicroBatch(NamedTuple):
    """One forward's worth of rows on one rank: numbers in the dataset, tensors (B, ...) on the device, and counts."""

    rows: list[int]
    inputs: dict[str, Tensor]  # what the model takes
    extra: dict[str, Tensor]  # what only the loss takes
    tokens: int  # padding left out
    targets: float  # what the loss is a mean over

    def take(self, samples: np.ndarray, targets: float) -> "MicroBatch":
        """Some of the samples, by their places in this batch, without the padding that they all end with."""
        mask = self.inputs["attention_mask"]
        index = torch.from_numpy(samples).to(mask.device)
        real = mask[index].any(0).nonzero()  # (columns, 1)
        width = int(real[-1]) + 1 if len(real) else 1
        inputs, extra = (
            {name: x[index][:, :width] if x.dim() > 1 else x[index] for name, x in part.items() if name not in INDICES}
            for part in (self.inputs, self.extra)
        )
        rows = [self.rows[i] for i in samples if self.rows[i] != BLANK]
        return MicroBatch(rows, inputs, extra, 0, targets)


class Update:
    """The micro-batches of one optimizer step on one rank, and what is noted of them.

    targets, rows: of all its micro-batches and all ranks, divided by the number of ranks, because gradients are means
    over the ranks: sum of losses / targets is the mean over the whole step, however it is split.
    """

    def __init__(self, run, batches: list[MicroBatch], targets: float, rows: float):
        self.run, self.batches, self.targets, self.rows = run, batches, targets, rows
        self.sums: dict[str, Tensor] = {}  # of what note() was told, over the targets
        self.row_losses: list[tuple[list[int], Tensor]] = []  # of each micro-batch: rows, their losses (B,)
        self.expert_load: Tensor | None = None  # (layers, E)

    def micro_batches(self, *engines) -> Iterator[MicroBatch]:
        """Each micro-batch, for a forward and a backward of these engines."""
        self.run.current_update = self
        for batch in self.batches:
            with ExitStack() as stack:
                for engine in engines:
                    stack.enter_context(engine.micro_step(last=batch is self.batches[-1]))
                yield batch

    def balance(self, output, batch: MicroBatch) -> Tensor | float:
        """The share that a micro-batch has in the balance loss of the step, which keeps experts evenly loaded.

        A mean over rows; 0 for a dense model.
        """
        return 0.0 if output.aux_loss is None else output.aux_loss * len(batch.rows) / self.rows

    def note(self, batch: MicroBatch, output, losses: Tensor, **totals: Tensor) -> None:
        """Note the losses (B, ...) of a micro-batch and other sums over its targets, for the log: waits for no device.

        The log tells their means over the targets of the step.
        """
        row_losses = losses.detach().flatten(1).sum(1)
        self.row_losses.append((batch.rows, row_losses))
        for name, total in {"loss": row_losses.sum(), **totals}.items():
            mean = total.detach() / self.targets
            self.run.meters.add(name, mean, count=name not in self.sums)
            self.sums[name] = self.sums.get(name, 0.0) + mean
        if output.expert_load is not None:
            self.expert_load = output.expert_load.detach() + (0 if self.expert_load is None else self.expert_load)

    def mean(self, name: str) -> float:
        """The mean of something noted over the targets of all ranks: equal on all, so that they may act on it."""
        return sum_over_ranks([float(self.sums[name])], self.run.device)[0] / world_size()

    def suspect(self) -> int:
        """The row, of any rank, whose loss is not finite, else the first one: where to look for what went wrong."""
        losses = {row: float(loss) for rows, values in self.row_losses for row, loss in zip(rows, values, strict=False)}
        broken = [row for row, loss in losses.items() if not math.isfinite(loss)]
        suspects = gather((broken[:1], list(losses)[:1]))
        return next(rows[0] for kind in (0, 1) for rows in (s[kind] for s in suspects) if rows)


class Step(Update):
    """What one rank does between two lines of the log: the update of one batch of rows, or the rollout of a batch of
    prompts and the updates that it serves."""

    def __init__(self, run, number: int, batches: list[MicroBatch], targets: float, rows: float):
        super().__init__(run, batches, targets, rows)
        self.number = number

    def updates(
        self, rollout: MicroBatch, counts: Tensor, epochs: int = 1, parts: int = 1, signal: Tensor | None = None
    ) -> Iterator[Update]:
        """The updates of `epochs` passes over the N samples of this rank's rollout, each in `parts` shuffled parts.

        counts (N,): what each sample adds to the targets of an update, its tokens or 1. Every rank must have N samples
        (`rows` has BLANK for those that only fill up). The order depends on seed, step and rank alone. signal (N,):
        False for samples whose loss is 0. They are left out, except that every rank takes equally many; the targets
        count them all the same. Where no sample of any rank has a signal there is no update.
        """
        n, batch_size = len(rollout.rows), self.run.batch_size
        rng = np.random.default_rng([self.run.args.seed, self.number, rank()])
        kept = np.arange(n)
        if signal is not None:
            kept = np.argsort(~signal.cpu().numpy(), kind="stable")[: max(gather(int(signal.sum())))]
        shuffles = [kept[rng.permutation(len(kept))] for _ in range(epochs if len(kept) else 0)]
        shuffled = [part for shuffle in shuffles for part in np.array_split(shuffle, min(parts, len(kept)))]
        counts = counts.cpu().double().numpy()
        real = np.asarray(rollout.rows) != BLANK
        own = [float(values[part].sum()) for values in (counts, real) for part in shuffled]
        own += [float(counts.sum()), float(counts[kept].sum()), rollout.tokens]
        *whole, counted, kept_count, tokens = sum_over_ranks(own, self.run.device)  # of all parts in one exchange
        self.run.tokens += int(tokens)
        for part, targets, rows in zip(shuffled, whole[: len(shuffled)], whole[len(shuffled) :], strict=True):
            places = [part[begin : begin + batch_size] for begin in range(0, len(part), batch_size)]
            batches = [rollout.take(some, float(counts[some].sum())) for some in places]
            targets *= counted / max(kept_count, 1)
            yield Update(self.run, batches, max(targets, 1) / world_size(), max(rows, 1) / world_size())

    def note_samples(self, **values: Tensor) -> None:
        """Note what each sample of this rank's rollout came to, (N,) each, for the log: rewards by term, lengths."""
        for name, value in values.items():
            self.run.meters.add(name, value.float().sum(), count=value.numel())


def micro_batches(dataset, run, rows: list[list[int]]) -> Iterator[MicroBatch]:
    """Load the named rows, a list of numbers for each micro-batch, onto the run's device."""
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=run.args.num_workers, pin_memory=run.device.type == "cuda",
        generator=torch.Generator(),  # else each pass would draw from the generator that dropout uses
        worker_init_fn=leave_group, collate_fn=collate,
    )  # fmt: skip
    for numbers, batch in zip(rows, told_shared_memory(loader), strict=True):
        tokens, targets = int((batch["attention_mask"] > 0).sum()), dataset.count_targets(batch)
        tensors = {key: value.to(run.device, non_blocking=True) for key, value in batch.items()}
        for name in INDICES:  # of another length in each batch, for which nothing should be compiled anew
            if name in tensors:
                torch._dynamo.maybe_mark_dynamic(tensors[name], 0)
        inputs = {key: tensors.pop(key) for key in MODEL_INPUTS if key in tensors}
        yield MicroBatch([row for row in numbers if row != BLANK], inputs, tensors, tokens, targets)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one batch, with the indices that a model would else have to fetch from its device."""
    batch = default_collate(rows)
    if "labels" in batch:
        indices = document_bounds(batch["attention_mask"]), target_places(batch["labels"], batch["attention_mask"])
        batch |= {name: index for name, index in zip(INDICES, indices, strict=True) if index is not None}
    return batch


def leave_group(worker: int) -> None:
    """In a loader's process: Ctrl-C and launchers signal whole groups, and the run still wants its batches."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def split_rows(rows: range | list[int], per_step: int, batch_size: int) -> Iterator[list[list[int]]]:
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


def count_steps(dataset, run) -> int:
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


def windows(dataset, run, draw: Callable[[int], list[int]] | None) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each step that is left in the epoch."""
    per_step, left = rows_per_step(run), range(run.row, len(dataset))
    if draw is None:
        plan = list(split_rows(left, per_step, run.batch_size))
        batches = micro_batches(dataset, run, [rows for step in plan for rows in step])  # one pass, read ahead
        for micro_steps in plan:
            yield list(islice(batches, len(micro_steps)))
        return
    for begin in range(0, len(left), per_step):
        for micro_steps in split_rows(draw(len(left[begin : begin + per_step])), per_step, run.batch_size):
            yield list(micro_batches(dataset, run, micro_steps))


def training_steps(dataset, run, total_steps: int, draw: Callable[[int], list[int]] | None = None) -> Iterator[Step]:
    """Yield the steps that are left, epoch after epoch, from where the run stands.

    The last step of an epoch takes the rows that are left, so none leaks into the next epoch. A signal that any rank
    has noted ends the run here, between two steps. draw: names the rows of the next step, so many, in place of the
    epoch's order; every rank calls it and must get the same.
    """
    run.logs.start_clock(run.tokens)
    while True:
        dataset.set_epoch(run.epoch)
        for window in windows(dataset, run, draw):
            counts = [sum(b.targets for b in window), sum(b.tokens for b in window), run.stop_signal]
            targets, tokens, stop_signal = sum_over_ranks(counts, run.device)
            if stop_signal:
                raise Stopped(run.stop_signal or signal.SIGTERM)
            rows = min(rows_per_step(run), len(dataset) - run.row)
            run.step, run.row, run.tokens = run.step + 1, run.row + rows, run.tokens + int(tokens)
            if run.args.trace_samples:
                trace(dataset, run, window)
            began = time.monotonic() - run.logs.paused
            yield Step(run, run.step, window, max(targets, 1) / world_size(), rows / world_size())
            if run.is_main and run.step == min(run.resumed_at + ESTIMATE_AFTER, total_steps):
                run.logs.estimate(run.step, time.monotonic() - run.logs.paused - began)
            if run.step >= total_steps:
                return
        run.epoch, run.row = run.epoch + 1, 0


def trace(dataset, run, window: list[MicroBatch]) -> None:
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


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Every `interval` steps, ten times a run where none is given, and always at the end."""
    interval = interval or max(total_steps // 10, 1)
    return step % interval == 0 or step == total_steps
