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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import PretrainDataset
from model.errors import run_script
from model.loading import load_tokenizer
from trainer.optimizers import build_optimizer
from trainer.trainer_utils import (
    Run,
    build_model,
    common_parser,
    count_steps,
    evaluate,
    is_due,
    learning_rate_at,
    maybe_compile,
    peak_expert_load,
    resolve_data,
    save,
    set_learning_rate,
    training_steps,
)  # fmt: skip


def next_token_loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """- sum_t log p(x_t | x_<t) in nats, over the targets; inputs: three of (B, T) -> scalar."""
    return model(**inputs, return_logits=False).token_losses.sum()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(
        __doc__, data="pretrain_hq.jsonl", from_weight="none", epochs=1, lr={"muon": 3e-3, "adamw": 1e-3}
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "pretrain")

    # 2. Tokenizer and model: new weights unless --from_weight names some
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = build_model(args, tokenizer, run)

    # 3. Data: packed rows
    train_path, val_path = resolve_data(args, "pretrain_hq.jsonl", "pretrain.jsonl")
    train_set, val_set = (
        path and PretrainDataset(path, tokenizer, args.max_seq_len, run.cache_dir, args.packing, args.seed)
        for path in (train_path, val_path)
    )
    total_steps = count_steps(train_set, run)
    run.describe(model, train_set, total_steps)

    # 4. Optimizer
    optimizer = build_optimizer(model, args.optimizer, run.learning_rate, args.weight_decay, run.dtype)
    net = maybe_compile(model, run, total_steps)

    # 5. The loop: each step takes accumulation_steps micro-batches of (B, T) tokens
    with run.save_on_interrupt(lambda: save(model, run, train_set)):
        for step, window in training_steps(train_set, run, total_steps):
            learning_rate = learning_rate_at(step, total_steps, run.learning_rate, args.warmup_ratio)
            set_learning_rate(optimizer, learning_rate)

            targets = max(sum(batch.targets for batch in window), 1)
            for batch in window:
                with run.autocast():
                    output = net(**batch.inputs, return_logits=False)
                loss = output.token_losses.sum() / targets
                run.add_losses(batch, output.token_losses, targets)
                if output.aux_loss is not None:  # keep the experts of a mixture evenly loaded
                    loss = loss + output.aux_loss / len(window)
                run.scaler.scale(loss).backward()

            run.scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or float("inf"))
            if run.accept_step(grad_norm, train_set):
                run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # 6. Log, evaluate, save
            evaluating = is_due(step, args.eval_interval, total_steps)
            if evaluating or step % args.log_interval == 0:
                meters = {"loss": run.mean_loss(), "lr": learning_rate, "grad_norm": float(grad_norm)}
                if output.expert_load is not None:
                    meters["peak_expert_load"] = peak_expert_load(output.expert_load)
                if evaluating and val_set:
                    meters |= evaluate(model, val_set, run, next_token_loss, tokenizer, step == total_steps)
                run.log(step, total_steps, meters)
            if is_due(step, args.save_interval, total_steps):
                path = save(model, run, train_set)

    run.plot()
    print(f"wrote {path}; try: python eval_model.py --model_mode 0 --weight {path}")


if __name__ == "__main__":
    run_script(parse_args, main)
