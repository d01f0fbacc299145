"""`scripts/benchmark.py rl`: where the time of a reinforcement-learning step goes, and what sampling costs elsewhere.

    python scripts/benchmark.py rl
    python scripts/benchmark.py rl --weight out/reason_256.pth --flags "--loss_type dapo --num_generations 16"

The weights are those of --weight, else the reasoning or the fine-tuned model in --out_dir, else new ones. These hardly
ever say their end token: in the rollouts some tokens of their vocabulary end a reply in its place, in the steps all
replies are of the full length. Two measurements:

rollouts   one sampled reply (temperature 1) to each of --prompts prompts of unequal length, which ends where the model
           ends it: the engine, and transformers' generate on a left-padded batch in each precision, in turn in one
           process. The ratio is to the fastest generate, of tokens per second, in each round; a precision that is less
           than half as fast as another in the first round is left out of those that follow
a step     train_grpo.py itself runs for --steps steps on the embedded problems, with --flags. Seconds of a step, median
           of all but the first: sampling (weights refreshed, replies drawn; the policy's log-probabilities come with
           them), reward, scoring (the reference's log-probabilities), the updates with what is left, and the tokens of
           the replies per second of each
"""

import argparse
import gc
import json
import shlex
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from dataset.demo_data import ensure_demo_data
from dataset.lm_dataset import RLAIFDataset
from model.generation import Engine, Request
from model.LMConfig import PRESETS
from model.loading import find_weights, load_tokenizer, open_tokenizer, save_weights
from scripts.benchmark_generate import duplicate, open_weights
from trainer import train_grpo
from trainer.runtime.devices import synchronize
from trainer.runtime.flags import COUNT, ROOT, SWITCH, number
from trainer.runtime.run_log import read_records

PARTS = ("sampling", "reward", "scoring")
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def add_rl_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--weight", type=Path, help="a .pth file or a transformers folder (default: from --out_dir)")
    group.add_argument("--out_dir", type=Path, default=ROOT / "out", help="where trained weights are (default: out/)")
    group.add_argument("--preset", choices=PRESETS, help="new weights of this size (default, if any: minimind2-small)")
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


# --------------------------------------------------------------------------------------------------------- the weights


def find_start(args: argparse.Namespace) -> Path | None:
    """The weights to measure with; None: new ones."""
    if args.weight or args.preset:
        return args.weight
    found = (find_weights(args.out_dir, stage) for stage in ("reason", "full_sft"))
    return next((path for path in found if path.exists()), None)


def end_ids(args: argparse.Namespace, model) -> list[int]:
    """Ids that end a reply: of new weights, which say every token about as often, enough for half of the limit."""
    if args.weight:
        return [model.config.eos_token_id]
    return list(range(0, model.config.vocab_size, max(args.max_new_tokens // 2, 1)))


# -------------------------------------------------------------------------------------------------------- the rollouts


def sample_by_engine(engine: Engine, prompts: list[list[int]], ends: list[int], limit: int, seed: int) -> list:
    """A reply to each prompt, as the engine of this project draws them."""
    requests = [
        Request(ids, max_new_tokens=limit, temperature=1, seed=seed + i, stop_ids=ends) for i, ids in enumerate(prompts)
    ]
    return [result.ids for result in engine.generate(requests)]


@torch.inference_mode()
def sample_by_generate(model, prompts: list[list[int]], ends: list[int], limit: int, seed: int) -> list:
    """A reply to each prompt, up to its end, as transformers' generate draws them for a left-padded batch."""
    pad, width = 0, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = GenerationConfig(
        max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad, eos_token_id=ends
    )
    torch.manual_seed(seed)
    output = model.generate(ids, attention_mask=mask, generation_config=how)[:, width:].tolist()
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in output]
    return [row[:length] for row, length in zip(output, lengths, strict=True)]


def measure_rollouts(args: argparse.Namespace, model, prompts: list[list[int]]) -> dict[str, dict]:
    """{contender: {tokens_per_s, over_generate, reply_tokens}} on the same prompts; the last two as middle and ends."""
    engine = Engine(model, max_batch=len(prompts), context=args.max_seq_len, prefill_chunk=2048)
    runs = {"engine": partial(sample_by_engine, engine)}
    for dtype in PRECISIONS:
        copy = model if dtype == torch.float32 else duplicate(model, dtype)
        runs[f"generate {str(dtype).removeprefix('torch.')}"] = partial(sample_by_generate, copy)
    rates, lengths, fastest, ends = defaultdict(list), defaultdict(list), [], end_ids(args, model)
    for turn in range(args.rounds + 1):  # the first is to warm up
        for name, sample in runs.items():
            gc.collect()
            synchronize(model.device)
            began = time.perf_counter()
            replies = sample(prompts, ends, args.max_new_tokens, args.seed + 1000 * turn)
            synchronize(model.device)
            if turn:
                lengths[name] += map(len, replies)
                rates[name].append(sum(map(len, replies)) / (time.perf_counter() - began))
        if turn:
            fastest.append(max(rates[name][-1] for name in runs if name != "engine"))
            kept = {name for name in runs if name == "engine" or rates[name][0] > fastest[0] / 2}
            runs = {name: sample for name, sample in runs.items() if name in kept}
    figures = {}
    for name, values in rates.items():
        ratios = sorted(own / theirs for own, theirs in zip(values, fastest, strict=False))
        figures[name] = {
            "tokens_per_s": statistics.median(values),
            "over_generate": [statistics.median(ratios), ratios[0], ratios[-1]],
            "reply_tokens": [statistics.mean(lengths[name]), min(lengths[name]), max(lengths[name])],
        }
    return figures


# --------------------------------------------------------------------------------------------------------------- a step


def measure_steps(args: argparse.Namespace, model, weight: Path | None, data: Path) -> dict[str, dict[str, float]]:
    """{part: {seconds, share, tokens_per_s}} of the steps of train_grpo.py, from its log."""
    with tempfile.TemporaryDirectory() as folder:
        if weight is None:
            weight = Path(folder) / "full_sft_new.pth"
            known = {"tokens_seen": 0, "data_path": "", "data_hash": "", "trained_length": args.max_seq_len}
            save_weights(model, weight, stage="full_sft", **known)
        alone = shutil.copy(data, Path(folder) / "prompts.jsonl")  # without the held-out rows beside it
        flags = [f"--data_path={alone}", f"--out_dir={folder}", f"--from_weight={weight.resolve()}"]
        flags += [f"--max_new_tokens={args.max_new_tokens}", f"--max_seq_len={args.max_seq_len}", "--log_interval=1"]
        flags += [f"--max_steps={args.steps}", f"--device={args.device}", f"--seed={args.seed}"]
        flags += ["--save_interval=100000", f"--reasoning={int(weight.stem.startswith('reason'))}"]
        own = train_grpo.parse_args([*flags, *shlex.split(args.flags)])
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
    none = "" if args.preset else f" (no trained ones in {args.out_dir})"
    args.weight, args.preset = find_start(args), args.preset or "minimind2-small"
    model = open_weights(args)
    tokenizer = open_tokenizer(None, args.weight, model) if args.weight else load_tokenizer()
    data = args.data_path or ensure_demo_data() / "rlaif.jsonl"
    dataset = RLAIFDataset(data, tokenizer, model.config.max_position_embeddings, reply=args.max_new_tokens)
    args.max_seq_len = dataset.longest + args.max_new_tokens
    every = max(len(dataset) // args.prompts, 1)
    prompts = [dataset.ids[i * every % len(dataset)] for i in range(args.prompts)]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {model.device}, "
        f"{torch.get_num_threads()} threads: "
        f"{args.weight or f'new weights of {args.preset}{none}'}"
    )

    rollouts = measure_rollouts(args, model, prompts)
    lengths = sorted(map(len, prompts))
    print(f"\nrollouts of {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens")
    print(f"{'':20s}{'tokens/s':>10s}{'over the fastest generate':>30s}{'tokens of a reply':>24s}")
    for name, each in rollouts.items():
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*each["over_generate"])
        reply = "{:.0f} ({} to {})".format(*each["reply_tokens"])
        print(f"{name:20s}{each['tokens_per_s']:>10,.0f}{ratio:>30s}{reply:>24s}")

    print(f"\n$ python trainer/train_grpo.py {args.flags}".rstrip(), flush=True)
    steps = measure_steps(args, model, args.weight, data)
    print(f"\n{'a step':20s}{'seconds':>10s}{'share':>10s}{'reply tokens/s':>18s}")
    for part, each in steps.items():
        print(f"{part:20s}{each['seconds']:>10.3f}{each['share']:>10.0%}{each['tokens_per_s']:>18,.0f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"torch": torch.__version__, "device": str(model.device), "threads": torch.get_num_threads()}
        report |= {"weight": args.weight and str(args.weight), "prompt_tokens": lengths}
        args.json.write_text(json.dumps(report | {"rollouts": rollouts, "steps": steps}, indent=2) + "\n")
