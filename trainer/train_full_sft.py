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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import SFTDataset
from trainer.runtime.evaluation import token_loss
from trainer.runtime.flags import common_parser
from trainer.runtime.run import Run
from trainer.runtime.start import build_model, make_engine, open_data, run_training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser(__doc__, "sft_mini_512.jsonl", "pretrain", 2, lr={"muon": 1e-3, "adamw": 2e-4})
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    # 1. Where and in which precision to compute
    run = Run(args, "full_sft")

    # 2. The pretrained model
    model = build_model(run)

    # 3. Data: packed rows of whole conversations, labels on the answers
    train_set, val_set = open_data(SFTDataset, "sft_mini_512.jsonl", "sft.jsonl", run)
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

    print(f"wrote {run.weights}; try: python eval_model.py --model_mode 1 --weight {run.weights}")


if __name__ == "__main__":
    run_training(parse_args, main)
