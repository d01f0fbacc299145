"""Reinforcement learning in small: a model, prompts, and a reward model whose opinions differ."""

import json
from unittest import mock

import numpy as np
import torch
from small_runs import read_log, write_rows

from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime import rl

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
COMMON = ["--device=cpu", "--dtype=float32", "--optimizer=adamw", "--max_seq_len=64", "--max_new_tokens=6"]
COMMON += ["--log_interval=1", "--warmup_ratio=0", "--rewards=reward_model=1", "--eval_interval=100", "--top_k=50"]


def write_world(folder, **sizes):
    """Prompts with held-out ones, full_sft_32.pth and reward_32.pth -> the flags of a run in this folder."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    config = MiniMindConfig(**{**SIZES, **sizes})
    known = {"tokens_seen": 0, "data_path": "x", "data_hash": "h", "trained_length": 64}
    policy, judge = MiniMindForCausalLM(config), MiniMindForScoring(config)
    torch.nn.init.normal_(judge.score.weight, std=0.2)
    moe = "_moe" if config.use_moe else ""
    save_weights(policy, folder / f"full_sft_32{moe}.pth", stage="full_sft", **known)
    save_weights(judge, folder / f"reward_32{moe}.pth", stage="reward", **known)
    rows = [
        {
            "conversations": [{"role": "user", "content": "Say something. " * (1 + i % 3) + str(i)}],
            "answer": str(i),
        }
        for i in range(13)
    ]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(folder / "prompts_val.jsonl", rows[:3])
    return [*COMMON, f"--data_path={folder / 'prompts.jsonl'}", f"--out_dir={folder}"]


def train_small(script, folder, *flags, **sizes):
    """A script in this process, in a world of its own, for 2 steps of 8 prompts -> its log."""
    flags = [*write_world(folder, **sizes), "--batch_size=4", "--accumulation_steps=2", "--max_steps=2", *flags]
    script.main(script.parse_args(flags))
    return read_log(folder, script)


def rewarded_for_even_ids():
    """Around a run: the reward is the share of even ids, which sampling finds soon."""

    def reward(terms, replies):
        return {"reward": torch.tensor([np.mean([i % 2 == 0 for i in reply.ids or [1]]) for reply in replies]).float()}

    return mock.patch.object(rl, "score", reward)


def checkpoint_of(out_dir, stage):
    return torch.load(out_dir / "checkpoints" / f"{stage}_32_resume.pth", weights_only=True)


def log_of(out_dir, stage):
    """Its lines without what a machine's pace and memory decide."""
    lines = [json.loads(line) for line in (out_dir / "logs" / f"{stage}_32.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if not key.endswith(("_s", "_mb"))} for line in lines]


def actor_of(out_dir, stage):
    """The float32 weights of the policy in one vector."""
    weights = checkpoint_of(out_dir, stage)["engines"]["actor"]["weights"]
    return torch.cat([value.flatten() for value in weights.values()])


def start_of(out_dir):
    """Those that it began with."""
    state = torch.load(out_dir / "full_sft_32.pth", weights_only=True)
    state.pop("lm_head.weight")
    return torch.cat([value.float().flatten() for value in state.values()])


def same(a, b):
    """Whether two nested structures have the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
