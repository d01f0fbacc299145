"""From nothing to a model that answers: embedded data -> pretraining -> fine-tuning -> score on held-out questions.

    python scripts/quickstart.py
    python scripts/quickstart.py --stages all              and every later stage, each measured before and after
    python scripts/quickstart.py --stages lora reason      these alone, on the weights that are in --out_dir

On a GPU it trains minimind2-small (26M parameters), on a CPU a model of 4.5M, so that minutes are enough; --size small
and --size full take one of them anywhere. Scored are
held-out wordings, kinds of asking that no training row has, and questions in words of their own, written from the
facts alone; the headline is the lowest of the three. The report goes to out/quickstart.md and out/quickstart.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.demo_data import ensure_demo_data
from dataset.demo_unknown import ANSWER as HONEST
from dataset.rows import read_jsonl
from dataset.scoring import answer_all, is_right, reasoned_answer, score_by
from model.errors import InputError, run_script
from model.loading import find_weights, load_model, load_tokenizer
from model.model_lora import find_lora, merge_lora
from trainer.rewards import Reply, accuracies
from trainer.runtime.devices import pick_device
from trainer.runtime.flags import COUNT, MAX_SEED, ROOT, SWITCH, number
from trainer.runtime.run_log import plot_stages, read_records

SIZES = {"small": {"hidden_size": 256, "num_hidden_layers": 4}, "full": {"preset": "minimind2-small"}}
RATES = {
    "small": (0.004, 0.0027),
    "full": (0.002, 0.0015),
}  # of pretraining and fine-tuning, at 4.5M and 26M parameters
STUDENT = {"hidden_size": 128, "num_hidden_layers": 3}  # of the distillation
SHOWN = 6  # sample answers of each measure in the report
MEASURES = {
    "held-out wordings": "sft_val.jsonl",
    "unseen kinds of asking": "unseen_val.jsonl",
    "words of their own": "own_words_val.jsonl",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", type=Path, default=ROOT / "out", help="weights, logs and the report (default: out/)")
    add(
        "--stages", nargs="+", choices=[*STAGES, "all"], default=["pretrain", "sft"],
        help="what to train, in this order (default: pretrain sft)",
    )  # fmt: skip
    add("--pretrain_epochs", type=COUNT, default=1, help="passes over the embedded texts (default: 1)")
    add("--sft_epochs", type=COUNT, default=1, help="passes over the embedded conversations (default: 1)")
    add("--device", default="auto", help="auto, cuda, mps, cpu (default: auto)")
    add(
        "--size", choices=["auto", *SIZES], default="auto", help="4.5M or 26M parameters (default: what suits --device)"
    )
    add("--seed", type=number(int, 0, MAX_SEED), default=42, help="of weights and data order (default: 42)")
    add("--debug", **SWITCH, default=False, help="show tracebacks of errors")
    args = parser.parse_args(argv)
    args.stages = [stage for stage in STAGES if stage in args.stages or "all" in args.stages]
    return args


class Gain(NamedTuple):
    """A held-out share before and after a stage; `before` names what it is compared with, where that is no stage."""

    measure: str
    before: float
    after: float
    against: str = "before"


class Job:
    """What the stages have in common: files, flags, the base model and its scores."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out_dir, self.demo = args, args.out_dir, ensure_demo_data()
        self.device = pick_device(args.device)
        size = ("small" if self.device.type == "cpu" else "full") if args.size == "auto" else args.size
        self.sizes, self.rates = SIZES[size], RATES[size]
        self.tokenizer = load_tokenizer()

    def train(
        self, script: str, data: str, *flags: str, out_dir: Path | None = None, sizes: dict | None = None
    ) -> None:
        """Run a training script on one of the embedded files; flags that come later count."""
        sizes = self.sizes if sizes is None else sizes
        common = [f"--data_path={self.demo / data}", "--max_seq_len=256", "--batch_size=8", "--eval_interval=1000"]
        common += [f"--out_dir={out_dir or self.out_dir}", f"--device={self.device}", f"--seed={self.args.seed}"]
        train(script, [*common, *(f"--{key}={value}" for key, value in sizes.items()), *flags])

    def rows(self, name: str) -> list[dict]:
        return [row for _, row in read_jsonl(self.demo / name)]

    def model(self, stage: str, out_dir: Path | None = None, sizes: dict | None = None):
        sizes = self.sizes if sizes is None else sizes
        return load_model(find_weights(out_dir or self.out_dir, stage, **sizes), device=self.device)[0]

    def share_right(self, model, name: str, max_new_tokens: int = 48) -> float:
        """Share of the questions of a held-out file that a model answers right."""
        _, _, right = self.answered(model, name, max_new_tokens)
        return sum(right) / len(right)

    def answered(self, model, name: str, max_new_tokens: int = 48) -> tuple[list[dict], list[str], list[bool]]:
        """Rows of a held-out file, a model's answers, and which of them are right."""
        rows = self.rows(name)
        answers = answer_all(model, self.tokenizer, rows, max_new_tokens=max_new_tokens)
        asked = [row["conversations"][-2]["content"] for row in rows]
        return rows, answers, [is_right(a, row["answer"], q) for a, row, q in zip(answers, rows, asked, strict=True)]

    @cached_property
    def general(self) -> float:
        """The general score of the fine-tuned model, which later stages should not spoil."""
        return self.share_right(self.model("full_sft"), "sft_val.jsonl")

    def last(self, stage: str, key: str) -> float:
        """A figure of the last line of a stage's log."""
        return read_records(self.log(stage))[-1][key]

    def log(self, stage: str) -> Path:
        return self.out_dir / "logs" / f"{find_weights(self.out_dir, stage, **self.sizes).stem}.jsonl"

    def has(self, stage: str) -> bool:
        return find_weights(self.out_dir, stage, **self.sizes).exists()


# ---------------------------------------------------------------------------------------------------------- the stages


def pretrain(job: Job) -> list[Gain]:
    rate = f"--learning_rate={job.rates[0]}"
    job.train("train_pretrain.py", "pretrain.jsonl", f"--epochs={job.args.pretrain_epochs}", rate)
    return []


def sft(job: Job) -> list[Gain]:
    flags = [f"--epochs={job.args.sft_epochs}", f"--learning_rate={job.rates[1]}"]
    job.train("train_full_sft.py", "sft.jsonl", *flags, "--max_seq_len=512", "--batch_size=4")
    return []


def lora(job: Job) -> list[Gain]:
    """Two adapters on the same weights: another name, and some medicine."""
    gains = []
    for name, measure, more in (
        ("lora_identity", "own name", []),
        ("lora_medical", "medical questions", ["--lora_targets=all", "--lora_rank=16"]),
    ):
        before = job.share_right(job.model("full_sft"), f"{name}_val.jsonl")
        job.train("train_lora.py", f"{name}.jsonl", f"--lora_name={name}", "--batch_size=4", *more)
        model = job.model("full_sft")
        merge_lora(model, find_lora(job.out_dir, name, model.config))
        gains.append(Gain(measure, before, job.share_right(model, f"{name}_val.jsonl")))
        gains.append(Gain(f"general score with {name}", job.general, job.share_right(model, "sft_val.jsonl")))
    return gains


def dpo(job: Job) -> list[Gain]:
    job.train("train_dpo.py", "dpo.jsonl", "--max_seq_len=512")
    return [
        Gain("pairs preferred rightly, against the start", 0.5, job.last("rlhf", "val_accuracy"), "by definition"),
        Gain("general score", job.general, job.share_right(job.model("rlhf"), "sft_val.jsonl")),
    ]


def reward(job: Job) -> list[Gain]:
    job.train("train_reward.py", "dpo.jsonl", "--max_seq_len=512")
    return [Gain("pairs scored rightly", 0.5, job.last("reward", "val_accuracy"), "chance")]


def distillation(job: Job) -> list[Gain]:
    """A smaller model learns the conversations with the fine-tuned one as its teacher, and without: equal steps."""
    teacher = find_weights(job.out_dir, "full_sft", **job.sizes)
    student = job.out_dir / "student"
    job.train(
        "train_pretrain.py", "pretrain.jsonl", "--epochs=2", "--learning_rate=0.008", out_dir=student, sizes=STUDENT
    )
    scores = []
    for alpha in (1, 0.2):
        flags = [
            f"--teacher={teacher}",
            f"--alpha={alpha}",
            "--from_weight=pretrain",
            "--epochs=1",
            "--learning_rate=0.008",
        ]
        job.train("train_distillation.py", "sft.jsonl", *flags, out_dir=student, sizes=STUDENT)
        scores.append(job.share_right(job.model("distill", student, STUDENT), "sft_val.jsonl"))
    return [Gain("general score of the student", *scores, "without a teacher")]


def reason(job: Job) -> list[Gain]:
    """Worked arithmetic: a thought, then the answer."""
    rows = job.rows("reason_val.jsonl")

    def figures(model) -> tuple[float, float]:
        texts = answer_all(model, job.tokenizer, rows, max_new_tokens=96)
        answers = [reasoned_answer(text) for text in texts]
        right = [is_right(a or text, row["answer"]) for a, text, row in zip(answers, texts, rows, strict=True)]
        return sum(a is not None for a in answers) / len(rows), sum(right) / len(rows)

    form_before, right_before = figures(job.model("rlhf" if job.has("rlhf") else "full_sft"))
    job.train("train_distill_reason.py", "reason.jsonl", "--epochs=3", "--learning_rate=0.004")
    form, right = figures(job.model("reason"))
    return [Gain("answers as a thought and an answer", form_before, form), Gain("arithmetic", right_before, right)]


RL_REPLY = 80  # tokens of a worked answer at most
RL_FLAGS = {
    "ppo": ["--num_generations=4", "--batch_size=16", "--max_steps=60"],
    "grpo": ["--num_generations=8", "--batch_size=16", "--max_steps=60"],
    "spo": ["--batch_size=16", "--max_steps=60"],
}
RL_COMMON = ["--reasoning=1", f"--max_new_tokens={RL_REPLY}", "--max_seq_len=160", "--optimizer=muon"]
RL_COMMON += ["--log_interval=5", "--eval_interval=20"]
RL_WEIGHTS = {"ppo": "ppo_actor"}  # where they are not named as the stage is


def rewarded(job: Job, stage: str) -> list[Gain]:
    """The reasoning policy answers new problems and learns from being told right or wrong."""

    def figures(model) -> list[float]:
        rows = job.rows("rlaif_val.jsonl")
        texts = answer_all(model, job.tokenizer, rows, max_new_tokens=RL_REPLY)
        replies = [Reply(row["conversations"][:-1], text, row["answer"]) for row, text in zip(rows, texts, strict=True)]
        right = accuracies(replies, reasoning=True)  # as training tells them
        return [*(float(share.mean()) for share in right.values()), job.share_right(model, "sft_val.jsonl")]

    before = figures(job.model("reason"))
    job.train(f"train_{stage}.py", "rlaif.jsonl", *RL_COMMON, *RL_FLAGS[stage])
    after = figures(job.model(RL_WEIGHTS.get(stage, stage)))
    measures = "new problems, right and in form", "new problems, right anyhow", "general score"
    return [Gain(*figures) for figures in zip(measures, before, after, strict=True)]


STAGES = {
    "pretrain": pretrain, "sft": sft, "lora": lora, "dpo": dpo, "reward": reward, "distillation": distillation,
    "reason": reason, **{stage: partial(rewarded, stage=stage) for stage in RL_FLAGS},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the run


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    job = Job(args)
    if set(args.stages) & set(RL_FLAGS) and not job.has("reason") and "reason" not in args.stages:
        args.stages.insert(min(map(args.stages.index, set(args.stages) & set(RL_FLAGS))), "reason")
        print("no reasoning policy yet, for reinforcement learning to start from: the stage reason comes before it")
    report: dict = {"device": str(job.device), "seed": args.seed, "gains": []}
    samples: list[dict] = []

    # 1. Train stage after stage, the base first; what a later one gains is measured around it
    for stage in args.stages:
        began = time.monotonic()
        gains = STAGES[stage](job)
        seconds = round(time.monotonic() - began, 1)
        report["gains"] += [{"stage": stage, "seconds": seconds, **gain._asdict()} for gain in gains]
        for gain in gains:
            print(f"{stage}: {gain.measure}: {gain.before:.1%} {gain.against}, {gain.after:.1%} after", flush=True)
        if stage in ("pretrain", "sft"):
            report["train_seconds"] = round(time.monotonic() - started, 1)
        if stage == "sft":  # 2. Score on held-out questions
            scores, samples = score(job)
            report |= scores

    # 3. Report
    report["total_seconds"] = round(time.monotonic() - started, 1)
    text = format_report(report, samples)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / "quickstart.json").write_text(
        json.dumps(report | {"samples": samples}, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    (args.out_dir / "quickstart.md").write_text(text, encoding="utf-8")
    if set(args.stages) & set(RL_FLAGS):
        logs = {stage: job.log(RL_WEIGHTS.get(stage, stage)) for stage in RL_FLAGS}
        logs = {stage: log for stage, log in logs.items() if log.exists()}  # those of earlier runs too
        plot_stages(logs, args.out_dir / "logs" / "rewards.png")
        print(f"\nthe curves of {', '.join(logs)}: {args.out_dir / 'logs' / 'rewards.png'}")
    where = "" if args.out_dir.resolve() == ROOT / "out" else f" --out_dir {shlex.quote(str(args.out_dir))}"
    print(
        f"\n{text}\nNow talk to it:          python eval_model.py --model_mode 1{where}\n"
        f"Train the later stages:  python scripts/quickstart.py --stages {' '.join(list(STAGES)[2:])}{where}\n"
        "Look at its data:        python scripts/inspect_data.py dataset/demo/sft.jsonl\n"
        "Train the full size:     python trainer/train_pretrain.py && python trainer/train_full_sft.py"
    )


def score(job: Job) -> tuple[dict, list[dict]]:
    """The fine-tuned model's score on every measure, by relation and language; its honesty; some answers."""
    model, samples, refused, asked = job.model("full_sft"), [], 0, 0
    scores: dict = {"scores": {}, "by_relation": {}}
    for measure, name in MEASURES.items():
        rows, answers, right = job.answered(model, name)
        scores["scores"][measure] = sum(right) / len(right)
        kinds = [{"kind": f"{row['relation']} {row['language']}"} for row in rows]
        scores["by_relation"][measure] = score_by(kinds, right, "kind")
        refused += sum(HONEST[row["language"]] in text for row, text in zip(rows, answers, strict=True))
        asked += len(rows)
        every = max(len(rows) // SHOWN, 1)
        samples += [
            {"measure": measure, "question": row["conversations"][-2]["content"], "answer": text, "right": ok}
            for row, text, ok in list(zip(rows, answers, right, strict=True))[every // 2 :: every]
        ]
    job.general = scores["scores"]["held-out wordings"]
    scores["follow_ups"] = job.share_right(model, "follow_up_val.jsonl")
    scores["honest"] = job.share_right(model, "unanswerable_val.jsonl")
    return {"score": min(scores["scores"].values()), "refused": refused / asked, **scores}, samples


def train(script: str, flags: list[str]) -> None:
    """Run a training script as a user would, showing the command."""
    command = [sys.executable, str(ROOT / "trainer" / script), *flags]
    print(f"\n$ python trainer/{script} {shlex.join(flags)}", flush=True)
    if code := subprocess.run(command).returncode:
        raise InputError(f"{script} ended with exit code {code}; its message stands above")


def format_report(report: dict, samples: list[dict]) -> str:
    """The report as Markdown."""
    lines = []
    if "score" in report:
        lines += [f"# Quickstart: {report['score']:.1%} of the questions right", ""]
        lines += [f"Trained for {report['train_seconds']:.0f} s on {report['device']}.", ""]
        lines += ["| measure | right |", "|---|---|"]
        lines += [f"| {measure} | {share:.1%} |" for measure, share in report["scores"].items()]
        lines += [f"| follow-ups that need the turn before | {report['follow_ups']:.1%} |"]
        lines += [f"| unanswerable questions: says that it does not know | {report['honest']:.1%} |"]
        lines += [f"| answerable questions: says that it does not know | {report['refused']:.1%} |", ""]
        lines += [f"| right of asked | {' | '.join(report['scores'])} |", "|---|" + "---|" * len(report["scores"])]
        for name in sorted(report["by_relation"]["held-out wordings"]):
            counts = [by.get(name, (0, 0)) for by in report["by_relation"].values()]
            lines.append(f"| {name} | " + " | ".join(f"{right} of {asked}" for right, asked in counts) + " |")
        lines += ["", "| question | answer | |", "|---|---|---|"]
        for sample in samples:
            question, answer = (sample[key].replace("|", "\\|").replace("\n", " ") for key in ("question", "answer"))
            lines.append(f"| {question} | {answer} | {'right' if sample['right'] else 'wrong'} |")
        lines.append("")
    if report["gains"]:
        lines += ["# Later stages, on held-out rows", ""]
        lines += ["| stage | measure | compared with | after | seconds |", "|---|---|---|---|---|"]
        for gain in report["gains"]:
            compared = f"{gain['before']:.1%} ({gain['against']})"
            lines.append(
                f"| {gain['stage']} | {gain['measure']} | {compared} | {gain['after']:.1%} | {gain['seconds']} |"
            )
        lines.append("")
    return "\n".join([*lines, f"{report['total_seconds']:.0f} s in all."]) + "\n"


if __name__ == "__main__":
    run_script(parse_args, main)
