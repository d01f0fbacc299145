"""LoRA fine-tuning: a thin adapter learns a task, the weights of the model stay as they are (arXiv 2106.09685).

    W' = W + (alpha / r) B A        W frozen; A (r, in) starts as normal(0, 0.02), B (out, r) as zero
    loss = - 1/N sum_t m_t log p(x_t | x_<t)      over the assistant's words, as in train_full_sft.py

Deviations: A is not Kaiming-uniform and alpha is r (so the product counts once), both as in the public MiniMind files;
no dropout before A. The frozen base computes as in evaluation. A mixture's balance loss is left out: its router is
frozen too.

The data are dataset/<lora_name>.jsonl, the adapter is out/lora/<lora_name>_<hidden>.pth: LoRA tensors alone. Small
files are learned in small steps: without --batch_size an epoch has at least 20.

    python trainer/train_lora.py
    python trainer/train_lora.py --lora_name lora_medical --lora_rank 16 --lora_targets all
    torchrun --nproc_per_node 2 trainer/train_lora.py --lora_name my_lora --data_path my_chats.jsonl
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import SFTDataset
from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import TRAINED_BY, find_weights
from model.model_lora import DEFAULT_RANK, DEFAULT_TARGETS, attach, save_lora, target_names
from trainer.runtime.distributed import world_size
from trainer.runtime.evaluation import token_loss
from trainer.runtime.flags import COUNT, ROOT, common_parser, number
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training, weights_file_hash

EMBEDDED = ("lora_identity", "lora_medical")  # adapters that dataset/demo/ has data for
MIN_STEPS = 20  # of an epoch


def adapter_name(text: str) -> str:
    """For argparse: a name for files, and not that of another stage, whose log and checkpoint it would replace."""
    if not re.fullmatch(r"\w[\w.-]*", text) or text in TRAINED_BY:
        raise argparse.ArgumentTypeError(f"{text!r} is no name for an adapter: take one such as lora_identity")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "LORA_NAME.jsonl", "full_sft", 4, lr={"adamw": 2e-3, "muon": 2e-3})
    group = parser.add_argument_group("LoRA")
    told = f"of the adapter and its data file (default: {EMBEDDED[0]})"
    group.add_argument("--lora_name", type=adapter_name, default=EMBEDDED[0], help=told)
    group.add_argument("--lora_rank", type=COUNT, default=DEFAULT_RANK, help=f"r (default: {DEFAULT_RANK})")
    group.add_argument("--lora_alpha", type=number(float, 1e-6), help="the product counts alpha / r times (default: r)")
    group.add_argument(
        "--lora_targets", nargs="+", default=DEFAULT_TARGETS, metavar="NAME",
        help="linear layers with an adapter: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, or all "
        f"(default: {' '.join(DEFAULT_TARGETS)})",
    )  # fmt: skip
    return parser.parse_args(argv)


def check_start(args: argparse.Namespace) -> None:
    """Say what to do where an adapter has no weights to stand on, or no data: not given, not there, not embedded."""
    if args.from_weight == "none":
        raise UsageError("--from_weight none: an adapter is of no use without the weights that it was trained on")
    path = ROOT / "dataset" / f"{args.lora_name}.jsonl"
    if args.data_path is None and not path.exists() and args.lora_name not in EMBEDDED:
        raise InputError(
            f"{path} does not exist: put conversations there or give a file with --data_path "
            f"(embedded data are there for {' and '.join(EMBEDDED)})"
        )


def base_of(args: argparse.Namespace, config: MiniMindConfig, run: Run) -> tuple[Path, str]:
    """The weights below the adapter and their hash; where a resumed run's are gone, the hash that they had."""
    path = find_weights(args.out_dir, args.from_weight, hidden_size=config.hidden_size, use_moe=config.use_moe)
    if run.checkpoint and not path.exists():
        return path, run.checkpoint["identity"]["hash of the base weights"]
    return path, weights_file_hash(path)


def take_small_steps(run: Run, rows: int) -> None:
    """Fewer rows in a step where an epoch of a small file would have fewer than MIN_STEPS steps."""
    per_step = max(rows // MIN_STEPS // world_size(), 1)
    if per_step < run.batch_size * run.args.accumulation_steps:
        run.batch_size = run.args.batch_size = min(run.batch_size, per_step)
        run.args.accumulation_steps = per_step // run.batch_size


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute; what to adapt
    targets = target_names(args.lora_targets)
    check_start(args)
    free = args.batch_size is None and args.accumulation_steps is None
    run = Run(args, args.lora_name, folder="lora")

    # 2. Tokenizer, the model, and an adapter on it: from here on nothing else trains
    model = build_model(run)
    alpha = args.lora_alpha or float(args.lora_rank)
    attach(model, args.lora_rank, alpha, targets)
    base, base_hash = base_of(args, model.config, run)
    run.settings = {
        "--lora_rank": args.lora_rank, "--lora_alpha": alpha, "--lora_targets": " ".join(targets),
        "hash of the base weights": base_hash,
    }  # fmt: skip
    write = partial(save_lora, base={"name": base.name, "hash": base_hash})

    # 3. Data: packed rows of whole conversations, labels on the answers
    train_set, val_set = open_data(SFTDataset, f"{args.lora_name}.jsonl", f"{args.lora_name}.jsonl", run)
    if free:
        take_small_steps(run, len(train_set))
    run.plan(model, train_set)

    # 4. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(model, run)
    with run.training({"model": engine}, train_set, val_set, token_loss, run.tokenizer, write=write) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                output = engine(**batch.inputs, return_logits=False)
                loss = output.token_losses.sum() / step.targets
                step.note(batch, output, output.token_losses)
                engine.backward(loss)  # reaches the adapter alone
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}; try: python eval_model.py --weight {base} --lora_name {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
