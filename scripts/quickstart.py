"""From nothing to a model that answers: embedded data -> pretraining -> fine-tuning -> score on held-out questions.

    python scripts/quickstart.py

On a GPU it trains minimind2-small (26M parameters), on a CPU a model of 6M, so that minutes are enough. The score is
taken on questions in phrasings that no training row has. The report goes to out/quickstart.md and out/quickstart.json.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
import unicodedata
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import GenerationConfig

from dataset.chat import encode_prompt
from dataset.lm_dataset import read_jsonl
from model.errors import InputError, run_script
from model.loading import find_weights, load_model, load_tokenizer
from scripts.make_demo_data import ensure_demo_data
from trainer.devices import pick_device
from trainer.flags import MAX_SEED, ROOT, boolean, number

CPU_SIZE = {"hidden_size": 256, "num_hidden_layers": 4}
SHOWN = 12  # sample answers in the report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", type=Path, default=ROOT / "out", help="weights, logs and the report (default: out/)")
    add("--pretrain_epochs", type=number(int, 1), default=3, help="passes over the embedded texts (default: 3)")
    add("--sft_epochs", type=number(int, 1), default=2, help="passes over the embedded conversations (default: 2)")
    add("--device", default="auto", help="auto, cuda, mps, cpu (default: auto)")
    add("--seed", type=number(int, 0, MAX_SEED), default=42, help="of weights and data order (default: 42)")
    add("--debug", type=boolean, nargs="?", const=True, default=False, help="show tracebacks of errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()

    # 1. A size that suits the machine
    device = pick_device(args.device)
    sizes = CPU_SIZE if device.type == "cpu" else {}
    common = [f"--{key}={value}" for key, value in sizes.items()]
    common += [f"--out_dir={args.out_dir}", f"--device={device}", f"--seed={args.seed}"]
    demo = ensure_demo_data()

    # 2. Train
    common += ["--max_seq_len=256", "--batch_size=8", "--eval_interval=1000"]
    texts, chats = f"--data_path={demo / 'pretrain.jsonl'}", f"--data_path={demo / 'sft.jsonl'}"
    train("train_pretrain.py", [texts, f"--epochs={args.pretrain_epochs}", "--learning_rate=0.006", *common])
    train("train_full_sft.py", [chats, f"--epochs={args.sft_epochs}", "--learning_rate=0.004", *common])
    trained = time.monotonic()

    # 3. Score on held-out phrasings
    tokenizer = load_tokenizer()
    weights = find_weights(args.out_dir, "full_sft", **sizes)
    model, _ = load_model(weights, device=device)
    questions = [row for _, row in read_jsonl(demo / "sft_val.jsonl")]
    answers = answer_all(model, tokenizer, questions)
    right = [is_right(text, row["answer"]) for text, row in zip(answers, questions, strict=True)]

    # 4. Report
    report = {
        "device": str(device), "seed": args.seed, "train_seconds": round(trained - started, 1),
        "total_seconds": round(time.monotonic() - started, 1), "score": sum(right) / len(right),
        "by_language": score_by(questions, right, "language"), "by_relation": score_by(questions, right, "relation"),
    }  # fmt: skip
    every = max(len(questions) // SHOWN, 1)
    samples = [
        {"question": row["conversations"][-2]["content"], "answer": text, "right": ok}
        for row, text, ok in list(zip(questions, answers, right, strict=True))[every // 2 :: every]
    ]
    text = format_report(report, samples)
    (args.out_dir / "quickstart.json").write_text(
        json.dumps(report | {"samples": samples}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    (args.out_dir / "quickstart.md").write_text(text, encoding="utf-8")
    where = "" if args.out_dir.resolve() == ROOT / "out" else f" --out_dir {shlex.quote(str(args.out_dir))}"
    print(
        f"\n{text}\nNow talk to it:          python eval_model.py --model_mode 1{where}\n"
        "Look at its data:        python scripts/inspect_data.py dataset/demo/sft.jsonl\n"
        "Train the full size:     python trainer/train_pretrain.py && python trainer/train_full_sft.py"
    )


def train(script: str, flags: list[str]) -> None:
    """Run a training script as a user would, showing the command."""
    command = [sys.executable, str(ROOT / "trainer" / script), *flags]
    print(f"\n$ python trainer/{script} {shlex.join(flags)}", flush=True)
    if code := subprocess.run(command).returncode:
        raise InputError(f"{script} ended with exit code {code}; its message stands above")


def answer_all(model, tokenizer, rows: list[dict], batch_size: int = 128, max_new_tokens: int = 48) -> list[str]:
    """Greedy answers to the last question of every row, in batches of similar length, left-padded."""
    prompts = [encode_prompt(tokenizer, row["conversations"][:-1]) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    pad = tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id
    )
    answers = [""] * len(rows)
    for begin in range(0, len(rows), batch_size):
        chosen = by_length[begin : begin + batch_size]
        width = max(len(prompts[i]) for i in chosen)
        input_ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device
        )
        with torch.inference_mode():
            output = model.generate(input_ids, attention_mask=mask, generation_config=config)
        for i, ids in zip(chosen, output[:, width:], strict=True):
            answers[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def is_right(response: str, answer: str) -> bool:
    """Whether the answer occurs in the response; Latin words and numbers must stand alone ("7" is not in "17")."""
    response, answer = (unicodedata.normalize("NFKC", text).casefold() for text in (response, answer))
    left = r"(?<![a-z0-9.])" if re.match(r"[a-z0-9]", answer) else ""
    right = r"(?![a-z0-9]|\.\d)" if re.search(r"[a-z0-9]$", answer) else ""
    return re.search(left + re.escape(answer) + right, response) is not None


def score_by(rows: list[dict], right: list[bool], key: str) -> dict[str, list[int]]:
    """{value of key: [right, asked]}, worst first."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row, ok in zip(rows, right, strict=True):
        counts[row[key]][0] += ok
        counts[row[key]][1] += 1
    return dict(sorted(counts.items(), key=lambda item: item[1][0] / item[1][1]))


def format_report(report: dict, samples: list[dict]) -> str:
    """The report as Markdown."""
    asked = sum(n for _, n in report["by_language"].values())
    lines = [
        f"# Quickstart: {report['score']:.1%} of {asked} held-out questions right",
        "",
        f"Trained for {report['train_seconds']:.0f} s on {report['device']}, {report['total_seconds']:.0f} s in all.",
        "",
        "| | right | asked | |",
        "|---|---|---|---|",
    ]
    for name, (right, asked) in (report["by_language"] | report["by_relation"]).items():
        lines.append(f"| {name} | {right} | {asked} | {right / asked:.0%} |")
    lines += ["", "| held-out question | answer | |", "|---|---|---|"]
    for sample in samples:
        question, answer = (sample[key].replace("|", "\\|").replace("\n", " ") for key in ("question", "answer"))
        lines.append(f"| {question} | {answer} | {'right' if sample['right'] else 'wrong'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(parse_args, main)
