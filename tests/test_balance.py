"""The balance loss of a mixture in the step of every stage: by how much it moves each weight, from its own gradient."""

import json
from unittest import mock

import pytest
import torch
from small_runs import SEQ, TINY, chat, plain_sgd, write_rows

from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import (
    train_distill_reason,
    train_distillation,
    train_dpo,
    train_full_sft,
    train_lora,
    train_pretrain,
    train_reward,
)
from trainer.runtime import start
from trainer.runtime.engine import Engine

STAGES = {  # script: its data, its own flags
    train_pretrain: ("texts", []),
    train_full_sft: ("chats", []),
    train_dpo: ("pairs", ["--max_seq_len=128"]),
    train_reward: ("pairs", ["--max_seq_len=128"]),
    train_distillation: ("chats", ["--teacher=TEACHER"]),
    train_distill_reason: ("chats", []),
}
RATE = 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Six rows of each kind; the same mixture with and without a balance loss; a teacher."""
    home = tmp_path_factory.mktemp("balance")
    chats = [chat(f"Question {i}?", "Answer, " * (1 + i % 3) + f"{i}.") for i in range(6)]
    bad = [chat(f"Question {i}?", "No.") for i in range(6)]
    sides = zip(chats, bad, strict=True)
    pairs = [{"chosen": a["conversations"], "rejected": b["conversations"]} for a, b in sides]
    texts = [{"text": f"Sentence {i} of a text. " * (1 + i % 3)} for i in range(6)]
    for name, rows in ("chats", chats), ("pairs", pairs), ("texts", texts):
        write_rows(home / f"{name}.jsonl", rows)
    torch.manual_seed(0)
    state = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, use_moe=True)).state_dict()
    for name, sizes in (
        ("on", {"use_moe": True, "aux_loss_alpha": 10.0}),
        ("off", {"use_moe": True, "aux_loss_alpha": 0.0}),
        ("teacher", {}),
    ):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, **sizes))
        if sizes:
            model.load_state_dict(state)
        keys = {"stage": "full_sft", "tokens_seen": 0, "data_path": "x", "data_hash": "h", "trained_length": SEQ}
        save_weights(model, home / f"{name}.pth", **keys)
    return home


def one_step(script, home, out_dir, name, data, *flags):
    """A step of plain SGD from home/<name>.pth, six rows in one micro-batch -> weights, the model's inputs."""
    given, call = [], Engine.__call__

    def watched(engine, **inputs):
        given.append({key: inputs[key] for key in ("input_ids", "attention_mask")})
        return call(engine, **inputs)

    flags = [*TINY[2:], f"--max_seq_len={SEQ}", "--packing=0", "--batch_size=6", "--max_steps=1", *flags]
    flags += [f"--learning_rate={RATE}", "--warmup_ratio=0", "--grad_clip=0", f"--from_weight={home / name}.pth"]
    flags += [f"--data_path={home / data}.jsonl", f"--out_dir={out_dir / name}"]
    flags = [flag.replace("TEACHER", str(home / "teacher.pth")) for flag in flags]
    with mock.patch.object(start, "build_optimizer", plain_sgd), mock.patch.object(Engine, "__call__", watched):
        script.main(script.parse_args(flags))
    (checkpoint,) = (out_dir / name / "checkpoints").glob("*_resume.pth")
    (inputs,) = given
    return torch.load(checkpoint, weights_only=True)["engines"]["model"]["weights"], inputs


@pytest.mark.parametrize("script", STAGES, ids=lambda script: script.__name__.split("_", 1)[1])
def test_a_step_goes_down_the_balance_loss(script, home, tmp_path):
    """Steps with and without it differ by its gradient, times the learning rate, in every weight."""
    data, flags = STAGES[script]
    (on, inputs), (off, same) = (one_step(script, home, tmp_path, name, data, *flags) for name in ("on", "off"))
    assert all(torch.equal(inputs[key], same[key]) for key in inputs) and len(inputs["input_ids"]) == 6
    model = load_model(home / "on.pth")[0]
    model = MiniMindForScoring.from_language_model(model) if script is train_reward else model
    model(**inputs).aux_loss.backward()
    routers = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted = -RATE * parameter.grad
            assert (on[name] - off[name] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7, name
            routers += name.endswith("mlp.gate.weight") and bool(wanted.norm() > 1e-4)
    assert routers == 2


def test_adapters_leave_it_out(home, tmp_path):
    """Their router is frozen: a mixture's adapter is the same with and without a balance loss."""
    write_rows(home / "lora_identity.jsonl", [json.loads(line) for line in (home / "chats.jsonl").open()])
    flags = ["--lora_rank=2", "--lora_targets", "all"]
    on, off = (one_step(train_lora, home, tmp_path, name, "chats", *flags)[0] for name in ("on", "off"))
    moved = [name for name in on if "lora" in name and on[name].any()]
    assert len(moved) > 2 and all(torch.equal(on[name], off[name]) for name in on)
