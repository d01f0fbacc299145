"""The flags that every training script has."""

import argparse
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from model.errors import UsageError
from model.LMConfig import PRESETS
from trainer.runtime.devices import DTYPES

ROOT = Path(__file__).resolve().parents[2]
DECAY_RATIO = 0.4  # share of the steps in which the learning rate falls
MAX_SEED = 2**32 - 1  # numpy takes no larger one


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


SWITCH = {"type": boolean, "nargs": "?", "const": True}
COUNT = number(int, 1)


def common_parser(doc: str, data: str, from_weight: str, epochs: int, lr: dict[str, float]) -> argparse.ArgumentParser:
    """The flags that every training script has; `lr` is the default peak learning rate by optimizer."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.set_defaults(default_learning_rates=lr)
    add_file_flags(parser.add_argument_group("files"), data, from_weight)
    add_model_flags(parser.add_argument_group("model"))
    add_training_flags(parser.add_argument_group("training"), epochs, lr)
    add_machine_flags(parser.add_argument_group("machine"))
    add_output_flags(parser.add_argument_group("output"))
    return parser


def add_file_flags(group, data: str, from_weight: str) -> None:
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
    group.add_argument(
        "--from_resume", default=False, **SWITCH, help="1: go on where an interrupted run of this stage was last saved"
    )


def add_model_flags(group) -> None:
    group.add_argument(
        "--preset", choices=PRESETS, help="a published size (default: minimind2-small, or that of --from_weight)"
    )
    group.add_argument("--hidden_size", type=COUNT, help="width, in place of the preset's")
    group.add_argument("--num_hidden_layers", type=COUNT, help="depth, in place of the preset's")
    group.add_argument("--use_moe", **SWITCH, help="mixture of experts, in place of the preset's choice")


def add_training_flags(group, epochs: int, lr: dict[str, float]) -> None:
    group.add_argument("--max_seq_len", type=number(int, 8), default=512, help="tokens in a row (default: %(default)s)")
    group.add_argument(
        "--packing", default=True, **SWITCH, help="0: one document a row, padded (default: 1, packed rows)"
    )
    group.add_argument("--epochs", type=COUNT, default=epochs, help=f"passes over the data (default: {epochs})")
    group.add_argument("--max_steps", type=COUNT, help="optimizer steps, in place of --epochs")
    group.add_argument(
        "--batch_size", type=COUNT, help="rows of a micro-batch of one process (default: 32, 4 on a CPU)"
    )
    group.add_argument(
        "--accumulation_steps", type=COUNT, help="micro-batches of a step (default: 1; 2 with a CPU's default batch)"
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
    first = next(iter(lr))
    group.add_argument("--optimizer", choices=list(lr), help=f"default: {first}; adamw with --deepspeed")
    group.add_argument(
        "--seed", type=number(int, 0, MAX_SEED), default=42, help="of weights and data order (default: 42)"
    )


def add_machine_flags(group) -> None:
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the matrix products (default: auto, bfloat16 where it is faster)",
    )
    group.add_argument(
        "--num_workers",
        type=number(int, 0),
        help="processes that prepare batches (default: 1 with CUDA on Linux, else 0)",
    )
    group.add_argument(
        "--use_compile",
        choices=["0", "1", "auto"],
        default="auto",
        help="torch.compile (default: auto, on CUDA where what is left is worth its time)",
    )
    group.add_argument("--deterministic", **SWITCH, default=False, help="bit-equal repeats on CUDA too, slower")
    group.add_argument(
        "--deepspeed", nargs="?", const="default", metavar="CONFIG",
        help="train through DeepSpeed with this JSON, or bare with ZeRO stage 1; start with `deepspeed --num_gpus N`",
    )  # fmt: skip
    group.add_argument(
        "--exchange_dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the gradients that cross between processes: bfloat16 is half as much for a slow network",
    )  # fmt: skip
    group.add_argument("--deepspeed_config", metavar="CONFIG", help="the same as --deepspeed CONFIG")
    # The deepspeed launcher passes the one, torch.distributed.launch the other.
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def add_output_flags(group) -> None:
    group.add_argument("--log_interval", type=COUNT, default=10, help="steps between log lines (default: 10)")
    group.add_argument("--eval_interval", type=COUNT, help="steps between evaluations (default: ten times a run)")
    group.add_argument(
        "--eval_rows", type=COUNT, default=128, help="held-out rows of an evaluation; the last takes all (default: 128)"
    )
    group.add_argument(
        "--save_interval", type=COUNT, help="steps between saves of weights and checkpoint (default: ten times a run)"
    )
    group.add_argument(
        "--use_wandb", **SWITCH, default=False, help="send the log to SwanLab too; offline where nobody is logged in"
    )
    group.add_argument("--wandb_project", default="MiniMind", help="project name there (default: MiniMind)")
    group.add_argument(
        "--trace_samples", **SWITCH, default=False,
        help="write the rows that each process takes in each step to out/logs/NAME_samples.RANK.jsonl",
    )  # fmt: skip
    group.add_argument(
        "--verify_resume", **SWITCH, default=False,
        help="check on this machine that a killed and resumed run ends with the same bits, in a folder of its own",
    )  # fmt: skip
    group.add_argument("--debug", **SWITCH, default=False, help="show tracebacks of errors")


def add_weight_flags(parser: argparse.ArgumentParser, stage: str, stages: list[str]) -> None:
    """Which weights a script that does not train reads, and on what it computes."""
    group = parser.add_argument_group("weights")
    group.add_argument("--stage", choices=stages, default=stage, help=f"whose weights (default: {stage})")
    group.add_argument("--weight", type=Path, help="a .pth file or a transformers folder, in place of a stage's newest")
    group.add_argument("--out_dir", type=Path, default=ROOT / "out", help="where the weights are (default: out/)")
    group.add_argument("--tokenizer_path", type=Path, help="folder (default: the one beside the weights, else model/)")
    group.add_argument("--preset", choices=PRESETS, help="size of the weights to look for (default: the newest)")
    group.add_argument("--hidden_size", type=COUNT, help="width of the weights to look for")
    group.add_argument("--num_hidden_layers", type=COUNT, help="depth that the weights must have")
    group.add_argument("--use_moe", **SWITCH, help="look for a mixture of experts")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the weights (default: auto)")
    group.add_argument("--debug", **SWITCH, default=False, help="show tracebacks of errors")


def choose_defaults(args: argparse.Namespace, device: torch.device) -> None:
    """Fill in the flags whose default depends on the device or on other flags."""
    if args.deepspeed_config is not None:
        if args.deepspeed not in (None, "default", args.deepspeed_config):
            raise UsageError(
                f"--deepspeed {args.deepspeed} and --deepspeed_config {args.deepspeed_config}: give one file"
            )
        args.deepspeed = args.deepspeed_config
    on_cpu = device.type == "cpu"
    if args.accumulation_steps is None:
        args.accumulation_steps = 2 if on_cpu and args.batch_size is None else 1
    args.batch_size = args.batch_size or (4 if on_cpu else 32)
    if args.num_workers is None:
        forked = multiprocessing.get_start_method() == "fork"  # a process that is spawned imports torch anew, each time
        args.num_workers = int(device.type == "cuda" and forked)
    rates = args.default_learning_rates
    if args.deepspeed and args.optimizer == "muon":
        raise UsageError(
            "--optimizer muon needs whole matrices, which ZeRO cuts up: use --optimizer adamw with --deepspeed"
        )
    if args.deepspeed and args.exchange_dtype != "float32":
        raise UsageError("--exchange_dtype is not DeepSpeed's: write communication_data_type into the --deepspeed JSON")
    args.optimizer = args.optimizer or ("adamw" if args.deepspeed else next(iter(rates)))
    if args.learning_rate is None:  # 0 counts as given
        args.learning_rate = rates[args.optimizer]
