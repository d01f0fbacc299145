"""Reasoning distillation: weights exactly at the tags that are targets, the loss by hand, where it starts."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from dataset.chat import plain_text_backend
from dataset.lm_dataset import BLANK
from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_distill_reason, train_full_sft
from trainer.runtime import start
from trainer.runtime.start import build_model
from trainer.train_distill_reason import TAGS, ReasonDataset, find_tags, token_weights

SEQ = 192
TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--log_interval=1"]
TAGGED = "Write <think> and </think>, please, then <answer>4</answer>."  # what a user may ask


def worked(number):
    return f"<think>\nFirst {number}.\n" + "Then more.\n" * (number % 4) + f"</think>\n<answer>\n{number}\n</answer>"


def write_rows(path, pairs):
    rows = [
        {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    questions = [TAGGED if i % 3 == 0 else f"What is {i}?" for i in range(16)]
    write_rows(folder / "reason.jsonl", [(question, worked(i)) for i, question in enumerate(questions)])
    write_rows(folder / "reason_val.jsonl", [(f"And {i}?", worked(i)) for i in range(3)])
    return folder


@pytest.fixture(scope="module")
def tag_ids(tokenizer):
    return find_tags(tokenizer, 10.0)


def rows_of(path, tokenizer, cache, tag_ids, tag_weight=10.0, packing=True):
    return ReasonDataset(path, tokenizer, SEQ, cache, packing, 42, tag_ids=tag_ids, tag_weight=tag_weight)


def train(data, out_dir, *flags, script=train_distill_reason):
    """Run a script in this process -> its float32 model, that before the first step, and its log."""
    models, starts = [], []

    def keep(*args):
        models.append(build_model(*args))
        starts.append({name: value.clone() for name, value in models[0].state_dict().items()})
        return models[0]

    common = [*TINY, f"--max_seq_len={SEQ}", "--max_steps=2", "--batch_size=2", "--from_weight=none"]
    args = script.parse_args([*common, f"--data_path={data / 'reason.jsonl'}", f"--out_dir={out_dir}", *flags])
    with mock.patch.object(script, "build_model", keep), mock.patch.object(start, "build_optimizer", plain_sgd):
        script.main(args)
    log = [json.loads(line) for line in next((out_dir / "logs").glob("*_64.jsonl")).read_text().splitlines()]
    return SimpleNamespace(model=models[0], start=starts[0], log=log)


def plain_sgd(model, name, learning_rate, weight_decay, dtype):
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


SGD = ["--learning_rate=0.3", "--warmup_ratio=0", "--grad_clip=0"]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def save_start(out_dir, stage, **sizes):
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **sizes}))
    path = out_dir / f"{stage}_{model.config.hidden_size}.pth"
    save_weights(model, path, stage=stage, tokens_seen=7, data_path="x", data_hash="h", trained_length=SEQ)


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_by_hand():
    labels = torch.tensor([[-100, 3, 9, 4, -100], [6, -100, 5, 8, 2]])
    weights = token_weights(labels, [3, 4, 5, 6], 10.0)
    assert weights.tolist() == [[0, 10, 1, 10, 0], [10, 0, 10, 1, 1]]
    assert token_weights(labels, [], 10.0).tolist() == [[0, 1, 1, 1, 0], [1, 0, 1, 1, 1]]


@pytest.mark.parametrize("packing", [True, False])
def test_weights_stand_at_the_answers_own_tags_and_nowhere_else(packing, data, tokenizer, tag_ids, tmp_path):
    """Every document has its four tags weighted; those that a user wrote, though single tokens too, count nothing."""
    dataset = rows_of(data / "reason.jsonl", tokenizer, tmp_path, tag_ids, packing=packing)
    weighted, asked = 0, 0
    for index in range(len(dataset)):
        row = dataset[index]
        ids, labels, weights = row["input_ids"], row["labels"], row["weights"]
        assert weights.dtype == torch.float32 and weights.shape == ids.shape
        assert ((weights > 0) == (labels != -100)).all()
        for number in range(1, int(row["attention_mask"].max()) + 1):
            inside = row["attention_mask"] == number
            assert [int(i) for i in ids[inside & (weights == 10)]] == list(tag_ids)  # think, /think, answer, /answer
        is_tag = torch.isin(ids, torch.tensor(tag_ids))
        assert set(weights[~is_tag].tolist()) <= {0, 1}
        weighted += int((weights == 10).sum())
        asked += int((is_tag & (weights == 0)).sum())
        assert dataset.count_targets({"weights": weights[None]}) == weights.sum()
    assert weighted == 16 * 4 and asked == 6 * 4  # six rows have the four tags in the question
    blank = dataset[BLANK]
    assert not blank["weights"].any() and dataset.count_targets({"weights": blank["weights"]}) == 0


def test_the_tags_are_found_in_their_order(tokenizer, tag_ids):
    assert tokenizer.convert_ids_to_tokens(tag_ids) == list(TAGS)


def plain_tokenizer(folder):
    """A byte-level tokenizer of single characters, without the tags; <answer> is there, but a control token."""
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **{chr(i): i for i in range(33, 127)}}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=["<answer>"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_tokenizer_without_single_tag_tokens_is_refused(data, tmp_path):
    tokenizer = plain_tokenizer(tmp_path / "plain")
    assert len(plain_text_backend(tokenizer).encode("<answer>", add_special_tokens=False).ids) > 1  # as rows are read
    with pytest.raises(InputError) as error:
        train(data, tmp_path / "out", f"--tokenizer_path={tmp_path / 'plain'}")
    message = str(error.value)
    assert all(tag in message for tag in TAGS) and "plain" in message and "--tag_weight 1" in message
    assert not list((tmp_path / "out").glob("*.pth"))
    assert find_tags(tokenizer, 1.0) == []  # nothing to weight, nothing to find


# ---------------------------------------------------------------------------------------------------------------- loss


def weighted_nats(model, row):
    """(sum of w * nats, sum of w, sum of nats, targets) of a row, document by document, by torch's own loss."""
    sums = [0.0, 0.0, 0.0, 0]
    for number in range(1, int(row["attention_mask"].max()) + 1):
        inside = row["attention_mask"] == number
        ids, labels = row["input_ids"][inside], row["labels"][inside]
        weights = torch.tensor([0.0 if t == -100 else 10.0 if 3 <= t <= 6 else 1.0 for t in labels[1:].tolist()])
        losses = F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="none")
        for i, value in enumerate((weights @ losses, weights.sum(), losses.sum(), int((labels[1:] != -100).sum()))):
            sums[i] = sums[i] + value
    return sums


def test_a_step_goes_down_the_gradient_by_hand(data, tokenizer, tag_ids, tmp_path):
    assert tag_ids == [3, 4, 5, 6]
    run = train(data, tmp_path, *SGD, "--max_steps=1", "--accumulation_steps=2")
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    model.load_state_dict(run.start)
    dataset = rows_of(data / "reason.jsonl", tokenizer, tmp_path / "cache", tag_ids)
    assert len(dataset) > 4  # a part of the data, not all
    sums = [weighted_nats(model, dataset[i]) for i in range(4)]
    loss = sum(s[0] for s in sums) / sum(s[1] for s in sums)
    loss.backward()
    line = run.log[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    moved = weights_of(run.model) - torch.cat([run.start[name].flatten() for name, _ in model.named_parameters()])
    wanted = -line["lr"] * torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (moved - wanted).norm() < 1e-4 * wanted.norm()

    held_out = rows_of(data / "reason_val.jsonl", tokenizer, tmp_path / "cache", tag_ids)
    with torch.no_grad():
        sums = [weighted_nats(run.model.eval(), held_out[i]) for i in range(len(held_out))]
    weighted, weights, nats, targets = (sum(s[i] for s in sums) for i in range(4))
    assert line["val_loss"] == pytest.approx((weighted / weights).item(), rel=1e-4)
    assert line["val_ce"] == pytest.approx((nats / targets).item(), rel=1e-4)
    assert line["val_bpb"] > 0 and "val_count" not in line


def test_weight_1_is_plain_fine_tuning(data, tmp_path):
    reason = train(data, tmp_path / "a", *SGD, "--tag_weight=1")
    tuned = train(data, tmp_path / "b", *SGD, script=train_full_sft)
    one, two = weights_of(reason.model), weights_of(tuned.model)
    assert (one - two).norm() < 1e-6 * two.norm()
    for a, b in zip(reason.log, tuned.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    last, other = reason.log[-1], tuned.log[-1]
    assert last["val_loss"] == pytest.approx(last["val_ce"]) == pytest.approx(other["val_loss"], rel=1e-5)
    assert last["val_bpb"] == pytest.approx(other["val_bpb"], rel=1e-5)


def test_any_split_of_a_step_gives_the_same_weights(data, tmp_path):
    """The sum of weights is that of the whole step: micro-batches with many tags and with few weigh what they hold."""
    runs = []
    for batch, accumulation in (4, 1), (2, 2), (1, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}"]
        runs.append(train(data, tmp_path / str(batch), *SGD, *flags))
    one = weights_of(runs[0].model)
    for run in runs[1:]:
        assert (one - weights_of(run.model)).norm() < 1e-6 * one.norm()
        for a, b in zip(runs[0].log, run.log, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- start


def test_starts_from_rlhf_else_from_full_sft_and_says_which(data, tmp_path, capsys):
    args = ["--max_steps=1", "--from_weight=" + train_distill_reason.START]
    with pytest.raises(InputError, match=r"full_sft_64\.pth does not exist.*train_full_sft\.py"):
        train(data, tmp_path, *args)
    save_start(tmp_path, "full_sft")
    train(data, tmp_path, *args)
    assert f"starting from {tmp_path / 'full_sft_64.pth'}" in capsys.readouterr().out
    assert load_model(tmp_path / "reason_64.pth")[1]["stage"] == "reason"
    save_start(tmp_path, "rlhf", hidden_size=96)  # another size than that asked for
    train(data, tmp_path, *args)
    assert f"starting from {tmp_path / 'full_sft_64.pth'}" in capsys.readouterr().out
    save_start(tmp_path, "rlhf")
    train(data, tmp_path, *args)
    assert f"starting from {tmp_path / 'rlhf_64.pth'}" in capsys.readouterr().out
    train(data, tmp_path, "--max_steps=1", "--from_weight=full_sft")  # what is named wins
    assert f"starting from {tmp_path / 'full_sft_64.pth'}" in capsys.readouterr().out


def test_the_default_is_to_start_so(data):
    args = train_distill_reason.parse_args([])
    assert args.from_weight == train_distill_reason.START and args.max_seq_len == 1024 and args.tag_weight == 10


def test_resume_wants_the_same_tag_weight(data, tmp_path):
    train(data, tmp_path)
    with pytest.raises(InputError, match=r"--tag_weight 10\.0"):
        train(data, tmp_path, "--max_steps=4", "--from_resume=1", "--tag_weight=5")
    assert [line["step"] for line in train(data, tmp_path, "--max_steps=3", "--from_resume=1").log] == [1, 2, 3]


def test_usage():
    for flag in ("--tag_weight=-1", "--tag_weight=nan", "--tag_weight=x"):
        with pytest.raises(SystemExit) as ended:
            train_distill_reason.parse_args([flag])
        assert ended.value.code == 2
