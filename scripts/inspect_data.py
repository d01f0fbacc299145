"""Look at a data file before training on it: the bad rows with their lines, figures, and a few rows token by token.

    python scripts/inspect_data.py my_chats.jsonl
    python scripts/inspect_data.py my_texts.jsonl --max_seq_len 256 --packed
    python scripts/inspect_data.py my_pairs.jsonl --max_seq_len 1024
    python scripts/inspect_data.py my_prompts.jsonl --format rlaif --max_new_tokens 256

It tells, as training does, how many rows --max_seq_len cuts, how many tokens they lose, and which keys nobody reads.
Tokens are coloured by what training does with them: green is learned (a target), grey is read but not learned, red is
cut off because it lies beyond --max_seq_len. With --packed whole rows are shown as the model gets them, a rule between
documents. Prompts to sample replies to (rlaif) are shown as the policy gets them, with the answer that replies are
verified by: which have none, and which leave no room for a reply. Exit code 1 if any row is bad.
"""

import argparse
import codecs
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.chat import encode_conversations
from dataset.lm_dataset import (
    IGNORED,
    DPODataset,
    Encoded,
    PretrainDataset,
    RLAIFDataset,
    SFTDataset,
    encode_texts,
    fit_answer,
    fit_conversation,
)
from dataset.rows import parse_line, read_lines, row_answer, row_conversation, row_pair, row_prompt, row_text
from model.errors import InputError, UsageError, run_script
from model.loading import load_tokenizer
from trainer.runtime.flags import ROOT, boolean, number

GREEN, GREY, RED, PLAIN = "\x1b[30;42m", "\x1b[90m", "\x1b[37;41m", "\x1b[0m"
MARKS = {GREEN: "+", GREY: " ", RED: "x"}  # where there are no colours
SHOWN_ERRORS = 20
DATASETS = {"pretrain": PretrainDataset, "sft": SFTDataset, "dpo": DPODataset, "rlaif": RLAIFDataset}


def row_question(row: dict, where: str) -> tuple[list[dict], str | None]:
    """The turns of a prompt and its answer, if it has one that can be verified."""
    return row_prompt(row, where), row_answer(row, where)


CHECKS = {"pretrain": row_text, "sft": row_conversation, "dpo": row_pair, "rlaif": row_question}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = {"type": boolean, "nargs": "?", "const": True}
    parser.add_argument("file", type=Path, help="JSON lines to look at")
    parser.add_argument(
        "--format", choices=["auto", *DATASETS], default="auto",
        help="default: by the first row's keys and the file's name (rlaif: prompts to sample replies to)",
    )  # fmt: skip
    parser.add_argument(
        "--max_new_tokens", type=number(int, 1), default=128, help="of a reply to a prompt (default: 128)"
    )
    parser.add_argument("--max_seq_len", type=number(int, 8), default=512, help="tokens in a row (default: 512)")
    parser.add_argument("--rows", type=number(int, 0), default=3, help="rows to show (default: 3)")
    parser.add_argument("--packed", **switch, default=False, help="show packed rows instead of single documents")
    parser.add_argument("--color", **switch, default=sys.stdout.isatty(), help="colours (default: on a terminal)")
    parser.add_argument("--tokenizer_path", type=Path, help="folder of a tokenizer (default: model/)")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out", help="where the token cache goes (default: out/)")
    parser.add_argument("--debug", **switch, default=False, help="show tracebacks of errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer_path)
    data_format, n_rows, duplicates, errors = check_rows(args.file, args.format)
    print(f"{args.file}: {n_rows:,} rows in the {data_format} format, {duplicates:,} of them repeat an earlier row")
    for error in errors[:SHOWN_ERRORS]:
        print(f"  bad: {error}")
    if errors:
        raise InputError(f"{len(errors)} bad rows in {args.file}; training would stop at the first")

    if data_format == "rlaif":
        show_prompts(args, tokenizer)
        return
    dataset = DATASETS[data_format](args.file, tokenizer, args.max_seq_len, args.out_dir / "cache")
    lengths = np.diff(dataset.cache.bounds)
    quarter, half, most, longest = np.percentile(lengths, [25, 50, 95, 100]).astype(int)
    learned = 1.0 if dataset.cache.targets is None else float(np.mean(dataset.cache.targets))
    alone = 1 - lengths.clip(max=args.max_seq_len).sum() / (len(lengths) * args.max_seq_len)
    print(
        f"{lengths.sum():,} tokens, {learned:.0%} of them targets; a document has {lengths.mean():.0f} on average, "
        f"{quarter} / {half} / {most} / {longest} at 25% / 50% / 95% / 100%\n"
        f"rows of {args.max_seq_len}: {len(dataset):,}, padding {dataset.padding_share():.2%} "
        f"(one document a row: {alone:.0%}); {dataset.cache.meta['skipped']:,} documents hold no target within a row"
    )
    print("\ngreen (+): learned   grey: read, not learned   red (x): cut off\n")
    if args.packed:
        for index in range(min(args.rows, len(dataset))):
            print(f"packed row {index}, from {dataset.describe(index)}")
            show_packed(tokenizer, dataset[index], args.color)
    else:
        for where, tokens in single_rows(args.file, tokenizer, data_format, args.max_seq_len, args.rows):
            print(where)
            show_tokens(tokenizer, tokens, args.color)


def show_prompts(args: argparse.Namespace, tokenizer) -> None:
    """Figures of prompts, and the first ones as a policy gets them, with the answer that replies are verified by."""
    if args.max_new_tokens >= args.max_seq_len:
        raise UsageError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in {args.max_seq_len} tokens"
        )
    prompts = RLAIFDataset(args.file, tokenizer, args.max_seq_len, reply=args.max_new_tokens)
    lengths = np.array([len(ids) for ids in prompts.ids])
    spread = " / ".join(str(int(length)) for length in np.percentile(lengths, [25, 50, 95, 100]))
    unknown = [line for line, answer in zip(prompts.lines, prompts.answers, strict=True) if answer is None]
    print(
        f"{prompts.summary()}; {lengths.mean():.0f} tokens on average, {spread} at 25% / 50% / 95% / 100%; "
        f"{args.max_seq_len - args.max_new_tokens} fit beside a reply of {args.max_new_tokens}"
    )
    for what, lines in ("too long", prompts.left_out), ("without an answer", unknown):
        if lines:
            more = " ..." if len(lines) > SHOWN_ERRORS else ""
            print(f"{what}: line {', '.join(map(str, lines[:SHOWN_ERRORS]))}{more}")
    print("\ngrey: read, not learned; a reply is sampled behind it\n")
    for line, ids, answer in list(zip(prompts.lines, prompts.ids, prompts.answers, strict=True))[: args.rows]:
        print(f"{args.file}:{line}, answer: {'none' if answer is None else escape_controls(answer)}")
        show_tokens(tokenizer, [(token, GREY) for token in ids], args.color)


def check_rows(path: Path, data_format: str) -> tuple[str, int, int, list[str]]:
    """Read a whole file: its format, how many rows, how many repeat an earlier one, and what is wrong with which."""
    errors, seen, n_rows = [], set(), 0
    for line_number, line in read_lines(path):
        where = f"{path}:{line_number}"
        try:
            row = parse_line(line, where)
            if row is None:
                continue
            n_rows += 1
            seen.add(hash(line.removeprefix(codecs.BOM_UTF8).strip()))
            if data_format == "auto":
                data_format = guess_format(path, row)
            CHECKS[data_format](row, where)
        except InputError as error:
            errors.append(str(error))
    if not n_rows and not errors:
        raise InputError(f"{path} is empty: it holds no row")
    return data_format, n_rows, n_rows - len(seen), errors


def guess_format(path: Path, row: dict) -> str:
    """The format of a file by its first row; prompts are known by the file's name, or by an answer that no turn has."""
    if isinstance(row.get("conversations"), list):
        roles = [turn.get("role") for turn in row["conversations"] if isinstance(turn, dict)]
        return "rlaif" if path.stem.startswith("rlaif") or ("answer" in row and "assistant" not in roles) else "sft"
    return "dpo" if {"chosen", "rejected"} & set(row) else "pretrain"


def single_rows(path: Path, tokenizer, data_format: str, max_seq_len: int, n_rows: int):
    """Yield ("file:line", [(id, colour), ...]) for the first rows, with what max_seq_len cuts off."""
    for line_number, line in read_lines(path):
        if n_rows == 0:
            return
        where = f"{path}:{line_number}"
        row = parse_line(line, where)
        if row is None:
            continue
        n_rows -= 1
        if data_format == "pretrain":
            ids = encode_texts(tokenizer, [row_text(row, where)])[0].ids
            yield where, [(token, GREEN if place % max_seq_len else GREY) for place, token in enumerate(ids)]
        elif data_format == "sft":
            encoded = encode_conversations(tokenizer, [row_conversation(row, where)])[0]
            yield where, coloured(encoded.ids, fit_conversation(encoded, max_seq_len))
        else:
            pair = encode_conversations(tokenizer, row_pair(row, where))
            for side, encoded in zip(("chosen", "rejected"), pair, strict=True):
                yield f"{where}, {side}", coloured(encoded.ids, fit_answer(encoded, max_seq_len // 2))


def coloured(ids: list[int], kept: Encoded | None) -> list[tuple[int, str]]:
    """The tokens of a conversation with their colours; kept: what of it fits into a row."""
    colours = [GREEN if is_target else GREY for is_target in kept.is_target] if kept else []
    return list(zip(ids, colours + [RED] * (len(ids) - len(colours)), strict=True))


def show_packed(tokenizer, row: dict, color: bool) -> None:
    """Print the documents of a packed row, a rule before each."""
    for document in range(1, int(row["attention_mask"].max()) + 1):
        inside = row["attention_mask"] == document
        colours = [GREY if label == IGNORED else GREEN for label in row["labels"][inside].tolist()]
        print(f"--- document {document}")
        show_tokens(tokenizer, list(zip(row["input_ids"][inside].tolist(), colours, strict=True)), color)
    padding = int((row["attention_mask"] == 0).sum())
    print(f"--- padding: {padding} tokens\n")


def show_tokens(tokenizer, tokens: list[tuple[int, str]], color: bool) -> None:
    """Print tokens, a run of one colour at a time so that characters of several tokens stay whole."""
    runs: list[tuple[str, list[int]]] = []
    for token, colour in tokens:
        if not runs or runs[-1][0] != colour:
            runs.append((colour, []))
        runs[-1][1].append(token)
    for colour, ids in runs:
        text = escape_controls(tokenizer.decode(ids, skip_special_tokens=False))
        print(f"{colour}{text}{PLAIN}" if color else f"[{MARKS[colour]}] {text}", end="" if color else "\n")
    print()


def escape_controls(text: str) -> str:
    """Keep control characters of the data from steering the terminal; line breaks are shown and kept."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
    return shown.replace("\n", "⏎\n")


if __name__ == "__main__":
    run_script(parse_args, main)
