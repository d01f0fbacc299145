"""Reasoning distillation: fine-tuning on worked answers of a stronger model, with the tags that frame them weighted.

    loss = - 1/W sum_t w_t log p(x_t | x_<t)      w_t = 0 outside the assistant's turns, inside
                                                  tag_weight (10) on <think> </think> <answer> </answer>, else 1
                                                  W = sum of w_t over the whole optimizer step, all micro-batches

An answer reads <think> ... </think> <answer> ... </answer>. Four tokens carry that form among hundreds, and an answer
that misses one is lost; the weight makes a small model keep to it. All else is as in train_full_sft.py. A tag counts
where it is a token of its own and a target: one that a user writes is none. The model starts from the rlhf weights,
else from full_sft. An answer that is longer than --max_seq_len loses its end, and with it tags and result: rows take
1024 tokens here, the length that r1_mix_1024.jsonl is made for (packing fills them whatever the length).

    python trainer/train_distill_reason.py
    python trainer/train_distill_reason.py --data_path my_thoughts.jsonl --from_weight full_sft --tag_weight 5
    python trainer/train_distill_reason.py --help
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.chat import plain_text_backend
from dataset.lm_dataset import IGNORED, SFTDataset
from model.errors import InputError
from model.loading import find_weights, load_tokenizer
from trainer.runtime.flags import common_parser, number
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run, run_training, save
from trainer.runtime.start import build_model, given_sizes, make_engine, open_data
from trainer.runtime.steps import (
    MicroBatch,
    count_steps,
    evaluate,
    expert_meters,
    is_due,
    learning_rate_at,
    set_learning_rate,
    training_steps,
)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
START = "rlhf, else full_sft"


def token_weights(labels: Tensor, tag_ids: list[int], tag_weight: float) -> Tensor:
    """0 where labels are -100, tag_weight where they are one of the tags, else 1: (..., T) -> (..., T) float32."""
    weights = (labels != IGNORED).float()
    weights[torch.isin(labels, torch.tensor(tag_ids, dtype=labels.dtype))] = tag_weight
    return weights


class ReasonDataset(SFTDataset):
    """Chat rows with a weight beside each label; the loss is a mean over the weights."""

    def __init__(self, *args, tag_ids: list[int], tag_weight: float):
        super().__init__(*args)
        self.tag_ids, self.tag_weight = tag_ids, tag_weight

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        return {**row, "weights": token_weights(row["labels"], self.tag_ids, self.tag_weight)}

    def count_targets(self, batch: dict[str, Tensor]) -> float:
        return float(batch["weights"].sum(dtype=torch.float64))


def find_tags(tokenizer: PreTrainedTokenizerBase, tag_weight: float) -> list[int]:
    """The ids of the tags, each a single token; without a weight on them (1) it does not matter how they are cut."""
    backend = plain_text_backend(tokenizer)  # as rows are read
    ids = [backend.encode(tag, add_special_tokens=False).ids for tag in TAGS]
    missing = [tag for tag, pieces in zip(TAGS, ids, strict=True) if len(pieces) != 1]
    if tag_weight == 1:
        return []
    if missing:
        raise InputError(
            f"in the tokenizer {tokenizer.name_or_path} these are no single tokens, which could be weighted: "
            f"{', '.join(missing)}; use the shipped tokenizer, or --tag_weight 1"
        )
    return [piece for pieces in ids for piece in pieces]


def pick_start(args: argparse.Namespace) -> str:
    """--from_weight; by default rlhf where there are such weights of the size asked for, else full_sft."""
    if args.from_weight != START:
        return args.from_weight
    return (
        "rlhf" if find_weights(args.out_dir, "rlhf", preset=args.preset, **given_sizes(args)).exists() else "full_sft"
    )


def held_out(model: torch.nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """The sums of a held-out batch: the weighted loss, and -log p of the targets (ce) with their number."""
    losses = model(**batch.inputs, return_logits=False).token_losses  # (B, T)
    weighted = losses * batch.extra["weights"]
    return {"loss": weighted.sum(), "ce": losses.sum(), "count": (batch.inputs["labels"] != IGNORED).sum()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(
        __doc__, data="r1_mix_1024.jsonl", from_weight=START, epochs=2, lr={"muon": 1e-3, "adamw": 2e-4}
    )
    parser.set_defaults(max_seq_len=1024)
    group = parser.add_argument_group("reasoning")
    group.add_argument(
        "--tag_weight", type=number(float, 0), default=10.0, help="of <think> </think> <answer> </answer> (default: 10)"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "reason")

    # 2. Tokenizer with its tags, and the model that answers already
    tokenizer = load_tokenizer(args.tokenizer_path)
    tags = {"tag_ids": find_tags(tokenizer, args.tag_weight), "tag_weight": args.tag_weight}
    args.from_weight = pick_start(args)
    model = build_model(args, tokenizer, run)
    run.settings = {"--tag_weight": args.tag_weight}

    # 3. Data: packed rows of whole conversations, labels on the answers and a weight for each label
    kind = partial(ReasonDataset, **tags)
    train_set, val_set = open_data(kind, "r1_mix_1024.jsonl", "reason.jsonl", tokenizer, run)
    total_steps = count_steps(train_set, run)
    run.describe(model, train_set, total_steps)

    # 4. Optimizer; the engine replicates the model over the processes of the launch
    optimizer = build_optimizer(model, args.optimizer, run.learning_rate, args.weight_decay, run.dtype)
    engine = make_engine(model, optimizer, run, total_steps)
    run.begin(engine, train_set, total_steps)

    # 5. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    with run.guard(lambda: save(engine, run, train_set)):
        for step in training_steps(train_set, run, total_steps):
            learning_rate = learning_rate_at(step.schedule, run.schedule_steps, run.learning_rate, args.warmup_ratio)
            set_learning_rate(optimizer, learning_rate)

            for batch in step.batches:
                with engine.micro_step(last=batch is step.batches[-1]):
                    output = engine(**batch.inputs, return_logits=False, equal_weights=False)
                    losses = output.token_losses * batch.extra["weights"]  # (B, T)
                    loss = losses.sum() / step.targets  # the sum of the weights of the whole step
                    run.add(batch, losses, step.targets)
                    if output.aux_loss is not None:  # keep the experts of a mixture evenly loaded
                        loss = loss + output.aux_loss * len(batch.rows) / step.rows
                    engine.backward(loss)

            grad_norm = engine.clip_grad_norm(args.grad_clip)
            if run.accept_step(grad_norm, train_set):
                engine.step()
            engine.zero_grad()

            # 6. Evaluate, log, save: what a checkpoint holds has been told
            evaluating = is_due(step.number, args.eval_interval, total_steps)
            if evaluating or step.number % args.log_interval == 0:
                meters = run.means() | {"lr": learning_rate, "grad_norm": float(grad_norm)} | expert_meters(output)
                if evaluating and val_set:
                    meters |= evaluate(model, val_set, run, held_out, step.number == total_steps, tokenizer)
                    meters["val_ce"] /= meters.pop("val_count")  # both came divided by the sum of weights
                run.log(step.number, meters)
            if is_due(step.number, args.save_interval, total_steps):
                save(engine, run, train_set)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 3 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
