"""DPO: the loss against hand-made numbers and trl, log-probabilities in packed rows, the cached reference, the run."""

import copy
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.lm_dataset import BLANK, DPODataset, sum_by_pair
from model.errors import InputError, run_script
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_dpo
from trainer.runtime import run as run_module
from trainer.runtime import start
from trainer.runtime.checkpoint import config_hash
from trainer.runtime.run import Run
from trainer.runtime.start import build_model
from trainer.runtime.steps import micro_batches

SEQ = 256
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = ["--device=cpu", f"--max_seq_len={SEQ}", "--batch_size=4", "--log_interval=1", "--eval_interval=100"]
COMMON += ["--save_interval=100", "--learning_rate=1e-3"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(question, good, bad):
    asked = {"role": "user", "content": question}
    return {"chosen": [asked, {"role": "assistant", "content": good}],
            "rejected": [asked, {"role": "assistant", "content": bad}]}  # fmt: skip


ROWS = [pair(f"What is {i}?", f"It is {i}, of course. " * (1 + 4 * (i % 2)), "No. " * (1 + i % 5)) for i in range(24)]


def make_model(seed=0, **keys):
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**SIZES, **keys))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model.eval()


def moved(model, seed=1):
    """A policy some steps away from its reference."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
    return other


def save_model(model, path):
    save_weights(model, path, stage="full_sft", tokens_seen=7, data_path="x", data_hash="h", trained_length=64)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("dpo")
    write_rows(home / "pairs.jsonl", ROWS)
    write_rows(home / "pairs_val.jsonl", ROWS[:5])
    save_model(make_model(), home / "full_sft_64.pth")
    return home


def flags_of(home, out_dir, *flags):
    start = f"--from_weight={home / 'full_sft_64.pth'}"
    return [*COMMON, "--dtype=float32", start, f"--data_path={home / 'pairs.jsonl'}", f"--out_dir={out_dir}", *flags]


def train(home, out_dir, *flags):
    """Run the script in this process -> its policy, the log's lines, its output folder."""
    models = []

    def keep(*args):
        models.append(build_model(*args))
        return models[-1]

    with mock.patch.object(train_dpo, "build_model", keep):
        train_dpo.main(train_dpo.parse_args([str(flag) for flag in flags_of(home, out_dir, *flags)]))
    (log,) = (out_dir / "logs").glob("*.jsonl")
    return SimpleNamespace(model=models[0], log=[json.loads(line) for line in log.read_text().splitlines()])


def new_run(home, out_dir, *flags):
    return Run(train_dpo.parse_args([str(flag) for flag in flags_of(home, out_dir, *flags)]), "rlhf")


def dataset_of(home, tokenizer, cache, packing=True):
    return DPODataset(home / "pairs.jsonl", tokenizer, SEQ, cache, packing)


def pairs_of(dataset):
    """(chosen, rejected) of each pair of the cache, each as (ids, is_target)."""
    cache = dataset.cache
    for begin, end, border in zip(cache.bounds[:-1], cache.bounds[1:], cache.borders, strict=True):
        cuts = slice(begin, begin + border), slice(begin + border, end)
        yield [(torch.tensor(cache.ids[cut].astype("int64")), torch.tensor(cache.targets[cut])) for cut in cuts]


def logprob_alone(model, ids, is_target):
    """log pi of the targets of one sequence, from the logits."""
    logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
    return (logprobs[:-1].gather(1, ids[1:, None])[:, 0] * is_target[1:]).sum()


# -------------------------------------------------------------------------------------------------------------- loss


def test_loss_by_hand():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.5))
    odds = 1 / (1 + math.exp(-0.1 * (1.0 + 0.5)))  # D is +1 and -0.5
    loss = train_dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    assert loss.item() == pytest.approx(-math.log(odds), rel=1e-6)
    loss = train_dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.2)
    assert loss.item() == pytest.approx(-0.8 * math.log(odds) - 0.2 * math.log(1 - odds), rel=1e-6)


def test_gradient_by_hand():
    """The paper's: - beta sigmoid(r_rejected - r_chosen) on the chosen log-probability, the opposite on the other."""
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in (-3.0, -4.0))
    train_dpo.dpo_loss(chosen, rejected, torch.tensor(-5.0), torch.tensor(-4.5), beta=0.5).backward()
    weight = 1 / (1 + math.exp(0.5 * (2.0 - 0.5)))
    assert chosen.grad.item() == pytest.approx(-0.5 * weight, rel=1e-6)
    assert rejected.grad.item() == pytest.approx(0.5 * weight, rel=1e-6)


@pytest.fixture(scope="module")
def trl_trainer(tokenizer, tmp_path_factory):
    """trl's DPOTrainer on the same weights in transformers' own Llama."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    llamas = []
    for model in (moved(make_model()), make_model()):
        names = ["intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size"]
        sizes = SIZES | {name: getattr(model.config, name) for name in names}
        llamas.append(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)))
        llamas[-1].load_state_dict(model.state_dict(), strict=True)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    return DPOTrainer(llamas[0], llamas[1], config, train_dataset=rows, processing_class=tokenizer)


def trl_batch(pairs):
    """Pairs, right-padded, in the form of trl's collator: the chosen ones first."""
    sides = [side for which in (0, 1) for side in (pair[which] for pair in pairs)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _ in sides], batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in sides], batch_first=True),
        "completion_mask": pad([target.long() for _, target in sides], batch_first=True),
    }


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "loss_type, theirs, beta, smoothing, at_once",
    [
        ("sigmoid", "sigmoid", 0.1, 0.0, 24),
        ("sigmoid", "aot", 0.3, 0.2, 1),  # on a single pair trl's "aot" is DPO with label smoothing
        ("sigmoid_norm", "sigmoid_norm", 5.0, 0.0, 24),
    ],
)
def test_loss_rewards_and_gradients_are_those_of_trl(
    loss_type, theirs, beta, smoothing, at_once, home, tmp_path, tokenizer, trl_trainer
):
    reference = make_model()
    policy = moved(reference)
    dataset = dataset_of(home, tokenizer, tmp_path / "cache")
    flags = [f"--loss_type={loss_type}", f"--beta={beta}", f"--label_smoothing={smoothing}"]
    run = new_run(home, tmp_path, *flags)
    train_dpo.add_reference(dataset, reference, "r", run)

    # ours: packed rows
    (batch,) = micro_batches(dataset, run, [list(range(len(dataset)))])
    token_losses = policy(**batch.inputs, return_logits=False).token_losses
    losses, meters = train_dpo.preference_losses(token_losses, batch, run.args)
    loss = losses.sum() / batch.targets
    loss.backward()
    assert batch.targets == 24

    # trl's: padded batches
    trl_trainer.beta, trl_trainer.loss_types, trl_trainer.label_smoothing = beta, [theirs], smoothing
    trl_trainer._metrics["train"].clear()
    trl_trainer.model.zero_grad()
    pairs, wanted = list(pairs_of(dataset)), 0.0
    for first in range(0, 24, at_once):
        part = trl_trainer._compute_loss(trl_trainer.model, trl_batch(pairs[first : first + at_once]), False)
        (part * at_once / 24).backward()
        wanted += part.item() * at_once / 24

    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in trl_trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        largest = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * largest)
    told = {name: sum(values) / len(values) for name, values in trl_trainer._metrics["train"].items()}
    ours = {name: float(value) / 24 for name, value in meters.items()}
    if loss_type == "sigmoid":  # with the other one, too, trl logs sums over tokens
        for name, their_name in (
            ("accuracy", "rewards/accuracies"),
            ("margin", "rewards/margins"), ("chosen_reward", "rewards/chosen"), ("rejected_reward", "rewards/rejected"),
            ("chosen_logprob", "logps/chosen"), ("rejected_logprob", "logps/rejected"),
        ):  # fmt: skip
            assert ours[name] == pytest.approx(told[their_name], rel=1e-4, abs=1e-5), name


def test_ties_count_half_and_absent_pairs_nothing(home, tmp_path, tokenizer):
    """The policy is the reference: all margins are 0, and the loss of each pair is log 2; blank rows add nothing."""
    dataset, run, model = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path), make_model()
    train_dpo.add_reference(dataset, model, "r", run)
    pairs = {len(dataset.pieces_of(index)): index for index in range(len(dataset))}
    (batch,) = micro_batches(dataset, run, [[*pairs.values(), BLANK]])
    losses, meters = train_dpo.preference_losses(
        model(**batch.inputs, return_logits=False).token_losses, batch, run.args
    )
    counts = batch.inputs["attention_mask"].amax(1) // 2
    assert counts.tolist() == [*pairs, 0] and len(pairs) >= 2 and batch.targets == sum(pairs)
    assert (losses > 0).sum(1).tolist() == counts.tolist()
    torch.testing.assert_close(losses.sum(1), counts * math.log(2), rtol=1e-6, atol=0)
    assert float(meters["accuracy"]) == batch.targets / 2


def test_a_process_without_rows_has_a_gradient_of_zero(home, tmp_path, tokenizer):
    dataset, run, model = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path), make_model()
    train_dpo.add_reference(dataset, model, "r", run)
    (batch,) = micro_batches(dataset, run, [[BLANK, BLANK]])
    losses, _ = train_dpo.preference_losses(model(**batch.inputs, return_logits=False).token_losses, batch, run.args)
    losses.sum().backward()
    assert losses.sum() == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_packed_logprobs_are_those_of_each_answer_alone(home, tmp_path, tokenizer):
    model, dataset = make_model(), dataset_of(home, tokenizer, tmp_path / "cache")
    wanted = [[logprob_alone(model, *side).item() for side in sides] for sides in pairs_of(dataset)]
    found = 0
    for index in range(len(dataset)):
        row = {name: values[None] for name, values in dataset[index].items()}
        sums = sum_by_pair(-model(**row, return_logits=False).token_losses, row["attention_mask"])[0]
        for number, logprobs in zip(dataset.pieces_of(index), sums.tolist(), strict=True):
            assert logprobs == pytest.approx(wanted[number], rel=1e-5)
            found += 1
    assert found == 24


# ------------------------------------------------------------------------------------------------------ the reference


def test_reference_values_and_their_place(home, tmp_path, tokenizer):
    model, dataset = make_model(), dataset_of(home, tokenizer, tmp_path / "cache")
    assert "reference" not in dataset[0]
    train_dpo.add_reference(dataset, model, "r", new_run(home, tmp_path))
    assert not torch.is_inference(next(model.parameters())) and dataset.reference.dtype == "float32"
    for values, sides in zip(dataset.reference, pairs_of(dataset), strict=True):
        assert values.tolist() == pytest.approx([logprob_alone(model, *side).item() for side in sides], rel=1e-5)
    row = dataset[0]
    opens = row["attention_mask"] != F.pad(row["attention_mask"], (1, -1))
    assert (row["reference"] != 0).equal(opens & (row["attention_mask"] > 0))
    assert row["reference"][opens & (row["attention_mask"] > 0)].tolist() == [
        value for number in dataset.pieces_of(0) for value in dataset.reference[number].tolist()
    ]


def test_reference_is_computed_once(home, tmp_path, tokenizer):
    dataset, run, model = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path), make_model()
    train_dpo.add_reference(dataset, model, "r", run)
    again = dataset_of(home, tokenizer, tmp_path / "cache", packing=False)  # the same pairs, in other rows
    with mock.patch.object(train_dpo, "reference_logprobs", side_effect=AssertionError):
        train_dpo.add_reference(again, model, "r", run)
        assert (again.reference == dataset.reference).all()
        with pytest.raises(AssertionError):
            train_dpo.add_reference(again, model, "s", run)  # other weights
        with pytest.raises(AssertionError):
            train_dpo.add_reference(again, model, "r", new_run(home, tmp_path, "--dtype=bfloat16"))
        write_rows(tmp_path / "other.jsonl", ROWS[1:])
        with pytest.raises(AssertionError):
            other = DPODataset(tmp_path / "other.jsonl", tokenizer, SEQ, tmp_path / "cache")
            train_dpo.add_reference(other, model, "r", run)
        with pytest.raises(AssertionError):
            longer = DPODataset(home / "pairs.jsonl", tokenizer, 2 * SEQ, tmp_path / "cache")
            train_dpo.add_reference(longer, model, "r", run)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_reference_is_computed_anew(damage, home, tmp_path, tokenizer):
    dataset, run, model = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path), make_model()
    train_dpo.add_reference(dataset, model, "r", run)
    (path,) = (tmp_path / "cache").glob("*/reference_r_*_float32.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] if damage is None else damage)
    train_dpo.add_reference(dataset, model, "r", run)
    assert path.read_bytes() == whole


def test_reference_is_computed_as_in_evaluation(home, tmp_path, tokenizer):
    """Whatever the policy's dropout, and the policy goes on training."""
    dataset, run = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path)
    model = make_model(dropout=0.5).train()
    train_dpo.add_reference(dataset, model, "r", run)
    assert model.training
    model.eval()
    for values, sides in zip(dataset.reference, pairs_of(dataset), strict=True):
        assert values.tolist() == pytest.approx([logprob_alone(model, *side).item() for side in sides], rel=1e-5)


@pytest.mark.parametrize(
    "field",
    [{"rope_theta": 10.0}, {"num_attention_heads": 8, "num_key_value_heads": 4}, {"rms_norm_eps": 1e-2},
     {"inference_rope_scaling": True, "original_max_position_embeddings": 32}],
)  # fmt: skip
def test_equal_weights_that_compute_otherwise_share_no_reference(field, home, tmp_path, tokenizer):
    dataset, run, model = dataset_of(home, tokenizer, tmp_path / "cache"), new_run(home, tmp_path), make_model()
    other = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **field}))
    other.load_state_dict(model.state_dict())
    assert train_dpo.weights_hash(other) == train_dpo.weights_hash(model)
    train_dpo.add_reference(dataset, model, "r", run)
    first = dataset.reference
    train_dpo.add_reference(dataset, other.eval(), "r", run)
    assert abs(dataset.reference - first).max() > 1e-3
    sides = next(pairs_of(dataset))
    assert dataset.reference[0].tolist() == pytest.approx([logprob_alone(other, *s).item() for s in sides], rel=1e-5)


def test_what_a_reference_is_not_computed_with_makes_no_other_one():
    """Special ids, the trained length, dropout: a run sets them, or they train alone."""
    for field in {"eos_token_id": 5}, {"original_max_position_embeddings": 77}, {"dropout": 0.5}:
        assert config_hash(MiniMindConfig(**SIZES, **field)) == config_hash(MiniMindConfig(**SIZES))


def test_the_reference_of_a_resumed_run_computes_as_the_policy(home, tmp_path):
    """A public .pth does not tell its heads and rotary base: the checkpoint does. What tells others is refused."""
    model, run = make_model(rope_theta=1e4), new_run(home, tmp_path)
    path = save_model(model, tmp_path / "public.pth")
    run.checkpoint, run.args.from_weight = {"of": "a run"}, str(path)
    path.with_suffix(".json").write_text(path.with_suffix(".json").read_text().replace("10000.0", "1000000.0"))
    with pytest.raises(InputError, match=r"rope_theta 1000000\.0.* 10000\.0"):
        train_dpo.open_reference(run.args, model, run)
    path.with_suffix(".json").unlink()
    config = train_dpo.open_reference(run.args, model, run).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.rope_theta) == (4, 2, 1e4)


def test_hash_follows_every_weight():
    model = make_model()
    hashes = {train_dpo.weights_hash(model), train_dpo.weights_hash(copy.deepcopy(model))}
    assert len(hashes) == 1
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1e-4
        hashes.add(train_dpo.weights_hash(model))
    assert len(hashes) == 1 + len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------------------ the run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_loss_is_log_2(dtype, home, tmp_path):
    log = train(home, tmp_path, "--max_steps=1", f"--dtype={dtype}").log
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6 if dtype == "float32" else 1e-3)
    assert abs(log[0]["margin"]) < (1e-5 if dtype == "float32" else 1e-2)


def test_preferences_are_learned_and_saved(home, tmp_path):
    run = train(home, tmp_path, "--max_steps=10", "--learning_rate=0.01")
    first, last = run.log[0], run.log[-1]
    assert last["loss"] < 0.5 < first["loss"] and last["accuracy"] == last["val_accuracy"] == 1.0
    assert last["val_loss"] < 0.5 and last["val_margin"] > 0.5
    assert last["val_margin"] == pytest.approx(last["val_chosen_reward"] - last["val_rejected_reward"], rel=1e-5)
    model, info = load_model(tmp_path / "rlhf_64.pth")
    assert info["stage"] == "rlhf" and info["trained_length"] == SEQ // 2 and info["tokens_seen"] > 7
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, run.model.state_dict()[name], atol=1e-3, rtol=1e-3)


def test_accumulation_is_exact(home, tmp_path):
    """4 x 1 and 1 x 4 rows take the same step: the loss is a mean over pairs, of which rows hold different numbers."""

    def plain_sgd(model, name, learning_rate, weight_decay, dtype):
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    runs = []
    for batch, accumulation in (4, 1), (1, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", "--max_steps=2", "--grad_clip=0"]
        with mock.patch.object(start, "build_optimizer", plain_sgd):
            runs.append(train(home, tmp_path / str(batch), *flags))
    one, many = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs)
    begin = torch.cat([p.flatten() for p in load_model(home / "full_sft_64.pth")[0].parameters()])
    assert (one - begin).norm() > 1e-6 and (one - many).norm() < 1e-4 * (one - begin).norm()
    assert runs[0].log[-1]["loss"] == pytest.approx(runs[1].log[-1]["loss"], rel=1e-6)


def test_experts_stay_balanced(home, tmp_path):
    save_model(make_model(use_moe=True), tmp_path / "start.pth")
    start = f"--from_weight={tmp_path / 'start.pth'}"
    run = train(home, tmp_path, start, "--max_steps=2", "--learning_rate=0")
    assert run.log[0]["peak_expert_load"] >= 1 and run.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.log[0]["grad_norm"] > 0
    assert (tmp_path / "rlhf_64_moe.pth").exists()


def test_a_resumed_run_keeps_its_reference(home, tmp_path):
    """Stopped in the middle and resumed, the weights are those of a run in peace, though nothing is computed again."""
    peace = train(home, tmp_path / "peace", "--max_steps=6", "--save_interval=100")

    class Stop(Exception):
        pass

    def stop_after(steps, *args):
        for step in training_steps(*args):
            if step.number > 3:
                raise Stop
            yield step

    training_steps = run_module.training_steps
    flags = ["--max_steps=6", "--save_interval=3"]
    with (
        mock.patch.object(run_module, "training_steps", lambda *args: stop_after(3, *args)),
        pytest.raises(Stop),
    ):
        train(home, tmp_path / "cut", *flags)
    with mock.patch.object(train_dpo, "reference_logprobs", side_effect=AssertionError):
        resumed = train(home, tmp_path / "cut", *flags, "--from_resume=1")
    assert [line["loss"] for line in resumed.log] == [line["loss"] for line in peace.log]
    for a, b in zip(peace.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def ends(flags, capsys):
    """(exit code, message) of a run that must fail with one sentence."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train_dpo.parse_args([str(flag) for flag in flags]), train_dpo.main)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return ended.value.code, err


def test_resume_with_another_reference_or_beta_is_refused(home, tmp_path, capsys):
    train(home, tmp_path, "--max_steps=1")
    save_model(make_model(seed=5), tmp_path / "other.pth")
    for flag, word in (
        (f"--from_weight={tmp_path / 'other.pth'}", "reference weights"),
        ("--beta=0.3", "--beta"),
        ("--label_smoothing=0.1", "--label_smoothing"),
        ("--loss_type=sigmoid_norm", "--loss_type"),
    ):
        before = (tmp_path / "rlhf_64.pth").read_bytes()
        flags = ["--max_steps=3", "--from_resume=1", "--beta=0.1", flag]
        code, err = ends(flags_of(home, tmp_path, *flags), capsys)
        assert code == 1 and re.search(rf"^error: .*rlhf_64_resume.pth was written with {word} ", err, re.MULTILINE)
        assert (tmp_path / "rlhf_64.pth").read_bytes() == before


def test_missing_start_and_bad_flags(home, tmp_path, capsys):
    code, err = ends([*flags_of(home, tmp_path), "--from_weight=full_sft"], capsys)
    assert code == 1 and "train it with trainer/train_full_sft.py" in err
    for flag in ("--beta=-1", "--label_smoothing=0.7", "--loss_type=simpo", "--beta=nan"):
        assert ends([*flags_of(home, tmp_path), flag], capsys)[0] == 2
    code, err = ends([*flags_of(home, tmp_path), "--max_seq_len=16"], capsys)
    assert code == 1 and "no row is left" in err
    assert not (tmp_path / "rlhf_64.pth").exists()


def test_beta_follows_the_kind_of_loss():
    assert train_dpo.parse_args([]).beta == 0.1
    assert train_dpo.parse_args(["--loss_type=sigmoid_norm"]).beta == 5
    assert train_dpo.parse_args(["--loss_type=sigmoid_norm", "--beta=0"]).beta == 0


def test_a_bad_held_out_row_stops_before_the_first_step(home, tmp_path):
    path = write_rows(tmp_path / "val.jsonl", [ROWS[0], pair("?", "same", "same")])
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}:2: .* same answer"):
        train(home, tmp_path, f"--val_path={path}")
    assert not (tmp_path / "checkpoints").exists()
