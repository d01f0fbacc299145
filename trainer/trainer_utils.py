"""Plumbing of the training scripts: flags, device and precision, batches, schedule, log. Never an algorithm."""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.lm_dataset import PackedDataset, token_byte_counts
from model.errors import InputError, UsageError
from model.LMConfig import PRESETS, MiniMindConfig
from model.loading import check_vocab, find_weights, load_model, save_weights, weights_path
from model.model_minimind import MiniMindForCausalLM

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SKIPPED_IN_A_ROW = 10
DECAY_RATIO = 0.4  # share of the steps in which the learning rate falls
MAX_SEED = 2**32 - 1  # numpy takes no larger one


# ---------------------------------------------------------------------------------------------------------- flags


def boolean(text: str) -> bool:
    """0/1/true/false for argparse (bool("0") would be True)."""
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither 0/1 nor true/false")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number of this kind within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is no finite number from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def common_parser(
    doc: str, *, data: str, from_weight: str, epochs: int, lr: dict[str, float]
) -> argparse.ArgumentParser:
    """The flags that every training script has; `lr` is the default peak learning rate by optimizer."""
    count, switch = number(int, 1), {"type": boolean, "nargs": "?", "const": True}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(default_learning_rates=lr)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--data_path", type=Path, help=f"JSON lines to train on (default: dataset/{data}, else the demo data)"
    )
    group.add_argument(
        "--val_path", type=Path, help="held-out rows (default: NAME_val.jsonl beside the data, if there)"
    )
    group.add_argument("--out_dir", type=Path, default=ROOT / "out", help="weights, logs, caches (default: out/)")
    group.add_argument("--tokenizer_path", type=Path, help="folder of a tokenizer (default: model/)")
    group.add_argument(
        "--from_weight", default=from_weight, help=f"stage name or file to start from, or none (default: {from_weight})"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset", choices=PRESETS, help="a published size (default: minimind2-small, or that of --from_weight)"
    )
    group.add_argument("--hidden_size", type=count, help="width, in place of the preset's")
    group.add_argument("--num_hidden_layers", type=count, help="depth, in place of the preset's")
    group.add_argument("--use_moe", **switch, help="mixture of experts, in place of the preset's choice")
    group = parser.add_argument_group("training")
    group.add_argument("--max_seq_len", type=number(int, 8), default=512, help="tokens in a row (default: 512)")
    group.add_argument(
        "--packing", default=True, **switch, help="0: one document a row, padded (default: 1, packed rows)"
    )
    group.add_argument("--epochs", type=count, default=epochs, help=f"passes over the data (default: {epochs})")
    group.add_argument("--max_steps", type=count, help="optimizer steps, in place of --epochs")
    group.add_argument("--batch_size", type=count, help="rows of a micro-batch (default: 32, 4 on a CPU)")
    group.add_argument(
        "--accumulation_steps", type=count, help="micro-batches of a step (default: 1; 2 with a CPU's default batch)"
    )
    rates = ", ".join(f"{rate:g} with {name}" for name, rate in lr.items())
    group.add_argument("--learning_rate", type=number(float, 0), help=f"peak learning rate (default: {rates})")
    group.add_argument(
        "--warmup_ratio",
        type=number(float, 0, 1 - DECAY_RATIO),
        default=0.02,
        help="share of the steps that warm up (default: 0.02)",
    )
    group.add_argument("--weight_decay", type=number(float, 0), default=0.1, help="on matrices alone (default: 0.1)")
    group.add_argument(
        "--grad_clip", type=number(float, 0), default=1.0, help="gradient norm at most; 0: no limit (default: 1)"
    )
    group.add_argument("--optimizer", choices=list(lr), default=next(iter(lr)), help=f"default: {next(iter(lr))}")
    group.add_argument(
        "--seed", type=number(int, 0, MAX_SEED), default=42, help="of weights and data order (default: 42)"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the matrix products (default: auto, bfloat16 where it is faster)",
    )
    group.add_argument(
        "--num_workers", type=number(int, 0), default=0, help="processes that prepare batches (default: 0)"
    )
    group.add_argument(
        "--use_compile",
        choices=["0", "1", "auto"],
        default="auto",
        help="torch.compile (default: auto, on CUDA for long runs)",
    )
    group.add_argument("--deterministic", **switch, default=False, help="bit-equal repeats on CUDA too, slower")
    group = parser.add_argument_group("output")
    group.add_argument("--log_interval", type=count, default=10, help="steps between log lines (default: 10)")
    group.add_argument("--eval_interval", type=count, help="steps between evaluations (default: ten times a run)")
    group.add_argument(
        "--eval_rows", type=count, default=128, help="held-out rows of an evaluation; the last takes all (default: 128)"
    )
    group.add_argument("--save_interval", type=count, help="steps between saves (default: at each evaluation)")
    group.add_argument("--debug", **switch, default=False, help="show tracebacks of errors")
    return parser


# ------------------------------------------------------------------------------------------- the run: device, log


class MicroBatch(NamedTuple):
    """One forward's worth of rows: numbers in the dataset, tensors (B, T) on the device, and counts."""

    rows: list[int]
    inputs: dict[str, torch.Tensor]
    tokens: int  # padding left out
    targets: int


class Run:
    """What a running script writes to and computes on: device, precision, log file, progress line. No algorithm."""

    def __init__(self, args: argparse.Namespace, stage: str):
        self.args, self.stage = args, stage
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        if args.accumulation_steps is None:
            args.accumulation_steps = 2 if self.device.type == "cpu" and args.batch_size is None else 1
        self.batch_size = args.batch_size or (4 if self.device.type == "cpu" else 32)
        given = args.learning_rate  # 0 counts as given
        self.learning_rate = args.default_learning_rates[args.optimizer] if given is None else given
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.tokens = self.logged_tokens = 0
        self.steps_begun = self.loss_from = 0
        self.loss_sum = torch.zeros((), device=self.device)
        self.losses_of_step: list[tuple[list[int], torch.Tensor]] = []  # of each micro-batch: rows, their losses (B,)
        self.name = stage  # becomes stage_hidden[_moe] when the model is known
        self.records: list[dict] = []
        (args.out_dir / "logs").mkdir(parents=True, exist_ok=True)
        probe = args.out_dir / "logs" / f".{stage}.probe"  # an unwritable place is told now, not after an hour
        probe.touch()
        probe.unlink()
        random.seed(args.seed)
        np.random.seed(args.seed)
        torch.manual_seed(args.seed)
        if args.deterministic:
            torch.use_deterministic_algorithms(True)
        self.started = self.logged_at = time.monotonic()

    @property
    def cache_dir(self) -> Path:
        return self.args.out_dir / "cache"

    def autocast(self):
        """The context for forward passes: matrix products in self.dtype, weights stay float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def describe(self, model: nn.Module, train_set: PackedDataset, total_steps: int) -> None:
        """Print the arithmetic of the run before its first step."""
        args, parameters = self.args, sum(p.numel() for p in model.parameters())
        row_tokens = len(train_set.cache.ids) / len(train_set)
        per_step = self.batch_size * args.accumulation_steps * row_tokens
        print(
            f"{self.name}: {parameters / 1e6:.1f}M parameters on {self.device}, {args.optimizer} at "
            f"{self.learning_rate:g}, {str(self.dtype).removeprefix('torch.')}\n"
            f"{len(train_set.cache.ids):,} tokens in {len(train_set):,} rows of {args.max_seq_len} "
            f"({train_set.padding_share():.1%} padding); {per_step:,.0f} tokens a step, {total_steps:,} steps, "
            f"{per_step * total_steps / 1e6:,.1f}M tokens in all",
            flush=True,
        )

    def log(self, step: int, total_steps: int, meters: dict[str, float]) -> None:
        """Write one JSON line (step, tokens, meters, tokens_per_s, elapsed_s, peak_memory_mb) and a progress line."""
        now = time.monotonic()
        record = {"step": step, "tokens": self.tokens, **meters}
        if self.tokens > self.logged_tokens:
            record["tokens_per_s"] = round((self.tokens - self.logged_tokens) / (now - self.logged_at), 1)
        record |= {"elapsed_s": round(now - self.started, 2), "peak_memory_mb": peak_memory_mb(self.device)}
        if self.skipped_steps:
            record["skipped_steps"] = self.skipped_steps
        log_path = self.args.out_dir / "logs" / f"{self.name}.jsonl"
        with log_path.open("a" if self.records else "w", encoding="utf-8") as file:
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
            file.write(json.dumps(finite) + "\n")  # NaN would be no JSON
        self.records.append(record)
        shown = "  ".join(
            f"{key} {format_meter(key, value)}" for key, value in record.items() if key not in ("step", "tokens")
        )
        eta = (total_steps - step) * (now - self.started) / max(step, 1)
        print(f"{self.stage} {step}/{total_steps}  {shown}  eta {int(eta) // 60}:{int(eta) % 60:02d}", flush=True)
        self.logged_at, self.logged_tokens = time.monotonic(), self.tokens

    def add_losses(self, batch: MicroBatch, token_losses: torch.Tensor, targets: int) -> None:
        """Note the token_losses (B, T) of a micro-batch whose step has so many targets; waits for no device."""
        row_losses = token_losses.detach().sum(1)
        self.loss_sum += row_losses.sum() / targets
        self.losses_of_step.append((batch.rows, row_losses))

    def mean_loss(self) -> float:
        """Mean loss of the steps since the last call."""
        mean = float(self.loss_sum) / max(self.steps_begun - self.loss_from, 1)
        self.loss_sum, self.loss_from = torch.zeros((), device=self.device), self.steps_begun
        return mean

    def accept_step(self, grad_norm: torch.Tensor, dataset: PackedDataset) -> bool:
        """Whether a step may be taken: False for a non-finite gradient; ten of these in a row end the run."""
        losses_of_step, self.losses_of_step = self.losses_of_step, []
        if math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            losses = {
                row: float(loss) for rows, values in losses_of_step for row, loss in zip(rows, values, strict=True)
            }
            broken = [row for row, loss in losses.items() if not math.isfinite(loss)]
            where = dataset.describe((broken or list(losses))[0])
            raise InputError(
                f"loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, last at {where}; "
                "lower --learning_rate, or look at these rows"
            )
        return False

    def plot(self) -> None:
        """Draw the loss curve of the log into out/logs/<name>.png."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5))
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            points = [(r["tokens"], r[key]) for r in self.records if key in r]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=key, markersize=4, linewidth=1.2)
        axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=self.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.args.out_dir / "logs" / f"{self.name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)

    @contextmanager
    def save_on_interrupt(self, save: Callable[[], None]) -> Iterator[None]:
        """Ctrl-C keeps the weights learned so far; memory exhausted ends with the settings to try."""
        try:
            yield
        except KeyboardInterrupt:
            if self.steps_begun > 1:  # nothing was learned before: an earlier run's weights stay
                save()
            raise
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
                raise
            raise InputError(
                f"out of memory at batch size {self.batch_size}: try --batch_size {max(self.batch_size // 2, 1)} "
                f"--accumulation_steps {self.args.accumulation_steps * 2}, or a smaller --max_seq_len"
            ) from error


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 where the device is faster with it, else float32; float16 only where asked for."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    if name == "float16" and device.type == "cpu":
        raise UsageError("--dtype float16 needs a GPU; on a CPU use bfloat16 or float32")
    return DTYPES[name]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if words & {"amx_bf16", "bf16"}:  # Intel's matrix unit; ARM
        return True
    # Intel cores without the matrix unit have the instruction too, and are twice as slow with it as in float32.
    return {"avx512_bf16", "AuthenticAMD"} <= words


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory so far: the GPU's where there is one, else the process's resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def peak_expert_load(load: torch.Tensor) -> float:
    """Tokens of the busiest expert of any layer, over an even share: (layers, E) -> 1 (even) to E (all on one)."""
    return float((load / load.mean(-1, keepdim=True).clamp(min=1)).max())


def format_meter(key: str, value: float) -> str:
    if key == "lr":
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------------- the model


def given_sizes(args: argparse.Namespace) -> dict[str, int]:
    """The sizes that flags name, in place of a preset's."""
    flags = {key: getattr(args, key) for key in ("hidden_size", "num_hidden_layers", "use_moe")}
    return {key: value for key, value in flags.items() if value is not None}


def build_model(args: argparse.Namespace, tokenizer, run: Run) -> MiniMindForCausalLM:
    """A new model of the size that the flags name, or the weights of --from_weight, on the run's device, float32."""
    sizes = given_sizes(args)
    if args.from_weight == "none":
        config = MiniMindConfig.from_preset(args.preset or "minimind2-small", **sizes)
        config.original_max_position_embeddings = args.max_seq_len
        model = MiniMindForCausalLM(config)
    else:
        path = find_weights(args.out_dir, args.from_weight, preset=args.preset, **sizes)
        print(f"starting from {path}")
        model, info = load_model(path, preset=args.preset, config_overrides=sizes)
        run.tokens = run.logged_tokens = info.get("tokens_seen") or 0
        model.config.original_max_position_embeddings = max(info.get("trained_length") or 0, args.max_seq_len)
    check_vocab(tokenizer, model.config)
    run.name = weights_path(args.out_dir, run.stage, model.config).stem
    return model.to(run.device).train()


def maybe_compile(model: nn.Module, run: Run, total_steps: int) -> nn.Module:
    """torch.compile where it pays: on CUDA, and where its minute of compiling is won back."""
    wanted = run.args.use_compile
    compile_it = wanted == "1" or (wanted == "auto" and run.device.type == "cuda" and total_steps >= 500)
    return torch.compile(model) if compile_it else model


def save(model: nn.Module, run: Run, train_set: PackedDataset) -> Path:
    """Write out/<stage>_<hidden>[_moe].pth and its JSON."""
    path = weights_path(run.args.out_dir, run.stage, model.config)
    save_weights(
        model, path, stage=run.stage, tokens_seen=run.tokens, data_path=train_set.cache.meta["data_path"],
        data_hash=train_set.data_hash, trained_length=model.config.original_max_position_embeddings,
    )  # fmt: skip
    return path


# ------------------------------------------------------------------------------------------------- data and steps


def resolve_data(args: argparse.Namespace, default_name: str, demo_name: str) -> tuple[Path, Path | None]:
    """The training file and the held-out file (or None): the flags', else dataset/<default>, else the embedded data."""
    train = args.data_path or ROOT / "dataset" / default_name
    if args.data_path is None and not train.exists():
        from scripts.make_demo_data import ensure_demo_data

        train = ensure_demo_data() / demo_name
        print(f"dataset/{default_name} is not there: training on the embedded data, {train}")
    held_out = train.with_name(f"{train.stem}_val{train.suffix}")
    return train, args.val_path or (held_out if held_out.exists() else None)


def micro_batches(dataset: PackedDataset, run: Run, rows: list[list[int]]) -> Iterator[MicroBatch]:
    """Load the named rows, a list of numbers for each micro-batch, onto the run's device."""
    loader = DataLoader(
        dataset, batch_sampler=rows, num_workers=run.args.num_workers, pin_memory=run.device.type == "cuda"
    )
    for numbers, batch in zip(rows, loader, strict=True):
        tokens, targets = int((batch["attention_mask"] > 0).sum()), int((batch["labels"] != -100).sum())
        inputs = {key: value.to(run.device, non_blocking=True) for key, value in batch.items()}
        yield MicroBatch(numbers, inputs, tokens, targets)


def batch_rows(dataset: PackedDataset, batch_size: int) -> list[list[int]]:
    return [list(range(i, min(i + batch_size, len(dataset)))) for i in range(0, len(dataset), batch_size)]


def count_steps(dataset: PackedDataset, run: Run) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = math.ceil(len(batch_rows(dataset, run.batch_size)) / run.args.accumulation_steps)
    return run.args.max_steps or per_epoch * run.args.epochs


def training_steps(dataset: PackedDataset, run: Run, total_steps: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield (step, its micro-batches) for steps 1 ... total_steps, epoch after epoch.

    The last step of an epoch takes the micro-batches that are left, so none leaks into the next epoch.
    """
    step, epoch = 0, 0
    run.logged_at = time.monotonic()  # loading and tokenising are no training time
    while True:
        dataset.set_epoch(epoch)
        batches = micro_batches(dataset, run, batch_rows(dataset, run.batch_size))
        while window := list(islice(batches, run.args.accumulation_steps)):
            step += 1
            run.tokens += sum(batch.tokens for batch in window)
            run.steps_begun = step
            yield step, window
            if step == total_steps:
                return
        epoch += 1


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_ratio: float, decay_ratio: float = DECAY_RATIO
) -> float:
    """Warm-up, flat, then linear to zero over the last decay_ratio of the steps (arXiv 2405.18392); step 1, 2, ..."""
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    decay_steps = math.ceil(decay_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if step <= total_steps - decay_steps:
        return peak
    return peak * (total_steps - step + 1) / decay_steps


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def is_due(step: int, interval: int | None, total_steps: int) -> bool:
    """Every `interval` steps, ten times a run where none is given, and always at the end."""
    interval = interval or max(total_steps // 10, 1)
    return step % interval == 0 or step == total_steps


@torch.no_grad()
def evaluate(
    model: nn.Module, val_set: PackedDataset, run: Run, loss_sum: Callable, tokenizer, whole: bool = True
) -> dict[str, float]:
    """Held-out loss (nats per target) and bits per byte of the targets' text; loss_sum(model, inputs) gives nats.

    Over the whole held-out set, or (so that it costs little during a run) its first --eval_rows rows.
    """
    began = time.monotonic()
    model.eval()
    rows = batch_rows(val_set, run.batch_size)
    if not whole:
        rows = rows[: math.ceil(run.args.eval_rows / run.batch_size)]
    bytes_of = token_byte_counts(tokenizer).to(run.device)
    nats = targets = n_bytes = 0
    for batch in micro_batches(val_set, run, rows):
        with run.autocast():
            nats += float(loss_sum(model, batch.inputs))
        labels = batch.inputs["labels"]
        targets, n_bytes = targets + batch.targets, n_bytes + int(bytes_of[labels[labels != -100]].sum())
    model.train()
    run.logged_at += time.monotonic() - began  # not training time: left out of tokens/s
    return {"val_loss": nats / max(targets, 1), "val_bpb": nats / math.log(2) / max(n_bytes, 1)}
