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
from model.loading import find_weights
from trainer.runtime.flags import common_parser, number
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, given_sizes, make_engine, open_data, run_training
from trainer.runtime.steps import MicroBatch

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


def held_out(model: torch.nn.Module, batch: MicroBatch) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Of a held-out batch: the sum of the weighted losses; that of - log p (ce), and how many targets it is over."""
    losses = model(**batch.inputs, return_logits=False).token_losses  # (B, T)
    weighted = losses * batch.extra["weights"]
    return {"loss": weighted.sum(), "ce": (losses.sum(), (batch.inputs["labels"] != IGNORED).sum())}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "r1_mix_1024.jsonl", START, 2, lr={"muon": 1e-3, "adamw": 2e-4})
    parser.set_defaults(max_seq_len=1024)
    group = parser.add_argument_group("reasoning")
    group.add_argument("--tag_weight", type=number(float, 0), default=10.0, help="of the four tags (default: 10)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "reason")

    # 2. Tokenizer with its tags, and the model that answers already
    tags = {"tag_ids": find_tags(run.tokenizer, args.tag_weight), "tag_weight": args.tag_weight}
    args.from_weight = pick_start(args)
    model = build_model(run)
    run.settings = {"--tag_weight": args.tag_weight}

    # 3. Data: packed rows of whole conversations, labels on the answers and a weight for each label
    kind = partial(ReasonDataset, **tags)
    train_set, val_set = open_data(kind, "r1_mix_1024.jsonl", "reason.jsonl", run)
    run.plan(model, train_set)

    # 4. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(model, run)
    with run.training({"model": engine}, train_set, val_set, held_out, run.tokenizer) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                output = engine(**batch.inputs, return_logits=False, equal_weights=False)
                losses = output.token_losses * batch.extra["weights"]  # (B, T)
                loss = losses.sum() / step.targets  # W: the weights of the whole step
                step.note(batch, output, losses)
                engine.backward(loss + step.balance(output, batch))
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 3 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
