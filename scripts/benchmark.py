"""What training, replies and reinforcement learning cost on this machine.

python scripts/benchmark.py train       scripts/benchmark_train.py says what is measured
python scripts/benchmark.py generate    scripts/benchmark_generate.py likewise
python scripts/benchmark.py rl          scripts/benchmark_rl.py likewise
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import run_script
from scripts.benchmark_generate import __doc__ as generate_doc
from scripts.benchmark_generate import add_generate_flags, benchmark_generate
from scripts.benchmark_rl import __doc__ as rl_doc
from scripts.benchmark_rl import add_rl_flags, benchmark_rl
from scripts.benchmark_train import __doc__ as train_doc
from scripts.benchmark_train import add_train_flags, benchmark_train


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=train_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="training steps", description=train_doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_train_flags(train)
    generate = commands.add_parser(
        "generate", help="prefill and decoding, beside transformers' generate and llama.cpp",
        description=generate_doc, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_generate_flags(generate)
    rl = commands.add_parser(
        "rl", help="steps of reinforcement learning, and their rollouts beside transformers' generate",
        description=rl_doc, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_rl_flags(rl)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--against" in argv[:-1]:  # argparse takes a value that looks like a flag only behind "="
        place = argv.index("--against")
        argv[place : place + 2] = [f"--against={argv[place + 1]}"]
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command == "train":  # the last of a flag's values counts: the second setting is the first with more flags
        args.other = parser.parse_args([*argv, *shlex.split(args.against)]) if args.against is not None else None
    return args


def main(args: argparse.Namespace) -> None:
    {"train": benchmark_train, "generate": benchmark_generate, "rl": benchmark_rl}[args.command](args)


if __name__ == "__main__":
    run_script(parse_args, main)
