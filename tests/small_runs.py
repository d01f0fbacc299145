"""Training runs of a tiny model in this process, with small data."""

import json
import os
from types import SimpleNamespace
from unittest import mock

import torch

from dataset.lm_dataset import PretrainDataset, SFTDataset
from trainer import train_full_sft, train_pretrain
from trainer.runtime.run import Run
from trainer.runtime.start import build_model

TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--log_interval=1"]
SEQ = 64
TEXTS = [f"第{i}句话：" + "the quick brown fox jumps. " * (1 + i % 4) for i in range(22)]
CHATS = [(f"Question {i}?", "Answer, " * (1 + i % 5) + f"{i}.") for i in range(11)]
STAGES = [train_pretrain, train_full_sft]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_data(folder):
    """Texts and conversations, with held-out ones."""
    write_rows(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_rows(folder / "texts_val.jsonl", [{"text": text} for text in TEXTS[:5]])
    write_rows(folder / "chats.jsonl", [chat(*pair) for pair in CHATS])
    write_rows(folder / "chats_val.jsonl", [chat(*pair) for pair in CHATS[:4]])
    return folder


def train(script, out_dir, data_path, *flags):
    """Run a training script in this process; flags come last and win. Returns its float32 model and its log."""
    models = []

    def keep(*args):
        models.append(build_model(*args))
        return models[-1]

    common = [*TINY, f"--max_seq_len={SEQ}", "--max_steps=3", "--batch_size=8", "--from_weight=none"]
    args = script.parse_args([*common, f"--data_path={data_path}", f"--out_dir={out_dir}", *flags])
    with mock.patch.object(script, "build_model", keep):
        script.main(args)
    return SimpleNamespace(model=models[0], log=read_log(out_dir, script), out_dir=out_dir)


def read_log(out_dir, script):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    stage = script.__name__.split("train_")[1]
    path = max((out_dir / "logs").glob(f"{stage}_*.jsonl"), key=os.path.getmtime)
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def data_of(script, data):
    return data / ("texts.jsonl" if script is train_pretrain else "chats.jsonl")


def dataset_of(script, data, tokenizer, tmp_path, seed=42, **keys):
    kind = PretrainDataset if script is train_pretrain else SFTDataset
    return kind(data_of(script, data), tokenizer, SEQ, tmp_path / "cache", seed=seed, **keys)


def new_run(out_dir, *flags):
    """A Run that has written nothing and trained nothing."""
    flags = [*TINY, f"--max_seq_len={SEQ}", f"--out_dir={out_dir}", *flags]
    return Run(train_pretrain.parse_args(flags), "pretrain")


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_sgd(model, name, learning_rate, weight_decay, dtype):
    """Linear in the gradient, so that a wrong gradient is a wrong weight of the same size."""
    return torch.optim.SGD(model.parameters(), lr=learning_rate)
