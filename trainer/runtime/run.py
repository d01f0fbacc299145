"""Plumbing of the training scripts: a run from its flags to its last save. Never an algorithm."""

import argparse
import math
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset.lm_dataset import PackedDataset
from model.errors import InputError, UsageError, run_script
from model.loading import save_weights
from trainer.runtime.checkpoint import (
    agree,
    checkpoint_path,
    random_state,
    set_random_state,
    verify_resume,
    without,
    write_checkpoint,
)
from trainer.runtime.devices import pick_device, pick_dtype
from trainer.runtime.distributed import (
    gather,
    is_lost_peer,
    launched_rank,
    local_rank,
    local_world_size,
    rank,
    start_processes,
    stop_processes,
    sum_over_ranks,
    world_size,
)
from trainer.runtime.engine import Engine
from trainer.runtime.memory import check_memory
from trainer.runtime.run_log import RunLog, keep_steps
from trainer.runtime.steps import MicroBatch, Stopped

MAX_SKIPPED_IN_A_ROW = 10


# ---------------------------------------------------------------------------------------------------------- the run


class Run:
    """A running script: its processes, device, precision, place in the data, log and files. No algorithm."""

    def __init__(self, args: argparse.Namespace, stage: str, folder: str = ""):
        """stage names the files of the run; folder: where under --out_dir its weights go."""
        self.args, self.stage, self.folder = args, stage, folder
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        choose_defaults(args, self.device)
        if args.deepspeed is not None:
            from trainer.runtime.deepspeed_engine import check_deepspeed

            check_deepspeed(args, self.dtype)
        self.launched = "RANK" in os.environ  # by torchrun or deepspeed, which pass signals on, some of them twice
        self.batch_size, self.learning_rate = args.batch_size, args.learning_rate
        start_processes(self.device, always=args.deepspeed is not None)
        self.is_main = rank() == 0
        self.name = stage  # becomes stage_hidden[_moe] when the model is known
        # Where the run stands: steps taken, the epoch and the next row of it, real tokens seen.
        self.step = self.epoch = self.row = self.tokens = self.skipped_steps = 0
        self.skipped_in_a_row = self.resumed_at = self.told_at = 0
        self.checkpoint: dict | None = None  # of the run that this one resumes
        self.settings: dict[str, object] = {}  # of this stage alone, that a resumed run must agree with
        self.sums: dict[str, torch.Tensor] = {}  # of the meters of the steps after told_at, the last that was logged
        self.losses_of_step: list[tuple[list[int], torch.Tensor]] = []  # of each micro-batch: rows, their losses (B,)
        self.stop_signal = 0
        if local_rank() == 0:
            make_writable(args.out_dir / "logs", stage)
        self.logs = RunLog(args.out_dir / "logs", stage, self.device)
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    @property
    def cache_dir(self) -> Path:
        return self.args.out_dir / "cache"

    @property
    def weights(self) -> Path:
        return self.args.out_dir / self.folder / f"{self.name}.pth"

    def autocast(self):
        """The context for forward passes: matrix products in self.dtype, weights stay float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def describe(self, model: nn.Module, train_set: PackedDataset, total_steps: int, whole_logits: int = 0) -> None:
        """Print the arithmetic of the run before its first step, and end it here if it cannot fit into memory.

        whole_logits: see trainer/runtime/memory.py.
        """
        args, parameters = self.args, sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = f", {trained / 1e6:.2f}M of them trained," if trained < parameters else ""
        real = 1 - train_set.padding_share()
        rows = self.batch_size * args.accumulation_steps * world_size()
        per_step = rows * args.max_seq_len * real
        ranks = f"{world_size()} processes x " if world_size() > 1 else ""
        print(
            f"{self.name}: {parameters / 1e6:.1f}M parameters{share} on {self.device}, {args.optimizer} at "
            f"{self.learning_rate:g}, {str(self.dtype).removeprefix('torch.')}\n"
            f"{len(train_set.cache.ids):,} tokens in {len(train_set):,} rows of {args.max_seq_len} "
            f"({train_set.padding_share():.1%} padding)\n"
            f"a step: {ranks}{args.accumulation_steps} x {self.batch_size} rows = {per_step:,.0f} tokens\n"
            f"{total_steps:,} steps = {per_step * total_steps / 1e6:,.1f}M tokens, "
            f"{per_step * total_steps / parameters:.1f} a parameter",
            flush=True,
        )
        if args.deepspeed is None:
            with self.told_memory():
                check_memory(model, self, whole_logits)

    def begin(self, engine: Engine, train_set: PackedDataset, total_steps: int) -> None:
        """Restore what --from_resume found, open the log: the last thing before the first step."""
        identity = self.identity(train_set)
        starts = gather((self.step, identity))
        if starts != [starts[0]] * len(starts):
            raise InputError(
                "the machines of this run differ in their data file or checkpoint: give each the same --data_path, and "
                f"the same {self.args.out_dir / 'checkpoints'}"
            )
        if self.checkpoint:
            agree(checkpoint_path(self.args.out_dir, self.weights), self.checkpoint["identity"], identity)
            if self.step >= total_steps:
                raise InputError(
                    f"nothing is left to do: this run ended after step {self.step}; raise --epochs or --max_steps, "
                    "or start anew without --from_resume"
                )
            engine.load_state(self.checkpoint)
            states = self.checkpoint["random"]
            torch.manual_seed(self.args.seed + rank() + self.step)
            if len(states) == world_size():
                set_random_state(states[rank()], self.device)
            print(f"resumed after step {self.step}: epoch {self.epoch + 1}, row {self.row:,}", flush=True)
            sums, self.told_at = self.checkpoint["place"]["meters"]
            self.sums = {name: torch.tensor(value, device=self.device) for name, value in sums.items()}
            self.checkpoint = None
        else:
            torch.manual_seed(self.args.seed + rank())  # weights are equal everywhere; dropout need not be
        if self.is_main:
            for path in self.logs.folder.glob(f"{self.name}_samples.*.jsonl"):
                keep_steps(path, self.step)
            self.logs.open(self.name, total_steps, self.step)
            if self.args.use_wandb:
                shown = {
                    key: value if isinstance(value, int | float) else str(value)
                    for key, value in vars(self.args).items()
                }
                self.logs.track(self.args.wandb_project, self.name, shown)
        self.resumed_at = self.step

    def identity(self, train_set: PackedDataset) -> dict:
        """What a resumed run has in common with the one it goes on with: the same rows in the same order."""
        args = self.args
        return {
            "data hash": train_set.data_hash, "--max_seq_len": args.max_seq_len, "--packing": args.packing,
            "--seed": args.seed, "rows": len(train_set), "--optimizer": args.optimizer, **self.settings,
        }  # fmt: skip

    def place(self) -> dict:
        """Where the run stands, for its checkpoint; every rank has to call it."""
        return {
            "step": self.step, "epoch": self.epoch, "row": self.row, "tokens": self.tokens,
            "skipped_steps": self.skipped_steps, "elapsed_s": self.logs.elapsed(),
            "meters": (self.summed(), self.told_at),  # of the steps that no log line has told yet
            "schedule": (self.schedule_at(self.step), self.schedule_steps),
            "length": (self.args.epochs, self.args.max_steps),
        }  # fmt: skip

    def log(self, step: int, meters: dict[str, float]) -> None:
        """Write a line of the log and the progress line; every rank calls it, rank 0 writes."""
        self.logs.write(step, self.tokens, meters, self.skipped_steps)

    def schedule_at(self, step: int) -> float:
        """The place of a step in the schedule: the step itself, unless a resumed run takes steps of another size."""
        start, first, pace = self.schedule
        return start + (step - first) * pace

    def add(self, batch: MicroBatch, losses: torch.Tensor, targets: float, **totals: torch.Tensor) -> None:
        """Note the losses (B, ...) of a micro-batch and other sums over its targets. Waits for no device.

        targets: of its whole step, per rank (Step.targets).
        """
        row_losses = losses.detach().flatten(1).sum(1)
        self.losses_of_step.append((batch.rows, row_losses))
        for name, total in {"loss": row_losses.sum(), **totals}.items():
            self.sums[name] = self.sums.get(name, 0.0) + total.detach() / targets

    def summed(self) -> dict[str, float]:
        """The sums of the meters, over all ranks; every rank has to call it."""
        totals = sum_over_ranks([float(value) for value in self.sums.values()], self.device)
        return {name: total / world_size() for name, total in zip(self.sums, totals, strict=True)}

    def means(self) -> dict[str, float]:
        """Means per target of the steps since the last call, over all ranks; every rank has to call it."""
        steps = max(self.step - self.told_at, 1)
        means = {name: total / steps for name, total in self.summed().items()}
        self.sums, self.told_at = {}, self.step
        return means

    def accept_step(self, grad_norm: torch.Tensor | float, dataset: PackedDataset) -> bool:
        """Whether a step may be taken: False for a non-finite gradient; ten of these in a row end the run."""
        losses_of_step, self.losses_of_step = self.losses_of_step, []
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            losses = {
                row: float(loss) for rows, values in losses_of_step for row, loss in zip(rows, values, strict=False)
            }
            broken = [row for row, loss in losses.items() if not math.isfinite(loss)]
            suspects = gather((broken[:1], list(losses)[:1]))  # of every rank
            row = next(rows[0] for kind in (0, 1) for rows in (s[kind] for s in suspects) if rows)
            raise InputError(
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, last at "
                f"{dataset.describe(row)}; lower --learning_rate, or look at these rows"
            )
        return False

    @contextmanager
    def guard(self, save: Callable[[], object]) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in hand, saved; memory exhausted ends with what to try.

        The log is closed and its curve drawn however the run ends.
        """
        handlers = {number: signal.signal(number, self.note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.told_memory():
                yield
        except Stopped:
            if self.step > self.resumed_at:  # nothing was learned before: an earlier run's files stay
                save()
                gather(None)  # a launcher that sees a process end gives the others half a minute, perhaps amid a write
                if self.is_main:
                    print(f"stopped and saved after step {self.step}; to go on: {resume_command()}", file=sys.stderr)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.logs.close()

    @contextmanager
    def told_memory(self) -> Iterator[None]:
        """Memory exhausted within ends with what to try."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
                raise
            raise InputError(
                f"out of memory at batch size {self.batch_size}: try --batch_size {max(self.batch_size // 2, 1)} "
                f"--accumulation_steps {self.args.accumulation_steps * 2}, or a smaller --max_seq_len"
            ) from error

    def note_signal(self, number: int, frame) -> None:
        """Ask for the end of the run; a second Ctrl-C does not wait. (Launchers send several: theirs do not count.)"""
        if self.stop_signal and not self.launched:
            raise KeyboardInterrupt
        if self.is_main and not self.stop_signal:
            again = "" if self.launched else "; again: at once, without saving"
            print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)
        self.stop_signal = number


def choose_defaults(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the flags whose default depends on the device or on other flags."""
    on_cpu = device.type == "cpu"
    if args.accumulation_steps is None:
        args.accumulation_steps = 2 if on_cpu and args.batch_size is None else 1
    args.batch_size = args.batch_size or (4 if on_cpu else 32)
    if args.num_workers is None:
        args.num_workers = int(device.type == "cuda")
    rates = args.default_learning_rates
    if args.deepspeed and args.optimizer == "muon":
        raise UsageError(
            "--optimizer muon needs whole matrices, which ZeRO cuts up: use --optimizer adamw with --deepspeed"
        )
    args.optimizer = args.optimizer or ("adamw" if args.deepspeed else next(iter(rates)))
    if args.learning_rate is None:  # 0 counts as given
        args.learning_rate = rates[args.optimizer]


def make_writable(folder: Path, stage: str) -> None:
    """An unwritable place is told now, not after an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{stage}.probe"
    probe.touch()
    probe.unlink()


def resume_command() -> str:
    """What to type to go on with the run that this process was started for."""
    if world_size() > local_world_size():
        return "start it on all machines as before, with --from_resume 1"
    launcher = ["python"] if world_size() == 1 else ["torchrun", "--nproc_per_node", str(local_world_size())]
    flags = without(sys.argv[1:], "--from_resume", "--local_rank")
    return shlex.join([*launcher, sys.argv[0], *flags, "--from_resume", "1"])


def run_training(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace], None]) -> None:
    """How a training script starts: main(args), --verify_resume in its place; one sentence for an error, no hang.

    A process that only lost its peer says so last: the peer's own sentence is the one to read.
    """

    def start(args: argparse.Namespace) -> None:
        try:
            verify_resume(args) if args.verify_resume else main(args)
        except Exception as error:
            if launched_rank() != 0 or is_lost_peer(error):
                time.sleep(3)  # rank 0 may be saying the same; the launcher ends us when another rank has died
            if is_lost_peer(error):
                raise InputError("another process of this run ended; its own message says why") from error
            raise
        stop_processes()

    run_script(parse_args, start)


def save(engine: Engine, run: Run, train_set: PackedDataset, write: Callable = save_weights) -> Path:
    """Write out/<stage>_<hidden>[_moe].pth with its JSON, and the checkpoint for --from_resume; every rank calls it.

    write: what writes the weights, called as save_weights is.
    """
    state, place, rng = engine.state(), run.place(), gather(random_state(run.device))
    if run.is_main:
        config = engine.model.config
        write(
            engine.model, run.weights, state=state["weights"], stage=run.stage, tokens_seen=run.tokens,
            data_path=train_set.cache.meta["data_path"], data_hash=train_set.data_hash,
            trained_length=config.original_max_position_embeddings,
        )  # fmt: skip
        path = checkpoint_path(run.args.out_dir, run.weights)
        write_checkpoint(path, state, config, place, run.identity(train_set), rng)
    return run.weights
