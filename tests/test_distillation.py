"""White-box distillation: the loss against torch's own, what counts as a target, every kind of teacher, the script."""

import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from pretended_cuda import PretendedCuda
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.lm_dataset import BLANK, SFTDataset
from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, load_tokenizer, save_weights
from model.model_minimind import MiniMindForCausalLM
from trainer import train_distillation, train_full_sft
from trainer.runtime import start
from trainer.runtime.start import build_model
from trainer.runtime.steps import MODEL_INPUTS, MicroBatch, collate
from trainer.train_distillation import distillation_loss, find_targets, losses_at_targets, read, teach

SEQ = 160
TINY = ["--hidden_size=64", "--num_hidden_layers=2", "--device=cpu", "--dtype=float32", "--log_interval=1"]
CHATS = [(f"Question {i}?", "Answer, " * (1 + i % 5) + f"{i}.") for i in range(22)]
TEACHER = "full_sft_96.pth"


def write_chats(path, pairs):
    rows = [
        {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_teacher(path, **sizes):
    """A random model with distributions far from even; as it reads back from its file."""
    torch.manual_seed(1)
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 96, "num_hidden_layers": 2, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_weights(model, path, stage="full_sft", tokens_seen=0, data_path="x", data_hash="h", trained_length=SEQ)
    return load_model(path)[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Chats, held-out chats, and a teacher as .pth, as MiniMind folder and as Llama folder."""
    home = tmp_path_factory.mktemp("home")
    write_chats(home / "chats.jsonl", CHATS)
    write_chats(home / "chats_val.jsonl", CHATS[:4])
    own = save_teacher(home / "out" / TEACHER)
    own.save_pretrained(home / "own")
    c = own.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(own.state_dict())
    llama.save_pretrained(home / "llama")
    return home


def train(home, out_dir, *flags, script=train_distillation):
    """Run a script in this process -> its float32 model, that before the first step, and its log."""
    models, starts = [], []

    def keep(*args):
        models.append(build_model(*args))
        starts.append({name: value.clone() for name, value in models[0].state_dict().items()})
        return models[0]

    common = [*TINY, f"--max_seq_len={SEQ}", "--max_steps=3", "--batch_size=4", "--from_weight=none"]
    teacher = [f"--teacher={home / 'out' / TEACHER}"] if script is train_distillation else []
    args = script.parse_args([*common, *teacher, f"--data_path={home / 'chats.jsonl'}", f"--out_dir={out_dir}", *flags])
    with mock.patch.object(script, "build_model", keep):
        script.main(args)
    log = [json.loads(line) for line in next((out_dir / "logs").glob("*_64.jsonl")).read_text().splitlines()]
    return SimpleNamespace(model=models[0], start=starts[0], log=log)


def plain_sgd(model, name, learning_rate, weight_decay, dtype):
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


SGD = ["--learning_rate=0.3", "--warmup_ratio=0", "--grad_clip=0"]


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dataset(home, tokenizer, packing=True):
    return SFTDataset(home / "chats.jsonl", tokenizer, SEQ, home / "cache", packing)


def batch_of(rows):
    inputs = {name: values for name, values in collate(rows).items() if name in MODEL_INPUTS}
    return MicroBatch(list(range(len(rows))), inputs, {}, 0, 0)


def reference(student, teacher, targets, alpha, tau):
    """Sum of the losses by torch's own functions, in float64."""
    student, teacher = student.double(), teacher.double()
    kl = F.kl_div((student / tau).log_softmax(-1), (teacher / tau).softmax(-1), reduction="sum")
    return alpha * F.cross_entropy(student, targets, reduction="sum") + (1 - alpha) * tau**2 * kl


# ------------------------------------------------------------------------------------------------------------ the loss


def logits(n=7, vocab=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, vocab, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(vocab, (n,), generator=generator)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_of_torch(alpha, tau):
    student, teacher, targets = logits()
    loss, ce, kl = distillation_loss(student, teacher, targets, alpha, tau)
    assert loss.shape == ce.shape == kl.shape == targets.shape
    expected = reference(student, teacher, targets, alpha, tau)
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-6)
    assert ce.sum().item() == pytest.approx(reference(student, teacher, targets, 1.0, tau).item(), rel=1e-6)
    assert kl.sum().item() * tau**2 == pytest.approx(reference(student, teacher, targets, 0.0, tau).item(), rel=1e-6)
    (grad,), (wanted,) = (torch.autograd.grad(x, student) for x in (loss.sum(), expected))
    torch.testing.assert_close(grad, wanted.float(), rtol=1e-5, atol=1e-6)


def test_loss_of_two_tokens_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308; CE = ln 2 = 0.6931."""
    teacher = torch.tensor([[3.0, 1.0]]).log()
    loss, ce, kl = distillation_loss(torch.zeros(1, 2), teacher, torch.tensor([1]), 0.25, 1.0)
    assert kl.item() == pytest.approx(0.130812, abs=1e-6) and ce.item() == pytest.approx(0.693147, abs=1e-6)
    assert loss.item() == pytest.approx(0.25 * 0.693147 + 0.75 * 0.130812, abs=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, _, targets = logits()
    for tau in (1.0, 3.0):
        loss, _, _ = distillation_loss(student, student.detach().clone(), targets, 0.0, tau)
        assert loss.abs().max() < 1e-6
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert grad.abs().max() < 1e-6


def test_the_square_of_tau_keeps_the_size_of_the_gradient():
    """For large tau, d(tau^2 KL)/dz is (z_student - z_teacher) / V, means left out (arXiv 1503.02531, section 2.1)."""
    student, teacher, targets = logits()
    loss, _, _ = distillation_loss(student, teacher, targets, 0.0, 300.0)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    apart = student.detach() - teacher
    limit = (apart - apart.mean(-1, keepdim=True)) / apart.shape[-1]
    assert (grad - limit).norm() < 0.02 * limit.norm()


# ---------------------------------------------------------------------------------------------- which tokens are taken


def by_document(student, teacher, row, alpha, tau):
    """The loss of a row, document by document, each alone in its forward."""
    total = 0.0
    for number in range(1, int(row["attention_mask"].max()) + 1):
        inside = row["attention_mask"] == number
        ids, labels = row["input_ids"][inside], row["labels"][inside]
        places = (labels != -100).nonzero()[:, 0]
        two = (model(ids[None], use_cache=False).logits[0, places - 1] for model in (student, teacher))
        total = total + reference(*two, labels[places], alpha, tau)
    return total


@pytest.mark.parametrize("kind", [TEACHER, "own", "llama"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_a_packed_row_has_the_loss_of_its_documents_alone(kind, chunk, home, tokenizer):
    """Several documents and padding in a row, for each class of teacher: prompts and padding do not count."""
    path = home / "out" / kind if kind == TEACHER else home / kind
    teacher = LlamaForCausalLM.from_pretrained(path) if kind == "llama" else load_model(path)[0]
    torch.manual_seed(0)
    student = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).train()
    packed = dataset(home, tokenizer)
    rows = [packed[i] for i in range(len(packed))] + [packed[BLANK]]
    assert max(int(row["attention_mask"].max()) for row in rows) > 1  # else nothing is tested
    assert any((row["attention_mask"] == 0).any() for row in rows[:-1])
    batch = batch_of(rows)
    with mock.patch.object(train_distillation, "CHUNK", chunk):
        found = find_targets(batch)
        logits = read(student, batch, found).logits
        losses, ce, kl = losses_at_targets(logits, teach(teacher, batch, found), found, 0.3, 2.0)
        grads = torch.autograd.grad(losses.sum(), list(student.parameters()))
    wanted = batch.inputs["labels"] != -100
    for values in (losses, ce, kl):
        assert values.shape == wanted.shape and ((values != 0) == wanted).all()
    expected = [by_document(student, teacher, row, 0.3, 2.0) for row in rows[:-1]]
    sums = losses.sum(-1)
    torch.testing.assert_close(sums[:-1].double(), torch.stack(expected), rtol=2e-6, atol=0)
    assert sums[-1] == 0
    wanted = torch.autograd.grad(sum(expected), list(student.parameters()))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_gpu_is_never_waited_for(home, tokenizer, monkeypatch):
    """Targets and the borders of documents were found before the batch was there."""
    packed = dataset(home, tokenizer)
    batch, teacher = batch_of([packed[i] for i in range(2)]), load_model(home / "out" / TEACHER)[0]
    student = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).train()
    monkeypatch.setattr("model.model_minimind.document_bounds", lambda mask: pytest.fail("it reads values"))

    def step():
        targets = find_targets(batch)
        logits = read(student, batch, targets).logits
        losses, _, _ = losses_at_targets(logits, teach(teacher, batch, targets), targets, 0.5, 1.0)
        losses.sum().backward()

    step()  # by documents
    with PretendedCuda() as gpu:
        step()
    assert gpu.host_reads == 0


def test_no_float32_copy_of_all_targets_is_kept(home, tokenizer):
    """For a model in bfloat16; the backward pass makes one chunk after the other."""
    packed = dataset(home, tokenizer)
    batch = batch_of([packed[i] for i in range(4)])
    targets = find_targets(batch)
    shape = (len(targets.ids), 6400)
    student, teacher = (torch.randn(shape).bfloat16() for _ in range(2))
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        losses, _, _ = losses_at_targets(student, teacher, targets, 0.5, 2.0)
    assert not [x.shape for x in kept if x.dtype == torch.float32 and x.numel() > 6400]
    losses.sum().backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_the_teacher_is_in_eval_mode_and_gets_no_gradient(home, tokenizer, tmp_path):
    """A teacher with dropout says the same twice."""
    path = tmp_path / "full_sft_96.pth"
    save_teacher(path, dropout=0.5)
    args = train_distillation.parse_args([*TINY, f"--teacher={path}", f"--out_dir={tmp_path}"])
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    teacher, found = train_distillation.load_teacher(args, run)
    assert found == path and not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    batch = batch_of([dataset(home, tokenizer)[0]])
    targets = find_targets(batch)
    assert torch.equal(teach(teacher, batch, targets), teach(teacher, batch, targets))


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.2, 2.0)])
def test_a_step_goes_down_the_gradient_by_hand(alpha, tau, home, tokenizer, tmp_path):
    flags = [*SGD, f"--alpha={alpha}", f"--temperature={tau}", "--max_steps=1", "--batch_size=2"]
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        run = train(home, tmp_path, *flags, "--accumulation_steps=2", "--seed=0")
    student = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2))
    student.load_state_dict(run.start)
    teacher = load_model(home / "out" / TEACHER)[0]
    rows = dataset(home, tokenizer)
    rows = [rows[i] for i in range(min(4, len(rows)))]
    targets = sum(int((row["labels"] != -100).sum()) for row in rows)
    loss = sum(by_document(student, teacher, row, alpha, tau) for row in rows) / targets
    loss.backward()
    line = run.log[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["loss"] == pytest.approx(alpha * line["ce"] + (1 - alpha) * tau**2 * line["kl"], rel=1e-5)
    assert line["val_loss"] == pytest.approx(alpha * line["val_ce"] + (1 - alpha) * tau**2 * line["val_kl"], rel=1e-5)
    assert line["val_bpb"] > 0
    moved = weights_of(run.model) - torch.cat([run.start[name].flatten() for name, _ in student.named_parameters()])
    wanted = -line["lr"] * torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (moved - wanted).norm() < 1e-4 * wanted.norm()


def test_alpha_1_is_plain_fine_tuning(home, tmp_path):
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        distilled = train(home, tmp_path / "a", *SGD, "--alpha=1", "--temperature=3")
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        tuned = train(home, tmp_path / "b", *SGD, script=train_full_sft)
    one, two = weights_of(distilled.model), weights_of(tuned.model)
    assert (one - two).norm() < 1e-6 * two.norm()
    for a, b in zip(distilled.log, tuned.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["ce"] == pytest.approx(b["loss"], rel=1e-5)
    assert distilled.log[-1]["val_bpb"] == pytest.approx(tuned.log[-1]["val_bpb"], rel=1e-5)


def test_a_student_that_starts_as_its_teacher_stays(home, tmp_path):
    flags = [*SGD, "--alpha=0", f"--from_weight={home / 'out' / TEACHER}", "--hidden_size=96"]
    with mock.patch.object(start, "build_optimizer", plain_sgd):
        args = train_distillation.parse_args(
            [*TINY, f"--max_seq_len={SEQ}", "--max_steps=2", f"--teacher={home / 'out' / TEACHER}", *flags,
             f"--data_path={home / 'chats.jsonl'}", f"--out_dir={tmp_path}"]
        )  # fmt: skip
        train_distillation.main(args)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "distill_96.jsonl").read_text().splitlines()]
    assert all(abs(line["loss"]) < 1e-6 and line["grad_norm"] < 1e-4 for line in lines)  # rounding, as CPUs have it
    assert lines[0]["grad_norm"] < 1e-5
    student, info = load_model(tmp_path / "distill_96.pth")
    assert info["stage"] == "distill"
    before = weights_of(load_model(home / "out" / TEACHER)[0])
    assert (weights_of(student) - before).norm() < 1e-5 * before.norm()


def test_any_split_of_a_step_gives_the_same_weights(home, tmp_path):
    runs = []
    for batch, accumulation in (4, 1), (2, 2), (1, 4):
        flags = [f"--batch_size={batch}", f"--accumulation_steps={accumulation}", "--temperature=2", "--max_steps=2"]
        with mock.patch.object(start, "build_optimizer", plain_sgd):
            runs.append(train(home, tmp_path / str(batch), *SGD, *flags))
    one = weights_of(runs[0].model)
    for run in runs[1:]:
        assert (one - weights_of(run.model)).norm() < 1e-6 * one.norm()
        for a, b in zip(runs[0].log, run.log, strict=True):
            for key in ("loss", "ce", "kl", "grad_norm", "val_loss"):
                assert a.get(key) == pytest.approx(b.get(key), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama"])
def test_an_exported_teacher_teaches_what_its_weights_file_does(kind, home, tmp_path):
    pth = train(home, tmp_path / "pth", "--max_steps=2").log
    folder = train(home, tmp_path / "folder", "--max_steps=2", f"--teacher={home / kind}").log
    for a, b in zip(pth, folder, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4) and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_mixtures_teach_and_learn(home, tmp_path):
    save_teacher(tmp_path / "full_sft_96_moe.pth", use_moe=True)
    flags = ["--use_moe", f"--teacher={tmp_path / 'full_sft_96_moe.pth'}", "--max_steps=2"]
    with pytest.raises(StopIteration):  # train() looks for the log of a dense model
        train(home, tmp_path, *flags)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "distill_64_moe.jsonl").read_text().splitlines()]
    assert lines[-1]["peak_expert_load"] >= 1 and lines[-1]["kl"] > 0


def test_resume_wants_the_same_alpha_tau_and_teacher(home, tmp_path):
    train(home, tmp_path, "--max_steps=2")
    save_teacher(tmp_path / "other.pth", num_hidden_layers=1)
    for flags, name in (
        (["--alpha=0.4"], "--alpha 0.5"),
        (["--temperature=2"], "--temperature 1.0"),
        ([f"--teacher={tmp_path / 'other.pth'}"], "teacher hash"),
    ):
        with pytest.raises(InputError, match=name):
            train(home, tmp_path, "--max_steps=4", "--from_resume=1", *flags)
    told = (home / "out" / TEACHER).with_suffix(".json")
    before = told.read_text()
    try:  # the same weights, which compute otherwise
        told.write_text(before.replace('"rope_theta": 1000000.0', '"rope_theta": 10000.0'))
        with pytest.raises(InputError, match="teacher config"):
            train(home, tmp_path, "--max_steps=4", "--from_resume=1")
    finally:
        told.write_text(before)
    resumed = train(home, tmp_path, "--max_steps=4", "--from_resume=1")
    assert [line["step"] for line in resumed.log] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(home, out_dir, *flags):
    with pytest.raises(InputError) as error:
        train(home, out_dir, *flags)
    assert not list(out_dir.glob("*.pth"))
    return str(error.value)


def test_a_missing_teacher_says_what_to_train(home, tmp_path):
    message = refused(home, tmp_path, "--teacher=full_sft")
    assert "full_sft_768.pth does not exist" in message and "trainer/train_full_sft.py" in message
    assert "--preset minimind2" in message and "--teacher" in message
    message = refused(home, tmp_path, "--teacher=rlhf", "--teacher_hidden_size=96")
    assert "rlhf_96.pth" in message and "train_dpo.py" in message
    assert "no/where does not exist" in refused(home, tmp_path, "--teacher=no/where")


def test_a_teacher_is_found_by_its_size(home, tmp_path):
    save_teacher(tmp_path / "rlhf_96.pth")
    assert train(home, tmp_path, "--teacher=rlhf", "--teacher_hidden_size=96", "--max_steps=1").log[0]["kl"] > 0
    with pytest.raises(InputError, match="num_hidden_layers 2, you ask for 3"):
        train(home, tmp_path, f"--teacher={home / 'out' / TEACHER}", "--teacher_num_hidden_layers=3")


def test_a_teacher_with_another_vocabulary_is_refused(home, tmp_path):
    save_teacher(home / "small.pth", vocab_size=6000)
    message = refused(home, tmp_path, f"--teacher={home / 'small.pth'}")
    assert "small.pth" in message and "6000" in message and "6400" in message


def test_a_teacher_with_other_ids_is_refused(home, tmp_path, tokenizer):
    """A folder that brings its tokenizer: the same number of tokens, two of them exchanged."""
    folder = home / "exchanged"
    load_model(home / "own")[0].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert train(home, tmp_path / "same", f"--teacher={folder}", "--max_steps=1").log[0]["kl"] > 0
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    message = refused(home, tmp_path / "other", f"--teacher={folder}")
    assert str(folder) in message and str(load_tokenizer().name_or_path) in message and "other ids" in message


def test_usage(home):
    for flag in ("--alpha=1.5", "--temperature=0", "--alpha=-1"):
        with pytest.raises(SystemExit) as ended:
            train_distillation.parse_args([flag])
        assert ended.value.code == 2
