"""Measure what a training step costs: real tokens/s, padding, matmul share, MFU, memory. And what a reply costs:

    python scripts/benchmark.py generate --help

    python scripts/benchmark.py train
    python scripts/benchmark.py train --preset minimind2-moe --batch_size 2 --against "--active_dense"
    python scripts/benchmark.py train --data_path my.jsonl --against "--plain" --json out/benchmark.json
    python scripts/benchmark.py train --profile

tokens/s       real tokens: padding is never counted.
matmul share   time of the model's own matrix products / time of the step. The products (of each linear layer forward
               and twice backward, the head over its targets alone, Q K^T and P V over whole rows) are each timed alone
               at the step's shapes and precision, once for every step that is timed, and the share is the median of
               these rounds. Norms, softmax, data, the optimizer with its products: overhead.
MFU            flops of those products / (time of the step * the machine's peak): the published bfloat16 peak of the
               GPU, or the best rate that any product reached here, where none is known.
memory         the most that was allocated at once in a step, weights and optimizer included.

Memory does not grow with vocabulary times tokens; see for yourself at two sizes of each:

    python scripts/benchmark.py train --batch_size 4 --vocab_size 6400 --against "--vocab_size 51200"
    python scripts/benchmark.py train --batch_size 16 --vocab_size 6400 --against "--vocab_size 51200"
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reads it once: no lines about its start and end

import torch
import torch.nn.functional as F

from dataset.demo_data import ensure_demo_data
from dataset.lm_dataset import IGNORED, PretrainDataset, SFTDataset
from model.errors import UsageError
from model.LMConfig import PRESETS, MiniMindConfig
from model.loading import load_tokenizer
from model.loss import LOSS_CHUNK
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.devices import DTYPES, pick_device, pick_dtype, synchronize
from trainer.runtime.flags import COUNT, ROOT, SWITCH, number
from trainer.runtime.optimizers import build_optimizer

# Published peaks of dense bfloat16 products with float32 sums, in TFLOP/s; the first name that occurs in the GPU's.
GPU_PEAKS = {
    "B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362,
    "A6000": 155, "A40": 150, "A10G": 70, "A10": 125, "A30": 165, "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97,
    "RTX 3090": 71, "RTX 3080": 60, "L40": 181, "L4": 121,
}  # fmt: skip
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # of the square product that stands for the peak where none is published


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=PRESETS, default="minimind2-small", help="default: minimind2-small")
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
        group.add_argument(f"--{name}", type=COUNT, help="in place of the preset's")
    group.add_argument("--use_moe", **SWITCH, help="mixture of experts, in place of the preset's choice")
    group.add_argument(
        "--active_dense",
        **SWITCH,
        default=False,
        help="a dense model with as many parameters as a mixture uses at once",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--stage", choices=["pretrain", "sft"], default="pretrain", help="format of the data")
    group.add_argument("--data_path", type=Path, help="JSON lines (default: the embedded demo data)")
    group.add_argument("--max_seq_len", type=number(int, 8), default=512, help="tokens in a row (default: 512)")
    group.add_argument("--batch_size", type=COUNT, help="rows of a micro-batch (default: 32, 4 on a CPU)")
    group.add_argument("--accumulation_steps", type=COUNT, help="micro-batches of a step (default: 1, 2 on a CPU)")
    group.add_argument("--packing", **SWITCH, default=True, help="0: one document a row, padded (default: 1)")
    group.add_argument("--optimizer", choices=["muon", "adamw"], default="muon", help="default: muon")
    group.add_argument(
        "--plain", **SWITCH, default=False,
        help="the plain loop, whatever the flags above say: float32, eager, one document a padded row, "
        "all logits in float32 at once, torch.optim.AdamW",
    )  # fmt: skip
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the products (default: auto)")
    group.add_argument("--use_compile", **SWITCH, default=False, help="torch.compile (default: 0)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--steps", type=COUNT, default=5, help="steps that are timed (default: 5)")
    group.add_argument("--warmup", type=number(int, 1), default=2, help="steps before these (default: 2)")
    group.add_argument(
        "--against", metavar="FLAGS", help='a second setting, step by step in turn: these flags on top, as "--plain"'
    )
    group.add_argument("--profile", **SWITCH, default=False, help="print where a step's time goes, by operator")
    group.add_argument("--json", type=Path, help="write the figures to this file too")
    group.add_argument("--seed", type=number(int, 0), default=42, help="of weights and data order (default: 42)")
    group.add_argument("--out_dir", type=Path, default=ROOT / "out", help="where the token cache lies (default: out/)")
    group.add_argument("--debug", **SWITCH, default=False, help="show tracebacks of errors")


# ------------------------------------------------------------------------------------------------- what is measured


class Step(NamedTuple):
    """What one step was: its time, and tokens over all its micro-batches."""

    seconds: float
    tokens: int  # real ones
    places: int  # padding included
    targets: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Trainer:
    """A model in training: the loop of trainer/train_pretrain.py without its log, or the plain loop."""

    def __init__(self, args: argparse.Namespace):
        if args.plain:
            args.dtype, args.use_compile, args.packing, args.optimizer = "float32", False, False, "adamw"
        self.args, self.device = args, pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        on_cpu = self.device.type == "cpu"
        self.accumulation = args.accumulation_steps or (2 if on_cpu and not args.batch_size else 1)
        self.batch_size = args.batch_size or (4 if on_cpu else 32)
        self.config = make_config(args)
        torch.manual_seed(args.seed)
        self.model = MiniMindForCausalLM(self.config).to(self.device).train()
        self.net = torch.compile(self.model) if args.use_compile else self.model
        if args.plain:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            rate = {"muon": 3e-3, "adamw": 1e-3}[args.optimizer]
            self.optimizer = build_optimizer(self.model, args.optimizer, rate, 0.1, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = self.endless_batches()
        self.warm_seconds = 0.0

    def endless_batches(self):
        """Yield micro-batches, tensors (B, T), epoch after epoch."""
        args, tokenizer = self.args, load_tokenizer()
        if len(tokenizer) > self.config.vocab_size:
            raise UsageError(f"--vocab_size {self.config.vocab_size} is too small: the tokenizer has {len(tokenizer)}")
        path = args.data_path or ensure_demo_data() / f"{args.stage}.jsonl"
        dataset_class = PretrainDataset if args.stage == "pretrain" else SFTDataset
        dataset = dataset_class(
            path, tokenizer, args.max_seq_len, args.out_dir / "cache", packing=args.packing, seed=args.seed
        )
        if len(dataset) < self.batch_size:
            raise UsageError(f"{path} makes {len(dataset)} rows: give more data or a --batch_size of at most that")
        for epoch in count():
            dataset.set_epoch(epoch)
            for start in range(0, len(dataset) - self.batch_size + 1, self.batch_size):
                rows = [dataset[row] for row in range(start, start + self.batch_size)]
                yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def loss_sum(self, inputs: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        """Loss over the targets of a micro-batch, summed, and its share of the experts' balance loss -> scalar."""
        if self.args.plain:
            logits = self.net(inputs["input_ids"]).logits.float()  # (B, T, V); padding stands behind, nobody sees it
            labels = inputs["labels"][:, 1:].flatten()
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
        output = self.net(**inputs, return_logits=False)
        loss = output.token_losses.sum()
        return loss if output.aux_loss is None else loss + output.aux_loss * share

    def step(self) -> Step:
        """One optimizer step, data included."""
        synchronize(self.device)
        began = time.perf_counter()
        window = [next(self.batches) for _ in range(self.accumulation)]
        tokens = sum(int((batch["attention_mask"] > 0).sum()) for batch in window)
        targets = sum(int((batch["labels"] != IGNORED).sum()) for batch in window)
        for batch in window:
            inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            half = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
                loss = self.loss_sum(inputs, targets / len(window)) / targets
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        places = self.batch_size * self.args.max_seq_len * self.accumulation
        return Step(time.perf_counter() - began, tokens, places, targets)

    def warm_up(self) -> Step:
        """Steps that are not counted; the first one holds the compiling. Returns the last."""
        began = time.perf_counter()
        steps = [self.step() for _ in range(self.args.warmup)]
        self.warm_seconds = time.perf_counter() - began
        return steps[-1]

    def peak_memory(self) -> int:
        """The most bytes that were allocated at once in a step, with the weights and the optimizer's numbers."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return torch.cuda.max_memory_allocated(self.device)
        held = [*self.model.parameters()]
        held += [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        with torch.profiler.profile(profile_memory=True) as profile:
            self.step()
        changes = (event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
        now = most = 0
        for change in changes:
            now += change
            most = max(most, now)
        return most + sum(x.nbytes for x in held)


def make_config(args: argparse.Namespace) -> MiniMindConfig:
    flags = {
        key: getattr(args, key)
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "use_moe")
    }
    given = {key: value for key, value in flags.items() if value is not None}
    config = MiniMindConfig.from_preset(args.preset, **given)
    if not args.active_dense:
        return config
    if not config.use_moe:
        raise UsageError("--active_dense needs a mixture to compare with: --preset minimind2-moe or --use_moe 1")
    used = config.num_experts_per_tok + config.n_shared_experts
    given |= {"use_moe": False, "intermediate_size": used * config.intermediate_size}
    return MiniMindConfig.from_preset(args.preset, **given)


def active_parameters(model: MiniMindForCausalLM) -> int:
    """Parameters that one token meets: of the routed experts only the chosen number."""
    config = model.config
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts
    return sum(p.numel() for p in model.parameters()) - round(routed * idle)


# ------------------------------------------------------------------------------------------- the products of a model


class Product(NamedTuple):
    """`batch` products of (n, k) by (k, m); layout: which operand lies transposed in memory."""

    batch: int
    n: int
    k: int
    m: int
    layout: str  # "nn", "nt" or "tn"

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.n * self.k * self.m


def linear_products(tokens: int, inputs: int, outputs: int) -> list[Product]:
    """x W^T; backward grad W and grad^T x."""
    return [
        Product(1, tokens, inputs, outputs, "nt"),
        Product(1, tokens, outputs, inputs, "nn"),
        Product(1, outputs, tokens, inputs, "tn"),
    ]


def model_products(config: MiniMindConfig, rows: int, length: int, targets: int) -> Counter[Product]:
    """How often each product occurs in a forward and backward pass over (rows, length) places with so many targets."""
    layer, tokens = Counter(), rows * length
    D, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_size = rows * config.num_attention_heads, config.num_key_value_heads * d
    for outputs in (D, D, kv_size, kv_size):  # q, o, k, v
        layer.update(linear_products(tokens, D, outputs))
    scores, mixed = Product(heads, length, d, length, "nt"), Product(heads, length, length, d, "nn")
    layer.update([scores, scores, mixed, mixed, *[Product(heads, length, length, d, "tn")] * 2])
    experts = [tokens]  # tokens that each feed-forward network sees
    if config.use_moe:
        layer.update(linear_products(tokens, D, config.n_routed_experts))
        share = tokens * config.num_experts_per_tok // config.n_routed_experts
        experts = [tokens] * config.n_shared_experts + [share] * config.n_routed_experts
    for seen in experts:
        for sizes in ((D, inner), (D, inner), (inner, D)):
            layer.update(linear_products(seen, *sizes))
    products = Counter({product: times * config.num_hidden_layers for product, times in layer.items()})
    for start in range(0, targets, LOSS_CHUNK):  # the head, as the loss takes it
        products.update(linear_products(min(LOSS_CHUNK, targets - start), D, config.vocab_size))
    return products


def time_product(product: Product, dtype: torch.dtype, device: torch.device, repeats: int = 3) -> float:
    """Median seconds of a product alone, warm, into memory that is there."""
    batch, n, k, m, layout = product
    a = torch.randn(batch, *((k, n) if layout[0] == "t" else (n, k)), dtype=dtype, device=device)
    b = torch.randn(batch, *((m, k) if layout[1] == "t" else (k, m)), dtype=dtype, device=device)
    a, b = a.mT if layout[0] == "t" else a, b.mT if layout[1] == "t" else b
    if batch == 1:
        a, b = a[0], b[0]
    out = a @ b
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        torch.matmul(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


class Roofline:
    """The products of a step with so many targets, each timed alone in every round, as the step is."""

    def __init__(self, trainer: Trainer, targets: int) -> None:
        self.dtype, self.device, accumulation = trainer.dtype, trainer.device, trainer.accumulation
        products = model_products(
            trainer.config, trainer.batch_size, trainer.args.max_seq_len, max(targets // accumulation, 1)
        )
        self.counts = Counter({product: times * accumulation for product, times in products.items()})
        size = PEAK_SIZE.get(self.device.type, 2048)
        self.square = Product(1, size, size, size, "nn")
        self.rounds: list[dict[Product, float]] = []

    @torch.no_grad()
    def measure(self) -> None:
        """One more round."""
        products = [*self.counts, self.square]
        self.rounds.append({product: time_product(product, self.dtype, self.device) for product in products})

    @property
    def flops(self) -> int:
        return sum(product.flops * times for product, times in self.counts.items())

    @property
    def seconds(self) -> list[float]:
        """Of all products of a step, round by round."""
        return [sum(alone[product] * times for product, times in self.counts.items()) for alone in self.rounds]

    @property
    def best_rate(self) -> float:
        """The most flop/s that one of the products reached."""
        return max(product.flops / seconds for alone in self.rounds for product, seconds in alone.items())


def published_peak(device: torch.device) -> float | None:
    """flop/s of a GPU that the table knows."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in GPU_PEAKS.items() if key in name), None)


# -------------------------------------------------------------------------------------------------------- the report


def figures(trainer: Trainer, steps: list[Step], roofline: Roofline) -> dict[str, float]:
    """All that is reported of one setting."""
    seconds = statistics.median(step.seconds for step in steps)
    places, tokens = sum(step.places for step in steps), sum(step.tokens for step in steps)
    shares = [products / step.seconds for products, step in zip(roofline.seconds, steps, strict=True)]
    peak = published_peak(trainer.device) or roofline.best_rate
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "active_parameters": active_parameters(trainer.model),
        "tokens_per_s": statistics.median(step.rate for step in steps),
        "padding_share": 1 - tokens / places,
        "step_s": seconds,
        "matmul_s": statistics.median(roofline.seconds),
        "matmul_share": statistics.median(shares),
        "mfu": roofline.flops / seconds / peak,
        "peak_tflops": peak / 1e12,
        "peak_memory_mb": trainer.peak_memory() / 2**20,
        "warmup_s": trainer.warm_seconds,
    }


def compare(first: list[Step], second: list[Step]) -> dict[str, float]:
    """Tokens/s of the first setting over those of the second, round by round."""
    ratios = [a.rate / b.rate for a, b in zip(first, second, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def print_table(columns: list[dict[str, float]]) -> None:
    for key in columns[0]:
        cells = (f"{c[key]:,}" if isinstance(c[key], int) else f"{c[key]:,.3f}" for c in columns)
        print(f"{key:18s}" + "".join(f"{cell:>16s}" for cell in cells))


def print_profile(trainer: Trainer) -> None:
    """The operators that take most of a step, by their own time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if trainer.device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profile:
        trainer.step()
    order = f"self_{trainer.device.type if trainer.device.type == 'cuda' else 'cpu'}_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def settings(args: argparse.Namespace) -> dict:
    return {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "other"
    }


def benchmark_train(args: argparse.Namespace) -> None:
    # 1. Build the settings and warm them up
    trainers = [Trainer(each) for each in (args, args.other) if each is not None]
    rooflines = [Roofline(trainer, trainer.warm_up().targets) for trainer in trainers]

    # 2. Time steps and products in turn: what else the machine does meets them all
    steps: list[list[Step]] = [[] for _ in trainers]
    for _ in range(args.steps):
        for trainer, own in zip(trainers, steps, strict=True):
            own.append(trainer.step())
        for roofline in rooflines:
            roofline.measure()

    # 3. Report
    columns = [figures(*each) for each in zip(trainers, steps, rooflines, strict=True)]
    print_table(columns)
    report = {"torch": torch.__version__, "device": str(trainers[0].device), "threads": torch.get_num_threads()}
    report |= {"settings": [settings(trainer.args) for trainer in trainers], "figures": columns}
    if args.other:
        report["against"] = compare(*steps)
        spread = "{ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f})".format(**report["against"])
        print(f"tokens/s over those with {args.against}: {spread}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.profile:
        for trainer in trainers:
            print_profile(trainer)
