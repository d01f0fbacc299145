"""Direct preference optimisation (arXiv 2305.18290): prefer the chosen answer to the rejected one, no reward model.

    loss = mean over pairs of - log sigmoid(beta * (D_chosen - D_rejected))
    D    = log pi(y|x) - log ref(y|x)        log pi(y|x) = sum of log pi(y_t | x, y_<t) over the answer's tokens, its
                                             <|im_end|> included; ref = the frozen start, --from_weight

beta * D is the reward that the policy assigns implicitly. Both answers of a pair lie in one packed row, as documents
that do not see each other, so one forward serves both. The reference never trains: its log-probabilities are computed
once, before the first step, and kept in out/cache.

Beyond the paper, both off by default:
  --label_smoothing e        conservative DPO (Mitchell 2023): a share e of the pairs is taken to be labelled the wrong
                             way round, (1-e) * loss + e * loss of the swapped pair
  --loss_type sigmoid_norm   length-normalised DPO (Tulu 3, arXiv 2411.15124): each D is divided by its answer's number
                             of tokens; beta is then about 5

    python trainer/train_dpo.py
    torchrun --nproc_per_node 2 trainer/train_dpo.py --data_path my_pairs.jsonl --beta 0.2
    deepspeed --num_gpus 2 trainer/train_dpo.py --deepspeed

Shapes: B rows, T tokens in a row, P pairs in the fullest row of a batch (rows with fewer end with absent ones).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import DPODataset, sum_by_pair
from model.loading import write_files
from trainer.runtime.checkpoint import config_hash
from trainer.runtime.distributed import gather, rank, sum_over_ranks, world_size
from trainer.runtime.flags import common_parser, number
from trainer.runtime.meters import pair_meters
from trainer.runtime.reference import open_reference, weights_hash
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training
from trainer.runtime.steps import MicroBatch, micro_batches, split_rows

BETAS = {"sigmoid": 0.1, "sigmoid_norm": 5.0}


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float = 0
) -> Tensor:
    """Log-probabilities of the answers under the policy and the reference, four of (...) -> loss of each pair (...)."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def preference_losses(
    token_losses: Tensor, batch: MicroBatch, args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """token_losses (B, T), - log pi of each answer token -> losses of the pairs (B, P), sums of what is logged."""
    documents = batch.inputs["attention_mask"]
    logprobs = sum_by_pair(-token_losses, documents)  # (B, P, 2)
    reference = sum_by_pair(batch.extra["reference"], documents)
    if args.loss_type == "sigmoid_norm":
        lengths = sum_by_pair((batch.inputs["labels"] != -100).float(), documents).clamp(min=1)
        logprobs, reference = logprobs / lengths, reference / lengths
    there = torch.arange(logprobs.shape[1], device=documents.device) < documents.amax(1)[:, None] // 2  # (B, P)
    losses = dpo_loss(
        logprobs[..., 0], logprobs[..., 1], reference[..., 0], reference[..., 1], args.beta, args.label_smoothing
    )
    logprobs = logprobs.detach()
    rewards = args.beta * (logprobs - reference)
    margins = rewards[..., 0] - rewards[..., 1]
    meters = pair_meters(margins, there) | {
        "chosen_reward": rewards[..., 0].sum(), "rejected_reward": rewards[..., 1].sum(),
        "chosen_logprob": logprobs[..., 0].sum(), "rejected_logprob": logprobs[..., 1].sum(),
    }  # fmt: skip
    return losses * there, meters


def held_out(model: torch.nn.Module, batch: MicroBatch, args: argparse.Namespace) -> dict[str, Tensor]:
    """What is told of held-out pairs, summed."""
    losses, meters = preference_losses(model(**batch.inputs, return_logits=False).token_losses, batch, args)
    return {"loss": losses.sum(), **meters}


# ------------------------------------------------------------------------------------------------------ the reference


def add_reference(dataset: DPODataset, model: torch.nn.Module, model_hash: str, run: Run) -> None:
    """Set dataset.reference, (pairs, 2) float32: from out/cache, or computed now, each rank its share of the rows.

    The folder of the token cache stands for data, tokenizer and --max_seq_len; the file for the weights, what the
    config says of computing with them, and --dtype.
    """
    name = f"reference_{model_hash}_{config_hash(model.config)}_{run.dtype}.npy"
    path = dataset.cache.folder / name.replace("torch.", "")
    values = read_reference(path, len(dataset.piece_lengths))
    if not all(gather(values is not None)):
        print(f"reference log-probabilities of {len(dataset.piece_lengths):,} pairs, once", flush=True)
        values = reference_logprobs(dataset, model, run)
        if rank() == 0:
            write_files({path: lambda file: np.save(file, values)})
    dataset.reference = values


def read_reference(path: Path, pairs: int) -> np.ndarray | None:
    """What add_reference has written, None if it is not there or not whole."""
    try:
        values = np.load(path)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return values if values.shape == (pairs, 2) else None


@torch.inference_mode()
def reference_logprobs(dataset: DPODataset, model: torch.nn.Module, run: Run) -> np.ndarray:
    """log ref of both answers of every pair, (pairs, 2) float32."""
    values = np.zeros((len(dataset.piece_lengths), 2), np.float32)
    mine = [
        rows for step in split_rows(range(len(dataset)), run.batch_size * world_size(), run.batch_size) for rows in step
    ]
    model.eval()
    for batch in micro_batches(dataset, run, mine):
        with run.autocast():
            token_losses = model(**batch.inputs, return_logits=False).token_losses
        logprobs = sum_by_pair(-token_losses, batch.inputs["attention_mask"]).cpu().numpy()
        for row, found in zip(batch.rows, logprobs, strict=False):  # blank rows come last
            pairs = dataset.pieces_of(row)
            values[pairs] = found[: len(pairs)]
    model.train()
    return np.asarray(sum_over_ranks(values.ravel().tolist(), run.device), np.float32).reshape(values.shape)


# ------------------------------------------------------------------------------------------------------------ training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "dpo.jsonl", "full_sft", 1, lr={"muon": 1e-4, "adamw": 3e-5})
    parser.set_defaults(max_seq_len=1024)  # two answers of 512
    group = parser.add_argument_group("preferences")
    group.add_argument("--beta", type=number(float, 0), help="nearness to the reference (default: 0.1 or 5, see above)")
    group.add_argument(
        "--label_smoothing", type=number(float, 0, 0.5), default=0.0, help="share of wrong ones (default: 0)"
    )
    group.add_argument("--loss_type", choices=list(BETAS), default="sigmoid", help="default: sigmoid, the paper's")
    args = parser.parse_args(argv)
    args.beta = BETAS[args.loss_type] if args.beta is None else args.beta
    return args


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "rlhf")

    # 2. The policy
    model = build_model(run, args.max_seq_len // 2)

    # 3. Data: packed rows of pairs, labels on the two answers
    train_set, val_set = open_data(DPODataset, "dpo.jsonl", "dpo.jsonl", run)
    run.plan(model, train_set)

    # 4. The reference's log-probabilities of every answer
    reference = open_reference(args, model, run)
    reference_hash = weights_hash(reference)
    for dataset in filter(None, (train_set, val_set)):
        add_reference(dataset, reference, reference_hash, run)
    del reference
    run.settings = {
        "reference weights": reference_hash, "--beta": args.beta, "--loss_type": args.loss_type,
        "--label_smoothing": args.label_smoothing,
    }  # fmt: skip

    # 5. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(model, run)
    with run.training({"model": engine}, train_set, val_set, partial(held_out, args=args)) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                output = engine(**batch.inputs, return_logits=False, equal_weights=False)
                losses, meters = preference_losses(output.token_losses, batch, args)
                loss = losses.sum() / step.targets  # pairs of the whole step
                step.note(batch, output, losses, **meters)
                engine.backward(loss + step.balance(output, batch))
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 2 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
