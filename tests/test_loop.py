"""The loop against one written out by hand, bit for bit; and checkpoints of the format before today's."""

import json

import pytest
import torch

from dataset.lm_dataset import PretrainDataset
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_pretrain
from trainer.runtime.checkpoint import read_checkpoint, read_whole, same_bits
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run

STEPS, BATCH, ACCUMULATION = 6, 4, 2
FLAGS = ["--device=cpu", "--dtype=float32", "--max_seq_len=64", "--packing=0", "--eval_interval=4"]
FLAGS += [f"--batch_size={BATCH}", f"--accumulation_steps={ACCUMULATION}", "--warmup_ratio=0.4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """37 texts, held-out ones, and weights to start from: with dropout, and a mixture."""
    home = tmp_path_factory.mktemp("home")
    rows = [{"text": f"第{i}句话：" + "the quick brown fox jumps. " * (1 + i % 4)} for i in range(37)]
    for name, part in ("texts", rows), ("texts_val", rows[:7]):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name, kind in ("dense", {"dropout": 0.1}), ("mixture", {"use_moe": True}):
        torch.manual_seed(3)
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, **kind))
        save_weights(
            model, home / f"{name}.pth", stage="pretrain", tokens_seen=0, data_path="x", data_hash="h",
            trained_length=64,
        )  # fmt: skip
    return home


def train(home, out_dir, *flags):
    args = [*FLAGS, f"--data_path={home / 'texts.jsonl'}", f"--out_dir={out_dir}", f"--max_steps={STEPS}", *flags]
    train_pretrain.main(train_pretrain.parse_args(list(map(str, args))))
    (checkpoint,) = (out_dir / "checkpoints").glob("*_resume.pth")
    (log,) = (out_dir / "logs").glob("*.jsonl")
    return checkpoint, [json.loads(line) for line in log.read_text().splitlines()]


def written_out(home, start, optimizer_name, rates, tokenizer, cache):
    """The same steps, in one piece of plain PyTorch -> weights by name, the loss of each step."""
    model = load_model(home / f"{start}.pth")[0].train()
    dataset = PretrainDataset(home / "texts.jsonl", tokenizer, 64, cache, packing=False, seed=42)
    optimizer = build_optimizer(model, optimizer_name, 1.0, 0.1, torch.float32)
    rows = []
    for epoch in range(2):  # the last step of an epoch takes what is left
        dataset.set_epoch(epoch)
        for first in range(0, len(dataset), BATCH * ACCUMULATION):
            of_step = range(first, min(first + BATCH * ACCUMULATION, len(dataset)))
            rows.append([dataset[i] for i in of_step])
    torch.manual_seed(42)
    losses = []
    for of_step, rate in zip(rows, rates, strict=False):
        targets = sum(int((row["labels"] != -100).sum()) for row in of_step)
        told = 0.0
        for first in range(0, len(of_step), BATCH):
            part = of_step[first : first + BATCH]
            inputs = {name: torch.stack([row[name] for row in part]) for name in part[0]}
            output = model(**inputs, return_logits=False)
            loss = output.token_losses.sum() / targets
            told = told + output.token_losses.detach().flatten(1).sum(1).sum() / targets
            if output.aux_loss is not None:
                loss = loss + output.aux_loss * len(part) / len(of_step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(told))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses


@pytest.mark.parametrize(("start", "optimizer"), [("dense", "muon"), ("dense", "adamw"), ("mixture", "muon")])
def test_a_run_has_the_bits_of_a_loop_written_out(start, optimizer, home, tokenizer, tmp_path):
    """Rows, dropout, accumulation, balance, schedule: an evaluation and a save in between change nothing."""
    flags = [f"--from_weight={home / start}.pth", f"--optimizer={optimizer}", "--learning_rate=0.01"]
    path, log = train(home, tmp_path, *flags, "--log_interval=1", "--save_interval=2")
    peak, steps = 0.01, STEPS  # 3 steps to warm up, then 3 down: 1/3 2/3 1, and 1 2/3 1/3 of which the first is past
    rates = [peak * 1 / 3, peak * 2 / 3, peak * 3 / 3, peak, peak * 2 / 3, peak * 1 / 3]
    assert [line["lr"] for line in log] == rates and len(rates) == steps
    weights, losses = written_out(home, start, optimizer, rates, tokenizer, tmp_path / "cache")
    found = read_checkpoint(path)["engines"]["model"]["weights"]
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, found[name]), name
    assert [line["loss"] for line in log] == losses


def test_a_checkpoint_of_format_1_goes_on(home, tmp_path, monkeypatch):
    """It had one model, and sums of the means of steps since the last line of the log; else it is as it was."""
    flags = [f"--from_weight={home / 'dense.pth'}", "--save_interval=3", "--log_interval=2"]
    whole, log = train(home, tmp_path / "whole", *flags)
    save = Run.save

    def save_and_stop(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save_and_stop)
        train(home, tmp_path / "old", *flags)
    path = tmp_path / "old" / "checkpoints" / whole.name
    content = torch.load(path, weights_only=True)
    place = content["place"]
    (total, steps) = place["meters"]["loss"]
    assert (place["step"], steps) == (3, 1)  # step 3 is not told yet
    old = {key: content[key] for key in ("config", "identity", "random")} | content["engines"]["model"]
    torch.save({**old, "format": 1, "place": {**place, "meters": ({"loss": total}, 2)}}, path)
    resumed, again = train(home, tmp_path / "old", *flags, "--from_resume=1")
    assert [line["loss"] for line in log] == [line["loss"] for line in again]
    expected, found = (read_whole(path.parents[1]) for path in (whole, resumed))
    same_bits(expected, found)
