"""The reward model: the loss against hand-made numbers and trl, scores in packed rows and alone, files, the run."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from dataset.lm_dataset import BLANK, DPODataset
from dataset.rows import read_jsonl
from model.errors import InputError, run_script
from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_full_sft, train_reward
from trainer.runtime import start
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run
from trainer.runtime.steps import micro_batches

SEQ = 256
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = ["--device=cpu", "--dtype=float32", f"--max_seq_len={SEQ}", "--batch_size=4", "--log_interval=1"]
COMMON += ["--eval_interval=100", "--save_interval=100", "--learning_rate=1e-3"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(question, good, bad):
    asked = {"role": "user", "content": question}
    return {"chosen": [asked, {"role": "assistant", "content": good}],
            "rejected": [asked, {"role": "assistant", "content": bad}]}  # fmt: skip


ROWS = [pair(f"What is {i}?", f"It is {i}, of course. " * (1 + 4 * (i % 2)), "No. " * (1 + i % 5)) for i in range(20)]


def make_model(kind=MiniMindForScoring, **keys):
    torch.manual_seed(0)
    model = kind(MiniMindConfig(**SIZES, **keys))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.1)
    return model.eval()


def save_model(model, path, stage="full_sft"):
    save_weights(model, path, stage=stage, tokens_seen=7, data_path="x", data_hash="h", trained_length=64)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("reward")
    write_rows(home / "pairs.jsonl", ROWS)
    write_rows(home / "pairs_val.jsonl", ROWS[:5])
    save_model(make_model(MiniMindForCausalLM), home / "full_sft_64.pth")
    return home


def flags_of(home, out_dir, *flags):
    start = f"--from_weight={home / 'full_sft_64.pth'}"
    return [*COMMON, start, f"--data_path={home / 'pairs.jsonl'}", f"--out_dir={out_dir}", *map(str, flags)]


def train(home, out_dir, *flags):
    """Run the script in this process -> the log's lines."""
    train_reward.main(train_reward.parse_args(flags_of(home, out_dir, *flags)))
    (log,) = (out_dir / "logs").glob("*.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def batch(home, tmp_path, tokenizer):
    """All pairs in packed rows, and a row of padding; with the dataset that they come from."""
    dataset = DPODataset(home / "pairs.jsonl", tokenizer, SEQ, tmp_path / "cache")
    run = Run(train_reward.parse_args(flags_of(home, tmp_path)), "reward")
    (batch,) = micro_batches(dataset, run, [[*range(len(dataset)), BLANK]])
    return SimpleNamespace(dataset=dataset, all=batch)


def scores_of(model, batch):
    return train_reward.read(model, batch).scores


def conversations(home, side):
    return [row[side] for _, row in read_jsonl(home / "pairs.jsonl")]


# -------------------------------------------------------------------------------------------------------------- loss


def test_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0], requires_grad=True), torch.tensor([0.5, 1.0], requires_grad=True)
    losses = train_reward.bradley_terry_loss(chosen, rejected)
    odds = [1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(2.0))]
    assert losses.tolist() == pytest.approx([-math.log(p) for p in odds], rel=1e-6)
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([p - 1 for p in odds], rel=1e-6)
    assert rejected.grad.tolist() == pytest.approx([1 - p for p in odds], rel=1e-6)


def test_losses_of_a_batch_by_hand(batch):
    """Made-up scores of all tokens: those of the last answer tokens count, no others; absent pairs add nothing."""
    labels, documents = batch.all.inputs["labels"], batch.all.inputs["attention_mask"]
    scores = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0))
    losses, centering, meters = train_reward.preference_losses(scores, batch.all)
    wanted, squares, right = [], [], 0
    for row in range(len(labels)):
        found = []
        for document in range(1, int(documents[row].max()) + 1):
            places = ((documents[row] == document) & (labels[row] != -100)).nonzero()[:, 0]
            found.append(scores[row, places[-1]].item())
        wanted.append(sum(math.log1p(math.exp(bad - good)) for good, bad in zip(found[::2], found[1::2], strict=True)))
        squares.append(sum((good + bad) ** 2 for good, bad in zip(found[::2], found[1::2], strict=True)))
        right += sum(good > bad for good, bad in zip(found[::2], found[1::2], strict=True))
    assert batch.all.targets == 20 and wanted[-1] == 0 and 0 < right < 20
    assert losses.sum(1).tolist() == pytest.approx(wanted, rel=1e-5)
    assert centering.sum(1).tolist() == pytest.approx(squares, rel=1e-5)
    assert float(meters["accuracy"]) == right
    assert float(meters["margin"]) == pytest.approx(float(meters["chosen_score"] - meters["rejected_score"]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_loss_and_gradients_are_those_of_trl(batch, home, tmp_path, tokenizer):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = make_model()
    losses, centering, _ = train_reward.preference_losses(scores_of(model, batch.all), batch.all)
    loss = (losses + 0.05 * centering).sum() / batch.all.targets
    loss.backward()

    names = ["intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size"]
    sizes = SIZES | {name: getattr(model.config, name) for name in names}
    llama = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=tokenizer.pad_token_id))
    llama.load_state_dict(model.state_dict(), strict=True)
    config = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        center_rewards_coefficient=0.05, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"chosen": "a b", "rejected": "c d"}])
    trainer = RewardTrainer(llama, args=config, train_dataset=rows, processing_class=tokenizer)
    texts = [text for side in ("chosen", "rejected") for text in conversations(home, side)]
    ids = [tokenizer.apply_chat_template(text, return_dict=False)[:-1] for text in texts]  # without the newline
    assert all(sequence[-1] == tokenizer.eos_token_id for sequence in ids)
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad([torch.tensor(sequence) for sequence in ids], batch_first=True)
    mask = pad([torch.ones(len(sequence), dtype=torch.long) for sequence in ids], batch_first=True)
    theirs = trainer.compute_loss(trainer.model, {"input_ids": padded, "attention_mask": mask})
    theirs.backward()

    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in llama.named_parameters()}
    for name, parameter in model.named_parameters():
        largest = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest)


# ------------------------------------------------------------------------------------------------------------ scores


def test_packed_scores_are_those_of_each_conversation_alone(batch, home, tokenizer):
    """And those of get_scores, whatever its batches, so that RL sees what training saw."""
    model = make_model()
    packed = torch.full((20, 2), math.nan)
    found = train_reward.answer_scores(scores_of(model, batch.all), batch.all)
    for index, row in zip(batch.all.rows, found.detach(), strict=False):
        for number, values in zip(batch.dataset.pieces_of(index), row, strict=False):
            packed[batch.dataset.piece_lines[number] - 1] = values
    for side, name in enumerate(("chosen", "rejected")):
        turns = conversations(home, name)
        one_by_one = [model.get_scores(tokenizer, [conversation])[0] for conversation in turns]
        torch.testing.assert_close(packed[:, side], torch.tensor(one_by_one), rtol=1e-5, atol=1e-5)
        for batch_size in (3, 64):
            assert model.get_scores(tokenizer, turns, batch_size) == pytest.approx(one_by_one, rel=1e-5, abs=1e-5)
    assert packed.std() > 0.1


def test_the_borders_of_documents_are_not_sought_again(batch, monkeypatch):
    """On a GPU that would be to wait for it: they were found before the batch was there."""
    model, inputs = make_model(), batch.all.inputs
    by_mask = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).scores
    monkeypatch.setattr("model.model_minimind.document_bounds", lambda mask: pytest.fail("it reads values"))
    assert torch.equal(scores_of(model, batch.all), by_mask)


def test_score_of_an_answer_that_was_cut_is_that_of_its_last_kept_token(tmp_path, tokenizer, home):
    path = write_rows(tmp_path / "long.jsonl", [pair("Why?", "So it is. " * 40, "No.")])
    dataset = DPODataset(path, tokenizer, SEQ, tmp_path / "cache")
    run = Run(train_reward.parse_args(flags_of(home, tmp_path)), "reward")
    (batch,) = micro_batches(dataset, run, [[0]])
    model = make_model()
    ids = dataset.cache.ids[: SEQ // 2].astype(int).tolist()
    assert dataset.cache.borders.tolist() == [SEQ // 2] and ids[-1] != tokenizer.eos_token_id
    (chosen, _) = train_reward.answer_scores(scores_of(model, batch), batch)[0, 0].tolist()
    assert chosen == pytest.approx(model.score_ids([ids])[0], rel=1e-5)


def test_empty_answers_have_scores_and_questions_have_none(tokenizer):
    model, asked = make_model(), {"role": "user", "content": "Why?"}
    empty, full = ([asked, {"role": "assistant", "content": text}] for text in ("", "So."))
    scores = model.get_scores(tokenizer, [empty, full])
    assert len(set(scores)) == 2 and all(math.isfinite(score) for score in scores)
    assert model.get_scores(tokenizer, []) == []
    with pytest.raises(ValueError, match="last turn"):
        model.get_scores(tokenizer, [full, [asked]])


def test_a_new_head_scores_zero_and_shares_the_layers():
    language_model = make_model(MiniMindForCausalLM)
    model = MiniMindForScoring.from_language_model(language_model)
    ids = torch.randint(3, 97, (2, 9))
    assert model(ids).scores.shape == (2, 9) and not model(ids).scores.any()
    assert model.model is language_model.model and not model.training
    assert {name for name, _ in model.named_parameters() if not name.startswith("model.")} == {"score.weight"}
    assert not MiniMindForScoring(MiniMindConfig(**SIZES)).score.weight.any()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_scores_are_float32_under_autocast():
    model = make_model()
    ids = torch.randint(3, 97, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(ids).scores
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_head_is_no_matrix_to_the_optimizer(optimizer):
    model = make_model()
    groups = build_optimizer(model, optimizer, 1e-3, 0.1).param_groups
    (group,) = [group for group in groups if any(p is model.score.weight for p in group["params"])]
    assert group["weight_decay"] == 0 and not group.get("muon")


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("experts", [False, True])
def test_files_are_read_back_and_told_from_language_models(experts, home, tmp_path):
    model = make_model(use_moe=experts).half().float()
    path = save_model(model, tmp_path / "reward_64.pth", "reward")
    state = torch.load(path, weights_only=True)
    assert state.keys() == model.state_dict().keys() and "score.weight" in state and "lm_head.weight" not in state
    again, info = load_model(path, kind=MiniMindForScoring)
    assert type(again) is MiniMindForScoring and not again.training and info["stage"] == "reward"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"reward_64\.pth is a reward model, not a language model: "):
        load_model(path)
    with pytest.raises(InputError, match=r"full_sft_64\.pth is a language model, not a reward model: train one with"):
        load_model(home / "full_sft_64.pth", kind=MiniMindForScoring)
    path.with_suffix(".json").unlink()  # sizes from the shapes
    again, _ = load_model(path, kind=MiniMindForScoring, config_overrides={"num_attention_heads": 4})
    assert torch.equal(again.score.weight, model.score.weight)


def test_a_file_without_all_its_weights_is_refused(tmp_path):
    path = save_model(make_model(), tmp_path / "reward_64.pth", "reward")
    state = torch.load(path, weights_only=True)
    del state["model.norm.weight"]
    torch.save(state, path)
    with pytest.raises(InputError, match=r"lacks model\.norm\.weight"):
        load_model(path, kind=MiniMindForScoring)


def test_transformers_folders(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "own")
    again, _ = load_model(tmp_path / "own", kind=MiniMindForScoring)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    LlamaForSequenceClassification(LlamaConfig(**SIZES, intermediate_size=64, vocab_size=99)).save_pretrained(
        tmp_path / "foreign"
    )
    with pytest.raises(InputError, match="no folder of MiniMind's own"):
        load_model(tmp_path / "foreign", kind=MiniMindForScoring)


# ------------------------------------------------------------------------------------------------------------ the run


def test_preferences_are_learned_and_saved(home, tmp_path, tokenizer):
    log = train(home, tmp_path, "--max_steps=8", "--learning_rate=3e-3")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and log[0]["accuracy"] == 0.5
    assert log[-1]["accuracy"] == log[-1]["val_accuracy"] == 1.0 and log[-1]["val_loss"] < 0.3
    model, info = load_model(tmp_path / "reward_64.pth", kind=MiniMindForScoring)
    assert info["stage"] == "reward" and info["trained_length"] == SEQ // 2 and info["tokens_seen"] > 7
    good, bad = (model.get_scores(tokenizer, conversations(home, side)[:5]) for side in ("chosen", "rejected"))
    assert min(a - b for a, b in zip(good, bad, strict=True)) > 0
    assert sum(good) / 5 == pytest.approx(log[-1]["val_chosen_score"], abs=0.02)
    assert sum(bad) / 5 == pytest.approx(log[-1]["val_rejected_score"], abs=0.02)


def test_centering_enters_the_step_with_its_weight(batch, home, tmp_path):
    """A step of plain SGD with and without it differs by the gradient of mean (R_chosen + R_rejected)^2."""

    def plain_sgd(model, name, learning_rate, weight_decay, dtype):
        model.score.weight.data.fill_(0.05)
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    heads = []
    for center in (0, 0.5):
        flags = [f"--center={center}", "--batch_size=100", "--max_steps=1", "--grad_clip=0", "--learning_rate=0.1"]
        with mock.patch.object(start, "build_optimizer", plain_sgd):
            train(home, tmp_path / str(center), *flags)
        path = tmp_path / str(center) / "checkpoints" / "reward_64_resume.pth"
        heads.append(torch.load(path, weights_only=True)["engines"]["model"]["weights"]["score.weight"])
    model = MiniMindForScoring.from_language_model(load_model(home / "full_sft_64.pth")[0])
    model.score.weight.data.fill_(0.05)
    _, centering, _ = train_reward.preference_losses(scores_of(model, batch.all), batch.all)
    (centering.sum() / 20).backward()
    torch.testing.assert_close(heads[0] - heads[1], 0.1 * 0.5 * model.score.weight.grad, rtol=1e-3, atol=1e-6)


def test_accumulation_is_exact(home, tmp_path):
    def plain_sgd(model, name, learning_rate, weight_decay, dtype):
        model.score.weight.data.fill_(0.05)  # else the layers have no gradient in the first step
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    weights = []
    for batch, accumulation in (4, 1), (1, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", "--max_steps=2", "--grad_clip=0"]
        with mock.patch.object(start, "build_optimizer", plain_sgd):
            train(home, tmp_path / str(batch), *flags, "--learning_rate=0.1")
        checkpoint = torch.load(tmp_path / str(batch) / "checkpoints" / "reward_64_resume.pth", weights_only=True)
        weights.append(torch.cat([value.flatten() for value in checkpoint["engines"]["model"]["weights"].values()]))
    begin = load_model(home / "full_sft_64.pth")[0].model
    moved = weights[0][:-64] - torch.cat([p.detach().flatten() for p in begin.parameters()])
    assert moved.norm() > 1e-4 and (weights[0] - weights[1]).norm() < 1e-4 * moved.norm()


def test_experts_stay_balanced(home, tmp_path):
    path = save_model(make_model(MiniMindForCausalLM, use_moe=True), tmp_path / "start.pth")
    log = train(home, tmp_path, f"--from_weight={path}", "--max_steps=2")
    assert log[0]["peak_expert_load"] >= 1 and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert load_model(tmp_path / "reward_64_moe.pth", kind=MiniMindForScoring)[0].config.use_moe


def ends(script, flags, capsys):
    """(exit code, message) of a run that must fail with one sentence."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: script.parse_args([str(flag) for flag in flags]), script.main)
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("\n") >= 1
    return ended.value.code, err


def test_a_reward_model_is_no_start_for_a_language_model(home, tmp_path, capsys):
    path = save_model(make_model(), tmp_path / "reward_64.pth", "reward")
    for script in train_full_sft, train_reward:
        code, err = ends(script, flags_of(home, tmp_path, f"--from_weight={path}"), capsys)
        assert code == 1 and f"error: {path} is a reward model, not a language model" in err


def test_bad_flags_and_rows(home, tmp_path, capsys):
    for flag in ("--center=-1", "--center=nan", "--beta=0.1"):
        assert ends(train_reward, flags_of(home, tmp_path, flag), capsys)[0] == 2
    path = write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"chosen": ROWS[0]["chosen"]}])
    code, err = ends(train_reward, flags_of(home, tmp_path, f"--data_path={path}"), capsys)
    assert code == 1 and f'error: {path}:2: a preference row needs "chosen" and "rejected"' in err
    log = train(home, tmp_path, "--max_steps=1")
    code, err = ends(train_reward, flags_of(home, tmp_path, "--max_steps=2", "--from_resume=1", "--center=0"), capsys)
    assert code == 1 and "was written with --center 0.01, now it is 0" in err and len(log) == 1
