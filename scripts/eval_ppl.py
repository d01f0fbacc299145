"""Held-out loss, perplexity and bits per byte of a model on any file; and perplexity by position, far beyond training.

    python scripts/eval_ppl.py my_val.jsonl --stage pretrain
    python scripts/eval_ppl.py long_texts.jsonl --stage pretrain --by_position 4 --png out/by_position.png

    loss = - 1/N sum_t log p(x_t | x_<t)      perplexity = exp(loss)      bits per byte = N loss / ln 2 / bytes of text

The rows are those of pretraining or of chats (there the assistant's words alone count), packed as in training. With
--by_position F each text is cut into windows of F times the length that the model was trained at, and the loss is shown
by position within the window, as the model is and with YaRN stretched by F.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dataset.lm_dataset import PackedDataset, PretrainDataset, SFTDataset, encode_texts, token_byte_counts
from dataset.rows import read_jsonl, row_text
from model.errors import InputError, UsageError, run_script
from model.foreign import as_minimind
from model.loading import TRAINED_BY
from trainer.runtime.flags import add_weight_flags, number
from trainer.runtime.start import open_model

BUCKETS = 4  # points of the curve within one trained length


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="JSON lines: pretraining texts or chats")
    add("--max_seq_len", type=number(int, 8), help="tokens in a row (default: the length the model was trained at)")
    add("--rows", type=number(int, 1), help="rows at most (default: all); of --by_position: windows (default: 64)")
    add("--batch_size", type=number(int, 1), default=4, help="rows of a forward pass (default: 4)")
    add("--by_position", type=number(int, 2), metavar="F", help="loss by position up to F times the trained length")
    add("--json", type=Path, help="write the figures here")
    add("--png", type=Path, help="draw the curve of --by_position here")
    add_weight_flags(parser, "pretrain", list(TRAINED_BY))
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.png and not args.by_position:
        raise UsageError("--png draws the curve of --by_position: give both")
    path, model, info, tokenizer = open_model(args)
    model = as_minimind(model)  # or one sentence on a class that computes otherwise
    trained = info.get("trained_length") or model.config.original_max_position_embeddings
    if args.by_position:
        report = by_position(args, model, tokenizer, trained)
    else:
        context = model.config.max_position_embeddings
        if (args.max_seq_len or 0) > context:
            raise InputError(f"rows of {args.max_seq_len} tokens pass the context of {context}: lower --max_seq_len")
        report = on_file(args, model, tokenizer, args.max_seq_len or min(trained, context))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"weights": str(path), **report}, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- one file


def on_file(args: argparse.Namespace, model, tokenizer, max_seq_len: int) -> dict:
    """Loss, perplexity and bits per byte over the targets of a file."""
    dataset = open_dataset(args.file, tokenizer, max_seq_len, args.out_dir / "cache")
    rows = min(len(dataset), args.rows or len(dataset))
    bytes_of = token_byte_counts(tokenizer)
    nats = targets = n_bytes = 0
    for begin in tqdm(range(0, rows, args.batch_size), desc="reading", unit="batch", disable=None):
        batch = [dataset[i] for i in range(begin, min(begin + args.batch_size, rows))]
        inputs = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        learned = inputs["labels"][inputs["labels"] != -100]
        targets, n_bytes = targets + len(learned), n_bytes + int(bytes_of[learned].sum())
        nats += float(token_losses(model, inputs).sum())
    loss = nats / targets
    report = {
        "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nats / math.log(2) / max(n_bytes, 1),
        "targets": targets, "bytes": n_bytes,
    }  # fmt: skip
    print(
        f"{args.file}: loss {loss:.4f}, perplexity {report['perplexity']:.2f}, "
        f"{report['bits_per_byte']:.4f} bits per byte ({targets:,} targets, {n_bytes:,} bytes, rows of {max_seq_len})"
    )
    return report


def open_dataset(path: Path, tokenizer, max_seq_len: int, cache_dir: Path) -> PackedDataset:
    """Texts or chats, by the keys of the first row."""
    _, first = next(read_jsonl(path))
    kind = SFTDataset if "conversations" in first else PretrainDataset
    return kind(path, tokenizer, max_seq_len, cache_dir)


@torch.inference_mode()
def token_losses(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """-log p of each target in float64 on the CPU, 0 elsewhere: three of (B, T) -> (B, T)."""
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    return model(**inputs, return_logits=False).token_losses.double().cpu()


# -------------------------------------------------------------------------------------------------------- by position


def by_position(args: argparse.Namespace, model, tokenizer, trained: int) -> dict:
    """Loss by position in windows of --by_position times the trained length, without YaRN and with it."""
    length = trained * args.by_position
    if length > model.config.max_position_embeddings:
        raise InputError(
            f"{length} tokens pass the context of {model.config.max_position_embeddings}: lower --by_position"
        )
    windows = cut_windows(args.file, tokenizer, length, args.rows or 64)
    scaling = {"rope_type": "yarn", "factor": float(args.by_position), "original_max_position_embeddings": trained}
    curves = {"plain": position_losses(model, windows, args.batch_size)}
    model.config.inference_rope_scaling, model.config.rope_scaling = True, scaling  # each forward reads them anew
    curves["yarn"] = position_losses(model, windows, args.batch_size)
    size = max(trained // BUCKETS, 1)
    ends = list(range(size, length + 1, size))
    buckets = {name: [float(losses[end - size : end].mean()) for end in ends] for name, losses in curves.items()}
    print(
        f"{len(windows)} windows of {length} tokens, trained at {trained}\npositions     plain      yarn   (perplexity)"
    )
    for i, end in enumerate(ends):
        print(f"{end - size:>6}-{end:<6} {math.exp(buckets['plain'][i]):>8.2f}  {math.exp(buckets['yarn'][i]):>8.2f}")
    whole = {name: float(losses[1:].mean()) for name, losses in curves.items()}
    beyond = {name: float(losses[trained:].mean()) for name, losses in curves.items()}
    for name, losses in (("whole window", whole), (f"beyond {trained}", beyond)):
        print(f"{name}: perplexity {math.exp(losses['plain']):.2f} plain, {math.exp(losses['yarn']):.2f} with YaRN")
    if args.png:
        plot(args.png, ends, buckets, trained)
    return {
        "trained_length": trained,
        "length": length,
        "ends": ends,
        "loss": buckets,
        "whole": whole,
        "beyond": beyond,
    }


def cut_windows(path: Path, tokenizer, length: int, limit: int) -> torch.Tensor:
    """Windows of whole texts, one after the other, at most `limit`: (N, length)."""
    windows: list[list[int]] = []
    for line, row in read_jsonl(path):
        (document,) = encode_texts(tokenizer, [row_text(row, f"{path}:{line}")])
        whole = len(document.ids) // length
        windows += [document.ids[i * length : (i + 1) * length] for i in range(whole)]
        if len(windows) >= limit:
            break
    if not windows:
        raise InputError(f"{path} has no text of {length} tokens: lower --by_position, or take longer texts")
    return torch.tensor(windows[:limit])


def position_losses(model, windows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Mean -log p by position: windows (N, T) -> (T,), 0 at the first."""
    total = torch.zeros(windows.shape[1], dtype=torch.float64)
    for part in tqdm(windows.split(batch_size), desc="reading", unit="batch", disable=None):
        total += token_losses(model, {"input_ids": part, "labels": part}).sum(0)
    return total / len(windows)


def plot(path: Path, ends: list[int], buckets: dict[str, list[float]], trained: int) -> None:
    """Perplexity by position, a line at the trained length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, losses in buckets.items():
        axes.plot(ends, [math.exp(loss) for loss in losses], "o-", label=name, markersize=4, linewidth=1.2)
    axes.axvline(trained, color="grey", linestyle=":", label="trained length")
    axes.set(xlabel="position", ylabel="perplexity", yscale="log", title="perplexity by position")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    run_script(parse_args, main)
