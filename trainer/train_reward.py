"""Reward model (Bradley-Terry): a score for every answer, learned from which of two answers is preferred.

    loss = mean over pairs of - log sigmoid(R(x, y_chosen) - R(x, y_rejected))
    R    = w . h, the head on the hidden state of the answer's last token: <|im_end|>, or the last one kept of an answer
           that was cut

The layers start from --from_weight, the head at zero (model/heads.py), and all weights train. Only differences of
scores enter the loss, so it leaves open where their mean lies; RL clips scores around 0, so as in trl

    + center * mean over pairs of (R_chosen + R_rejected)^2        (arXiv 2312.09244; --center 0: without)

holds the mean near 0. The logged loss is without it, and so is val_loss. accuracy: share of pairs in which the chosen
answer scores higher.

    python trainer/train_reward.py
    torchrun --nproc_per_node 2 trainer/train_reward.py --data_path my_pairs.jsonl
    deepspeed --num_gpus 2 trainer/train_reward.py --deepspeed

Shapes: B rows, T tokens in a row, P pairs in the fullest row of a batch (rows with fewer end with absent ones).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import DPODataset, sum_by_pair
from model.heads import MiniMindForScoring
from model.outputs import ScoringOutput
from trainer.runtime.flags import common_parser, number
from trainer.runtime.meters import pair_meters
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training
from trainer.runtime.steps import MicroBatch


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Scores of the two answers, two of (...) -> - log of the odds that the chosen one is preferred (...)."""
    return -F.logsigmoid(chosen - rejected)


def answer_scores(scores: Tensor, batch: MicroBatch) -> Tensor:
    """Of the scores of all tokens (B, T) those of the last answer tokens (B, P, 2); absent pairs have 0."""
    is_answer = batch.inputs["labels"] != -100
    is_last = is_answer & ~F.pad(is_answer, (0, 1))[:, 1:]  # an answer is one run of targets
    return sum_by_pair(scores * is_last, batch.inputs["attention_mask"])


def preference_losses(scores: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Scores of all tokens (B, T) -> losses (B, P), (R_chosen + R_rejected)^2 (B, P), sums of what is logged."""
    pairs = answer_scores(scores, batch)
    chosen, rejected = pairs.unbind(-1)
    there = torch.arange(chosen.shape[1], device=scores.device) < batch.inputs["attention_mask"].amax(1)[:, None] // 2
    losses = bradley_terry_loss(chosen, rejected) * there
    centering = (chosen + rejected) ** 2
    margins = (chosen - rejected).detach()
    meters = pair_meters(margins, there)
    meters |= {"chosen_score": chosen.detach().sum(), "rejected_score": rejected.detach().sum()}
    return losses, centering, meters


def read(model: Callable, batch: MicroBatch) -> ScoringOutput:
    """What the model, or the engine around it, says of packed rows: scores of all tokens (B, T)."""
    names = "input_ids", "attention_mask", "document_bounds"
    return model(**{name: batch.inputs[name] for name in names if name in batch.inputs})


def held_out(model: torch.nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
    """What is told of held-out pairs, summed."""
    losses, _, meters = preference_losses(read(model, batch).scores, batch)
    return {"loss": losses.sum(), **meters}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "dpo.jsonl", "full_sft", 4, lr={"muon": 1e-3, "adamw": 2e-4})
    parser.set_defaults(max_seq_len=1024)  # two answers of 512
    group = parser.add_argument_group("preferences")
    group.add_argument("--center", type=number(float, 0), default=0.01, help="holds the mean score at 0 (default: .01)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "reward")
    run.settings = {"--center": args.center}

    # 2. Tokenizer; the chat model's layers under a new head
    model = MiniMindForScoring.from_language_model(build_model(run, args.max_seq_len // 2))

    # 3. Data: packed rows of pairs, labels on the two answers
    train_set, val_set = open_data(DPODataset, "dpo.jsonl", "dpo.jsonl", run)
    run.plan(model, train_set)

    # 4. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(model, run)
    with run.training({"model": engine}, train_set, val_set, held_out) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                output = read(engine, batch)
                losses, centering, meters = preference_losses(output.scores, batch)
                loss = (losses + args.center * centering).sum() / step.targets  # pairs of the whole step
                step.note(batch, output, losses, **meters)
                engine.backward(loss + step.balance(output, batch))
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
