"""LoRA: the module, merging, experts, training (its files: test_lora_files.py)."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from small_lora import FILE, base_model, logits, lora_of, trained_adapter
from torch import nn

from model import functional, loss, model_minimind
from model.errors import InputError, UsageError, run_script
from model.LMConfig import MiniMindConfig
from model.loading import load_model, read_state_dict, save_weights
from model.model_lora import (
    DEFAULT_TARGETS,
    TARGETS,
    LoRALinear,
    adapter_settings,
    attach,
    detach,
    merge,
    target_names,
    unmerge,
)
from model.model_minimind import MiniMindForCausalLM
from trainer import train_lora
from trainer.runtime import start

# ----------------------------------------------------------------------------------------------------------- the module


def test_an_untrained_adapter_changes_nothing_and_only_the_adapter_trains():
    model = base_model()
    expected, weights = logits(model), dict(model.named_parameters())
    attach(model)
    assert torch.equal(logits(model), expected)
    assert adapter_settings(model) == {"rank": 8, "alpha": 8, "targets": ["q_proj", "o_proj"]}
    for name, value in model.named_parameters():
        assert value.requires_grad == (".lora." in name)
        assert ".lora." in name or value is weights[name]  # the same parameter under the same name
    a = torch.cat([value.flatten() for name, value in lora_of(model).items() if ".A." in name])
    assert abs(a.std() - 0.02) < 0.002 and abs(a.mean()) < 0.002
    assert all((value == 0).all() for name, value in lora_of(model).items() if ".B." in name)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "o_proj"], ["k_proj,v_proj", "up_proj"], ["all"]])
def test_targets_are_chosen_by_name(targets):
    model = base_model()  # its q_proj and o_proj are square, and nothing asks
    attach(model, targets=targets)
    chosen = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert chosen == (set(TARGETS) if targets == ["all"] else set(",".join(targets).split(",")))
    blocks = model.model.layers
    assert all(sum(isinstance(m, LoRALinear) for m in block.modules()) == len(chosen) for block in blocks)


def test_keys_are_those_of_the_public_files():
    model = base_model()
    before = set(model.state_dict())
    attach(model)
    names = {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")}
    assert set(model.state_dict()) - before == {f"{n}.lora.{m}.weight" for n in names for m in "AB"}
    state = model.state_dict()
    assert state["model.layers.0.self_attn.q_proj.lora.A.weight"].shape == (8, 64)
    assert state["model.layers.0.self_attn.o_proj.lora.B.weight"].shape == (64, 8)


def test_the_formula():
    model = trained_adapter(base_model(), rank=3, alpha=6.0, targets=["down_proj"])
    layer, x = model.model.layers[1].mlp.down_proj, torch.randn(5, 192)
    weight = layer.weight + 6.0 / 3 * layer.lora.B.weight @ layer.lora.A.weight
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)


def test_deepcopy_pickle_compile():
    model = trained_adapter(base_model())
    expected = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(value for name, value in twin.named_parameters() if ".lora.B." in name).add_(1)
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)  # nothing is shared
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    mlp, x = trained_adapter(base_model(), targets=["all"]).model.layers[0].mlp, torch.randn(2, 5, 64)
    torch.testing.assert_close(torch.compile(mlp, backend="eager", fullgraph=True)(x), mlp(x), atol=1e-6, rtol=1e-5)
    torch.compiler.reset()


def test_the_base_computes_as_in_eval():
    """Dropout would make two passes differ; in training mode it is on before the adapter comes and off after it."""
    model = base_model(dropout=0.3).train()
    assert not torch.equal(logits(model), logits(model))
    attach(model)
    assert model.training and torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model), logits(base_model()))


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, ["all"]])
def test_merge_and_unmerge_are_exact_and_idempotent(targets):
    model = trained_adapter(base_model(), targets=targets)
    expected, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert (expected - logits(base_model())).abs().max() > 0.1
    for _ in range(2):
        merge(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    merged = logits(model)
    assert set(model.state_dict()) == set(before)  # what is kept to unmerge is in no file
    for _ in range(2):
        unmerge(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(logits(model), expected)
    merge(model)
    assert torch.equal(logits(model), merged)


def test_detach_leaves_a_plain_model():
    model = trained_adapter(base_model(), targets=["all"])
    expected = logits(model)
    merge(model)
    detach(model)
    plain = base_model(seed=9)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(type(module) is type(other) for module, other in zip(model.modules(), plain.modules(), strict=True))
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    model = trained_adapter(base_model())
    detach(model)  # without merging: the base again
    assert torch.equal(logits(model), logits(base_model()))
    attach(model)  # and room for another adapter


@torch.no_grad()
def test_adapters_on_a_bfloat16_base():
    """The sum is taken in float32 and rounded once; what was there comes back; a forward beside it is near."""
    exact, half = (
        trained_adapter(base_model(), targets=["all"]),
        trained_adapter(base_model().bfloat16(), targets=["all"]),
    )
    for name, value in lora_of(exact).items():
        half.get_parameter(name).copy_(value)
        exact.get_parameter(name).copy_(value.bfloat16())
    expected = logits(exact)
    assert (expected - logits(base_model())).abs().max() > 0.2
    assert logits(half).dtype == torch.bfloat16
    assert (logits(half) - expected).abs().max() < 0.03 * expected.abs().max()
    layer = half.model.layers[0].self_attn.q_proj
    base, a, b = layer.weight.clone(), layer.lora.A.weight.float(), layer.lora.B.weight.float()
    merge(half)
    assert torch.equal(layer.weight, (base.float() + b @ a).bfloat16())
    assert (logits(half) - expected).abs().max() < 0.03 * expected.abs().max()
    unmerge(half)
    assert torch.equal(layer.weight, base)


# ---------------------------------------------------------------------------------------------------------- experts


def test_experts_take_adapters():
    model = trained_adapter(base_model(use_moe=True), targets=["gate_proj", "down_proj"])
    layers = [path for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 2 * (4 + 1) * 2  # layers, routed and shared experts, names
    assert not isinstance(model.model.layers[0].mlp.gate, LoRALinear)
    expected = logits(model)
    assert (expected - logits(base_model(use_moe=True))).abs().max() > 0.01
    merge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_the_grouped_product_of_a_gpu_does_not_leave_adapters_out(target, monkeypatch):
    """It reads the experts' weights and would miss what stands beside them: no gradient would come (meta tensors)."""
    monkeypatch.setattr(model_minimind, "can_group", lambda x, weight: True)
    for module in (model_minimind, loss):
        monkeypatch.setattr(module, "compute_dtype", lambda x: x.dtype)

    class Off:
        def __init__(self, *args, **keys): ...

        def __enter__(self): ...

        def __exit__(self, *error): ...

    monkeypatch.setattr(torch, "autocast", Off)  # meta tensors know no autocast
    grouped = []
    run = functional.grouped_experts
    monkeypatch.setattr(model_minimind, "grouped_experts", lambda *args: grouped.append(1) or run(*args))
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, use_moe=True))
        model = model.to(torch.bfloat16)
        attach(model, targets=[target])
        ids = torch.zeros(2, 8, dtype=torch.long)
        model(ids, attention_mask=torch.ones_like(ids), labels=ids, return_logits=False).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(lora_of(model))
    assert bool(grouped) == (target == "q_proj")


@pytest.mark.parametrize("targets", [["wq"], ["q_proj", "lm_head"], ["q_proj,all"], [""]])
def test_unknown_targets_are_named_with_the_known(targets):
    with pytest.raises(UsageError, match=r"LoRA has no target .*q_proj, k_proj.*down_proj, or all"):
        attach(base_model(), targets=targets)


def test_attach_refuses_what_it_cannot_do():
    model = base_model()
    attach(model)
    with pytest.raises(UsageError, match="adapter already"):
        attach(model)
    with pytest.raises(InputError, match="no linear layer called"):
        attach(nn.Sequential(nn.Linear(2, 2)))
    assert target_names(["o_proj", "q_proj,o_proj"]) == ("q_proj", "o_proj")


# ----------------------------------------------------------------------------------------------------------- training

PAIRS = [(f"Question {i}?", f"Answer {i}, " * 3) for i in range(12)]


def write_chats(path, pairs):
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["dense", "moe"])
def home(request, tmp_path_factory):
    """An out folder with base weights, and data."""
    folder = tmp_path_factory.mktemp(request.param)
    write_chats(folder / "chats.jsonl", PAIRS)
    write_chats(folder / "chats_val.jsonl", PAIRS[:3])
    model = base_model(use_moe=request.param == "moe")
    keys = {**FILE, "stage": "full_sft"}
    save_weights(model, folder / "out" / f"full_sft_64{'_moe' * model.config.use_moe}.pth", **keys)
    return folder


def flags_of(home, *flags, data=True):
    common = ["--device=cpu", "--dtype=float32", "--max_seq_len=64", "--batch_size=4", "--log_interval=1"]
    given = [f"--data_path={home / 'chats.jsonl'}"] if data else []
    return [*common, *given, f"--out_dir={home / 'out'}", *flags]


def train(home, *flags):
    """Train in this process -> the adapter's file, the log."""
    args = train_lora.parse_args(flags_of(home, *flags))
    train_lora.main(args)
    (path,) = (home / "out" / "lora").glob(f"{args.lora_name}_64*.pth")
    log = (home / "out" / "logs" / f"{path.stem}.jsonl").read_text().splitlines()
    return path, [json.loads(line) for line in log]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss_and_changes_the_adapter_alone(optimizer, home, monkeypatch):
    models = []
    build = train_lora.build_model
    monkeypatch.setattr(train_lora, "build_model", lambda *args: models.append(build(*args)) or models[0])
    path, log = train(
        home, f"--lora_name=lora_{optimizer}", f"--optimizer={optimizer}", "--max_steps=12", "--learning_rate=0.03",
        "--lora_targets", "q_proj", "up_proj,down_proj", "--lora_rank=4", "--lora_alpha=8",
    )  # fmt: skip
    assert log[-1]["loss"] < log[0]["loss"] - 0.5 and log[-1]["val_loss"] < log[0]["loss"] - 0.5
    (base,) = (home / "out").glob("full_sft_64*.pth")
    before, after = load_model(base)[0], models[0]
    state = after.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    written = read_state_dict(path)
    assert set(written) == set(lora_of(after))
    assert all(torch.equal(value.half(), written[name]) for name, value in lora_of(after).items())
    assert all(value.any() for value in written.values())  # every B has left zero
    info = json.loads(path.with_suffix(".json").read_text())
    assert info["lora"] == {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj", "down_proj"]}
    assert info["base"]["name"] == base.name and len(info["base"]["hash"]) == 32
    assert info["stage"] == f"lora_{optimizer}" and ("peak_expert_load" in log[-1]) == before.config.use_moe


def test_resume_is_exact_and_asks_for_the_same_settings(home, capsys, monkeypatch):
    flags = ["--max_steps=6", "--save_interval=3", "--learning_rate=0.03"]
    whole, _ = train(home, "--lora_name=whole", *flags)
    save = train_lora.Run.save

    def save_and_stop(run):
        save(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lora.Run, "save", save_and_stop)
        train(home, "--lora_name=parts", *flags)
    again = ["--lora_name=parts", "--from_resume=1", *flags]
    capsys.readouterr()
    for change, said in (
        ("--lora_rank=4", "--lora_rank 8, now it is 4"),
        ("--lora_alpha=4", "--lora_alpha 8.0, now it is 4.0"),
        ("--lora_targets=v_proj", "--lora_targets q_proj o_proj, now it is v_proj"),
    ):
        assert said in fails(home, capsys, *again, change)
    (base,) = (home / "out").glob("full_sft_64*.pth")
    kept = base.read_bytes()
    base.write_bytes(kept + b" ")
    assert "hash of the base weights" in fails(home, capsys, *again)
    base.unlink()  # the checkpoint holds the base too
    try:
        parts, log = train(home, *again)
    finally:
        base.write_bytes(kept)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    expected, found = read_state_dict(whole), read_state_dict(parts)
    assert all(torch.equal(value, found[name]) for name, value in expected.items()) and len(expected) == len(found)
    info = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, parts)]
    assert info[0]["base"] == info[1]["base"]


def fails(home, capsys, *flags, code=1, data=True):
    """The one sentence of a training that cannot start."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train_lora.parse_args(flags_of(home, *flags, data=data)), train_lora.main)
    error = capsys.readouterr().err
    assert ended.value.code == code and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_bad_starts(home, capsys):
    files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    missing = fails(home, capsys, "--lora_name=lora_cooking", data=False)
    assert "dataset/lora_cooking.jsonl does not exist" in missing and "lora_identity and lora_medical" in missing
    assert "LoRA has no target 'wq'" in fails(home, capsys, "--lora_targets", "q_proj", "wq", code=2)
    assert "an adapter is of no use" in fails(home, capsys, "--from_weight=none", code=2)
    assert "train_dpo.py" in fails(home, capsys, "--from_weight=rlhf")
    for flag in ("--lora_name=full_sft", "--lora_name=a/b", "--lora_name=", "--lora_rank=0", "--lora_alpha=0"):
        with pytest.raises(SystemExit) as ended:
            train_lora.parse_args([flag])
        assert ended.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err
    after = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in files} == files


@pytest.mark.parametrize("name", ["lora_identity", "lora_medical"])
def test_embedded_data_stand_in(name, home, monkeypatch):
    """Without a file of that name under dataset/ the embedded one is taken, with its held-out rows."""
    taken = []

    def resolve(args, *names):
        taken.append((resolve_data(args, *names), names))
        raise InputError("seen")

    resolve_data = start.resolve_data
    monkeypatch.setattr(start, "resolve_data", resolve)
    with pytest.raises(InputError, match="seen"):
        train_lora.main(train_lora.parse_args(flags_of(home, f"--lora_name={name}", data=False)))
    ((train_path, val_path), names) = taken[0]
    assert names == (f"{name}.jsonl", f"{name}.jsonl")
    assert train_path.name == f"{name}.jsonl" and train_path.is_file()
    assert val_path.name == f"{name}_val.jsonl"


@pytest.mark.parametrize(
    ("rows", "taken"),
    [(3, (1, 1)), (39, (1, 1)), (79, (3, 1)), (100, (4, 1)), (159, (4, 1)), (160, (4, 2)), (9999, (4, 2))],
)
def test_small_files_are_learned_in_small_steps(rows, taken):
    """An epoch has 20 steps where the rows are enough for it, of at most 2 x 4 rows, the default of a CPU."""
    run = SimpleNamespace(batch_size=4, args=SimpleNamespace(batch_size=4, accumulation_steps=2))
    train_lora.take_small_steps(run, rows)
    assert (run.batch_size, run.args.accumulation_steps) == taken and run.args.batch_size == run.batch_size
    assert rows // (taken[0] * taken[1]) >= min(20, rows)


def test_a_given_batch_size_stays(home):
    _, log = train(home, "--lora_name=given", "--epochs=1")  # 4 rows a step
    assert len(log) == 3
