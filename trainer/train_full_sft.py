"""Full supervised fine-tuning: next-token prediction on the assistant's words.

    loss = - 1/N sum_t m_t log p(x_t | x_<t)      m_t = 1 on each assistant turn's content and its closing <|im_end|>
                                                  N = sum of m_t over the whole optimizer step, all micro-batches

The mask is built turn by turn while the conversation is rendered (dataset/chat.py), never by searching for tokens; to
see what it covers: `python scripts/inspect_data.py FILE`. Conversations are packed into rows and see themselves alone.
All weights train, from --from_weight (default: the pretrained ones).

    python trainer/train_full_sft.py
    python trainer/train_full_sft.py --data_path my_chats.jsonl --max_seq_len 1024
    python trainer/train_full_sft.py --help
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import SFTDataset
from model.loading import load_tokenizer
from trainer.runtime.flags import common_parser
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run, run_training, save
from trainer.runtime.start import build_model, make_engine, open_data
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


def answer_loss(model: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """- sum_t m_t log p(x_t | x_<t) in nats, m_t = labels are not -100; inputs: three of (B, T) -> scalar."""
    return {"loss": model(**batch.inputs, return_logits=False).token_losses.sum()}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(
        __doc__, data="sft_mini_512.jsonl", from_weight="pretrain", epochs=2, lr={"muon": 1e-3, "adamw": 2e-4}
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "full_sft")

    # 2. Tokenizer and the pretrained model
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = build_model(args, tokenizer, run)

    # 3. Data: packed rows of whole conversations, labels on the answers
    train_set, val_set = open_data(SFTDataset, "sft_mini_512.jsonl", "sft.jsonl", tokenizer, run)
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
                    output = engine(**batch.inputs, return_logits=False)
                    loss = output.token_losses.sum() / step.targets
                    run.add(batch, output.token_losses, step.targets)
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
                    meters |= evaluate(model, val_set, run, answer_loss, step.number == total_steps, tokenizer)
                run.log(step.number, meters)
            if is_due(step.number, args.save_interval, total_steps):
                save(engine, run, train_set)

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 1 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
