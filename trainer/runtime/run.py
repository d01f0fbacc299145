"""A run, from its flags to its last save: processes, device, tokenizer, place in the data, log, files. No algorithm.

run = Run(args, "pretrain")
...                                                             the script's model and data
run.plan(model, train_set)                                      how many steps; does it fit?
engine = make_engine(model, run)
with run.training({"model": engine}, train_set, val_set, totals, tokenizer) as steps:
    for step in steps:                                          resumed, rates set
        ...                                                     the script's algorithm
                                                                evaluated, logged, saved when due
"""

import argparse
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.errors import InputError
from model.loading import load_tokenizer, save_weights
from trainer.runtime.checkpoint import (
    agree,
    check_parts,
    checkpoint_path,
    random_state,
    resume_command,
    set_random_state,
    write_checkpoint,
)
from trainer.runtime.devices import pick_device, pick_dtype
from trainer.runtime.distributed import check_launch, gather, local_rank, rank, start_processes, torchruns, world_size
from trainer.runtime.engine import Engine
from trainer.runtime.evaluation import evaluate
from trainer.runtime.flags import choose_defaults
from trainer.runtime.memory import check_memory, told_memory
from trainer.runtime.meters import Meters, peak_expert_load
from trainer.runtime.places import claim, make_writable, release, remove_leftovers
from trainer.runtime.run_log import RunLog, keep_steps
from trainer.runtime.steps import (
    Step,
    Stopped,
    Update,
    count_steps,
    is_due,
    learning_rate_at,
    rows_per_step,
    training_steps,
)

MAX_SKIPPED_IN_A_ROW = 10


class Run:
    """A running script: its processes, device, precision, tokenizer, place in the data, log and files."""

    def __init__(self, args: argparse.Namespace, stage: str, folder: str = ""):
        """stage names the files of the run; folder: where under --out_dir its weights go."""
        self.args, self.stage, self.folder = args, stage, folder
        check_launch()
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
        self.launchers = torchruns()
        self.name = stage  # becomes stage_hidden[_moe] when the model is known
        self.lock = None
        # Where the run stands: steps taken, the epoch and the next row of it, real tokens seen.
        self.step = self.epoch = self.row = self.tokens = self.skipped_steps = self.resumed_at = 0
        self.checkpoint: dict | None = None  # of the run that this one resumes
        self.vocabulary: dict | None = None  # of the tokenizer that the model is trained with
        self.settings: dict[str, object] = {}  # of this stage alone, that a resumed run must agree with
        self.meters = Meters(self.device)  # of the steps that no log line has told yet
        self.current_update: Update | None = None
        self.stop_signal = 0
        if local_rank() == 0:
            make_writable(args.out_dir / "logs")
        self.logs = RunLog(args.out_dir / "logs", stage, self.device)
        self.tokenizer = load_tokenizer(args.tokenizer_path)
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

    def claim_files(self) -> None:
        """InputError where another run writes the files of this name now; what a killed one has left of them goes."""
        if self.is_main:
            self.lock = claim(self.logs.folder / f".{self.name}.lock", self.name)
        if self.lock:
            checkpoints = checkpoint_path(self.args.out_dir, self.weights).parent
            remove_leftovers({self.weights.parent, checkpoints, self.logs.folder}, self.name)

    def plan(
        self, model: nn.Module, train_set, whole_logits: int = 0, beside: int = 0, critic: nn.Module | None = None
    ) -> None:
        """Count the steps, print the arithmetic of the run, and end it here if it cannot fit into memory.

        whole_logits, beside, critic: see memory.py.
        """
        args, parameters = self.args, sum(p.numel() for p in model.parameters())
        self.batch_size = min(self.batch_size, math.ceil(len(train_set) / world_size()))  # no step has more rows
        self.total_steps = count_steps(train_set, self)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = f", {trained / 1e6:.2f}M of them trained," if trained < parameters else ""
        per_step = rows_per_step(self) * train_set.tokens_per_row()
        ranks = f"{world_size()} processes x " if world_size() > 1 else ""
        print(
            f"{self.name}: {parameters / 1e6:.1f}M parameters{share} on {self.device}, {args.optimizer} at "
            f"{self.learning_rate:g}, {str(self.dtype).removeprefix('torch.')}\n"
            f"{train_set.summary()}\n"
            f"a step: {ranks}{args.accumulation_steps} x {self.batch_size} rows = {per_step:,.0f} tokens\n"
            f"{self.total_steps:,} steps = {per_step * self.total_steps / 1e6:,.1f}M tokens, "
            f"{per_step * self.total_steps / parameters:.1f} a parameter",
            flush=True,
        )
        if args.deepspeed is None:
            with told_memory(self):
                check_memory(model, self, whole_logits, beside, critic)

    # ------------------------------------------------------------------------------------------------------ training

    @contextmanager
    def training(
        self,
        engines: dict[str, Engine],
        train_set,
        val_set=None,
        totals: Callable | None = None,
        tokenizer=None,
        *,
        extra: dict[str, Any] | None = None,
        draw: Callable[[int], list[int]] | None = None,
        write: Callable = save_weights,
    ) -> Iterator[Iterator[Step]]:
        """The steps that are left: resumed where --from_resume says so, evaluated, logged and saved when due.

        engines: what trains, by name in the checkpoint; the first one's model is evaluated and written as the weights
        of the stage. totals, tokenizer: see evaluate(). extra: what else a resumed run must find as it was, objects
        with state_dict() and load_state_dict(); every rank calls them. draw: see training_steps(). write: what writes
        the weights, called as save_weights is.

        Ctrl-C and SIGTERM end the run after the step in hand, saved; memory exhausted ends with what to try. The log is
        closed and its curve drawn however the run ends.
        """
        self.engines, self.train_set, self.extra, self.write = engines, train_set, extra or {}, write
        handlers = {}
        try:
            self.begin()
            handlers = {number: signal.signal(number, self.note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
            with told_memory(self):
                yield self.steps(val_set, totals, tokenizer, draw)
        except Stopped:
            if self.step > self.resumed_at:  # nothing was learned before: an earlier run's files stay
                self.save()
                gather(None)  # a launcher that sees a process end gives the others half a minute, perhaps amid a write
                if self.is_main:
                    print(f"stopped and saved after step {self.step}; to go on: {resume_command()}", file=sys.stderr)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            try:
                self.logs.close()
            finally:
                release(self.lock)

    def steps(self, val_set, totals: Callable | None, tokenizer, draw: Callable | None) -> Iterator[Step]:
        """The steps of training(), each followed by what is due after it. What a checkpoint holds has been told."""
        args, total_steps = self.args, self.total_steps
        model = next(iter(self.engines.values())).model
        for step in training_steps(self.train_set, self, total_steps, draw):
            rates, self.current_update = self.set_learning_rates(), step
            yield step
            evaluating = is_due(step.number, args.eval_interval, total_steps)
            if evaluating or step.number % args.log_interval == 0:
                meters = self.meters.means() | self.engine_meters(rates)
                if evaluating and val_set:
                    meters |= evaluate(model, val_set, self, totals, step.number == total_steps, tokenizer)
                self.logs.write(step.number, self.tokens, meters, self.skipped_steps)
            if is_due(step.number, args.save_interval, total_steps):
                self.save()

    def set_learning_rates(self) -> dict[str, float]:
        """Give each engine its learning rate of this step -> {name: rate}."""
        place, ratio = self.schedule_at(self.step), self.args.warmup_ratio
        rates = {}
        for name, engine in self.engines.items():
            rates[name] = learning_rate_at(place, self.schedule_steps, engine.optimizer.defaults["lr"], ratio)
            engine.set_learning_rate(rates[name])
        return rates

    def engine_meters(self, rates: dict[str, float]) -> dict[str, float]:
        """lr, grad_norm and peak_expert_load of the last update; those of a second engine under its name."""
        meters = {}
        for number, (name, engine) in enumerate(self.engines.items()):
            prefix = f"{name}_" if number else ""
            meters |= {f"{prefix}lr": rates[name], f"{prefix}grad_norm": float(engine.grad_norm)}
        return meters | peak_expert_load(self.current_update.expert_load, self.device)

    def accepts(self, engine: Engine) -> bool:
        """Whether an engine may take its step: not with a gradient that is not finite; ten in a row end the run."""
        if math.isfinite(engine.grad_norm):
            engine.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        engine.skipped_in_a_row += 1
        if engine.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise InputError(
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, last at "
                f"{self.train_set.describe(self.current_update.suspect())}; lower --learning_rate, or look at these "
                "rows"
            )
        return False

    def schedule_at(self, step: int) -> float:
        """The place of a step in the schedule: the step itself, unless a resumed run takes steps of another size."""
        start, first, pace = self.schedule
        return start + (step - first) * pace

    # -------------------------------------------------------------------------------------------- resuming and saving

    def begin(self) -> None:
        """Restore what --from_resume found, open the log: the last thing before the first step."""
        identity = self.identity()
        starts = gather((self.step, identity, self.vocabulary and self.vocabulary["hash"]))
        if starts != [starts[0]] * len(starts):
            raise InputError(
                "the machines of this run differ in their data file, tokenizer or checkpoint: give each the same "
                f"--data_path and --tokenizer_path, and the same {self.args.out_dir / 'checkpoints'}"
            )
        torch.manual_seed(self.args.seed + rank() + self.step)  # weights are equal everywhere; dropout need not be
        if self.checkpoint:
            self.restore(identity)
        if self.is_main:
            for path in self.logs.folder.glob(f"{self.name}_samples.*.jsonl"):
                keep_steps(path, self.step)
            self.logs.open(self.name, self.total_steps, self.step)
            if self.args.use_wandb:
                shown = {
                    key: value if isinstance(value, int | float) else str(value)
                    for key, value in vars(self.args).items()
                }
                self.logs.track(self.args.wandb_project, self.name, shown)
        self.resumed_at = self.step

    def restore(self, identity: dict) -> None:
        """Go back to where the checkpoint's run stood."""
        saved, path = self.checkpoint, checkpoint_path(self.args.out_dir, self.weights)
        agree(path, saved["identity"], identity)
        if self.step >= self.total_steps:
            raise InputError(
                f"nothing is left to do: this run ended after step {self.step}; raise --epochs or --max_steps, "
                "or start anew without --from_resume"
            )
        check_parts(path, saved, self.engines, self.extra)
        for name, engine in self.engines.items():
            engine.load_state(saved["engines"][name])
        for name, part in self.extra.items():
            part.load_state_dict(saved["extra"][name])
        if len(saved["random"]) == world_size():
            set_random_state(saved["random"][rank()], self.device)
        self.meters.restore(saved["place"]["meters"])
        print(f"resumed after step {self.step}: epoch {self.epoch + 1}, row {self.row:,}", flush=True)
        self.checkpoint = None

    def identity(self) -> dict:
        """What a resumed run has in common with the one it goes on with: the same rows in the same order."""
        args = self.args
        return {
            "data hash": self.train_set.data_hash, "--max_seq_len": args.max_seq_len, "--packing": args.packing,
            "--seed": args.seed, "rows": len(self.train_set), "--optimizer": args.optimizer, **self.settings,
        }  # fmt: skip

    def place(self) -> dict:
        """Where the run stands, for its checkpoint; every rank has to call it."""
        return {
            "step": self.step, "epoch": self.epoch, "row": self.row, "tokens": self.tokens,
            "skipped_steps": self.skipped_steps, "elapsed_s": self.logs.elapsed(), "meters": self.meters.summed(),
            "schedule": (self.schedule_at(self.step), self.schedule_steps),
            "length": (self.args.epochs, self.args.max_steps),
        }  # fmt: skip

    def save(self) -> None:
        """Write the stage's weights with their JSON, and the checkpoint for --from_resume; every rank calls it."""
        states = {name: engine.state() for name, engine in self.engines.items()}
        extra = {name: part.state_dict() for name, part in self.extra.items()}
        place, rng = self.place(), gather(random_state(self.device))
        if not self.is_main:
            return
        first = next(iter(self.engines))
        model = self.engines[first].model
        self.write(
            model, self.weights, state=states[first]["weights"], stage=self.stage, tokens_seen=self.tokens,
            data_path=self.train_set.data_path, data_hash=self.train_set.data_hash,
            trained_length=model.config.original_max_position_embeddings, vocabulary=self.vocabulary,
        )  # fmt: skip
        parts = {"engines": states, "extra": extra, "place": place, "identity": self.identity(), "random": rng}
        parts |= {"vocabulary": self.vocabulary, "launchers": self.launchers}
        write_checkpoint(checkpoint_path(self.args.out_dir, self.weights), model.config, parts)

    def note_signal(self, number: int, frame) -> None:
        """Ask for the end of the run; a second Ctrl-C does not wait. (Launchers send several: theirs do not count.)"""
        if self.stop_signal and not self.launched:
            raise KeyboardInterrupt
        if self.is_main and not self.stop_signal:
            again = "" if self.launched else "; again: at once, without saving"
            print(f"\nstopping after this step{again}", file=sys.stderr, flush=True)
        self.stop_signal = number
