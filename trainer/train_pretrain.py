"""Pretraining: next-token prediction on plain text.

    loss = - 1/N sum_t log p(x_t | x_<t)        N = targets of the whole optimizer step, over all its micro-batches

Documents are packed into rows; attention and positions stop at document borders, so a packed row has the losses of
its documents alone. Deviations from the common recipe: Muon on the matrices (AdamW elsewhere), a schedule that is flat
until 60% of the steps and then falls linearly to zero, and a mean over tokens, never a mean of micro-batch means.

    python trainer/train_pretrain.py
    python trainer/train_pretrain.py --data_path my.jsonl --preset minimind2 --epochs 2
    python trainer/train_pretrain.py --help
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import PretrainDataset
from trainer.runtime.evaluation import token_loss
from trainer.runtime.flags import common_parser
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "pretrain_hq.jsonl", "none", 1, lr={"muon": 3e-3, "adamw": 1e-3})
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "pretrain")

    # 2. Tokenizer and model: new weights unless --from_weight names some
    model = build_model(run)

    # 3. Data: packed rows
    train_set, val_set = open_data(PretrainDataset, "pretrain_hq.jsonl", "pretrain.jsonl", run)
    run.plan(model, train_set)

    # 4. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens on every process
    engine = make_engine(model, run)
    with run.training({"model": engine}, train_set, val_set, token_loss, run.tokenizer) as steps:
        for step in steps:
            for batch in step.micro_batches(engine):
                output = engine(**batch.inputs, return_logits=False)
                loss = output.token_losses.sum() / step.targets  # N: those of all micro-batches and processes
                step.note(batch, output, output.token_losses)
                engine.backward(loss + step.balance(output, batch))
            engine.update(args.grad_clip)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 0 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
