"""`scripts/benchmark.py rl`: where the time of a reinforcement-learning step goes, and what sampling costs elsewhere.

    python scripts/benchmark.py rl --weight out/reason_256.pth
    python scripts/benchmark.py rl --weight out/reason_256.pth --flags "--loss_type dapo --num_generations 16"

Two measurements on the same weights:

rollouts   one sampled reply (temperature 1) to each of --prompts prompts of unequal length, which ends where the model
           ends it: the engine, and transformers' generate on a left-padded batch in each precision, in turn in one
           process. The ratio is to the fastest generate, of tokens per second, in each round
a step     train_grpo.py itself runs for --steps steps on the embedded problems, with --flags. Seconds of a step, median
           of all but the first: sampling (weights refreshed, replies drawn), reward, scoring (the reference's
           log-probabilities), the updates, with the tokens of the replies per second of each
"""

import argparse
import gc
import json
import shlex
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import GenerationConfig

from dataset.demo_data import ensure_demo_data
from dataset.lm_dataset import RLAIFDataset
from model.generation import Engine, Request
from model.LMConfig import PRESETS
from model.loading import load_tokenizer, open_tokenizer, save_weights
from scripts.benchmark_generate import duplicate, open_weights
from trainer import train_grpo
from trainer.runtime.devices import synchronize
from trainer.runtime.flags import COUNT, SWITCH, number
from trainer.runtime.run_log import read_records

PARTS = ("sampling", "reward", "scoring")
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def add_rl_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--weight", type=Path, help="a .pth file or a transformers folder (default: new weights)")
    group.add_argument("--preset", choices=PRESETS, default="minimind2-small", help="of new weights (minimind2-small)")
    group = parser.add_argument_group("work")
    group.add_argument("--data_path", type=Path, help="rows of prompts (default: the demo data's)")
    group.add_argument("--flags", default="", help="of train_grpo.py, in one text (default: none)")
    group.add_argument("--steps", type=number(int, 2), default=6, help="of train_grpo.py, one to warm up (default: 6)")
    group.add_argument("--prompts", type=COUNT, default=64, help="of a rollout (default: 64)")
    group.add_argument("--max_new_tokens", type=COUNT, default=80, help="tokens of a reply at most (default: 80)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps, cpu (default: auto)")
    group.add_argument("--rounds", type=COUNT, default=5, help="times that each rollout is timed (default: 5)")
    group.add_argument("--json", type=Path, help="write the figures to this file too")
    group.add_argument("--seed", type=number(int, 0), default=42, help="of weights and samples (default: 42)")
    group.add_argument("--debug", **SWITCH, default=False, help="show tracebacks of errors")


# -------------------------------------------------------------------------------------------------------- the rollouts


def sample_by_engine(engine: Engine, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> int:
    """Tokens of the replies that the engine of this project draws."""
    seed = args.seed + 1000 * turn
    requests = [
        Request(prompt, max_new_tokens=args.max_new_tokens, temperature=1, seed=seed + i)
        for i, prompt in enumerate(prompts)
    ]
    return sum(len(result.ids) for result in engine.generate(requests))


@torch.inference_mode()
def sample_by_generate(model, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> int:
    """Tokens of the replies that transformers' generate draws for a left-padded batch, up to their ends."""
    pad, end, width = 0, model.config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = GenerationConfig(
        max_new_tokens=args.max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        pad_token_id=pad, eos_token_id=end,
    )  # fmt: skip
    torch.manual_seed(args.seed + 1000 * turn)
    output = model.generate(ids, attention_mask=mask, generation_config=how)[:, width:].tolist()
    return sum(row.index(end) + 1 if end in row else len(row) for row in output)


def measure_rollouts(args: argparse.Namespace, model, prompts: list[list[int]]) -> dict[str, dict]:
    """{contender: {tokens_per_s, over_generate}} on the same prompts."""
    runs = {"engine": (sample_by_engine, Engine(model, max_batch=len(prompts), prefill_chunk=2048))}
    for dtype in PRECISIONS:
        copy = model if dtype == torch.float32 else duplicate(model, dtype)
        runs[f"generate {str(dtype).removeprefix('torch.')}"] = (sample_by_generate, copy)
    rates = defaultdict(list)
    for turn in range(args.rounds + 1):
        for name, (sample, sampler) in runs.items():
            gc.collect()
            synchronize(model.device)
            began = time.perf_counter()
            tokens = sample(sampler, prompts, args, turn)
            synchronize(model.device)
            rates[name].append(tokens / (time.perf_counter() - began))
    rates = {name: values[1:] for name, values in rates.items()}  # the first was to warm up
    fastest = [max(rates[name][i] for name in rates if name != "engine") for i in range(args.rounds)]
    figures = {}
    for name, values in rates.items():
        ratios = sorted(own / theirs for own, theirs in zip(values, fastest, strict=True))
        middle = [statistics.median(ratios), ratios[0], ratios[-1]]
        figures[name] = {"tokens_per_s": statistics.median(values), "over_generate": middle}
    return figures


# --------------------------------------------------------------------------------------------------------------- a step


def measure_steps(args: argparse.Namespace, model, data: Path) -> dict[str, dict[str, float]]:
    """{part: {seconds, share, tokens_per_s}} of the steps of train_grpo.py, from its log."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "start.pth"
        known = {"tokens_seen": 0, "data_path": "", "data_hash": "", "trained_length": args.max_seq_len}
        save_weights(model, weights, stage="reason", **known)
        flags = [f"--data_path={data}", f"--out_dir={folder}", f"--from_weight={weights}", f"--seed={args.seed}"]
        flags += [f"--max_new_tokens={args.max_new_tokens}", f"--max_seq_len={args.max_seq_len}", "--log_interval=1"]
        flags += [f"--max_steps={args.steps}", f"--device={args.device}", "--eval_interval=100000", "--reasoning=1"]
        own = train_grpo.parse_args([*flags, "--save_interval=100000", *shlex.split(args.flags)])
        train_grpo.main(own)
        (log,) = (Path(folder) / "logs").glob("grpo_*.jsonl")
        records = [record for record in read_records(log) if "step_s" in record][1:]
    seconds = {part: statistics.median(record.get(f"{part}_s", 0.0) for record in records) for part in PARTS}
    whole = statistics.median(record["step_s"] for record in records)
    seconds |= {"updates": whole - sum(seconds.values()), "whole": whole}
    replies = own.batch_size * own.accumulation_steps * own.num_generations
    tokens = replies * statistics.median(record["reply_tokens"] for record in records)
    return {
        part: {"seconds": s, "share": s / whole, "tokens_per_s": tokens / s if s > 0 else 0.0}
        for part, s in seconds.items()
    }


def benchmark_rl(args: argparse.Namespace) -> None:
    model = open_weights(args)
    tokenizer = open_tokenizer(None, args.weight, model) if args.weight else load_tokenizer()
    data = args.data_path or ensure_demo_data() / "rlaif.jsonl"
    prompts = RLAIFDataset(data, tokenizer, model.config.max_position_embeddings, reply=args.max_new_tokens)
    args.max_seq_len = prompts.longest + args.max_new_tokens
    every = max(len(prompts) // args.prompts, 1)
    chosen = [prompts.ids[i * every % len(prompts)] for i in range(args.prompts)]
    kind = args.weight or f"new weights of {args.preset}, whose replies hardly ever end"
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {model.device}: {kind}")

    rollouts = measure_rollouts(args, model, chosen)
    print(f"\n{f'rollouts of {args.prompts} prompts':28s}{'tokens/s':>10s}{'over the fastest generate':>30s}")
    for name, each in rollouts.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*each["over_generate"])
        print(f"{name:28s}{each['tokens_per_s']:>10,.0f}{ratio:>30s}")

    print(f"\n$ python trainer/train_grpo.py {args.flags}".rstrip(), flush=True)
    steps = measure_steps(args, model, data)
    print(f"\n{'a step':28s}{'seconds':>10s}{'share':>10s}{'reply tokens/s':>18s}")
    for part, each in steps.items():
        print(f"{part:28s}{each['seconds']:>10.3f}{each['share']:>10.0%}{each['tokens_per_s']:>18,.0f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"torch": torch.__version__, "device": str(model.device), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps(report | {"rollouts": rollouts, "steps": steps}, indent=2) + "\n")
