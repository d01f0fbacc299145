"""LoRA in files: its own and PEFT's, what is refused, and that a refusal leaves the model as it was."""

import json
from pathlib import Path

import peft
import pytest
import torch
from small_lora import FILE, IDS, base_model, logits, lora_of, trained_adapter
from torch import nn

from model.errors import InputError
from model.LMConfig import MiniMindConfig
from model.loading import read_state_dict, save_weights
from model.model_lora import attach, base_note, export_peft, find_lora, import_peft, load_lora, merge, save_lora


def refused(path, said, model=None):
    """Loading raises InputError with these words and leaves the model as it was, training mode and all."""
    model = model or base_model(dropout=0.3).train()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    kinds = [(type(module), getattr(module, "p", None), getattr(module, "dropout", None)) for module in model.modules()]
    with pytest.raises(InputError, match=said) as caught:
        load_lora(model, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    assert all(after[name].requires_grad == wanted for name, (_, wanted) in before.items())
    for module, (kind, p, dropout) in zip(model.modules(), kinds, strict=True):
        assert type(module) is kind and getattr(module, "p", None) == p
        assert isinstance(dropout, nn.Module) or getattr(module, "dropout", None) == dropout


# ------------------------------------------------------------------------------------------------------------- PEFT


def peft_model(**settings):
    """PEFT's own LoRA on the same base, with values that are not zero."""
    torch.manual_seed(5)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **settings})
    model = peft.get_peft_model(base_model(), config).eval()
    for name, value in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.2)
    return model


def test_equal_to_peft_with_the_same_matrices():
    theirs = peft_model()
    ours = base_model()
    attach(ours, 4, 12, ["q_proj", "down_proj"])
    matrices = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if ".lora." in name:
                path, matrix = name.split(".lora.")
                value.copy_(matrices[f"base_model.model.{path}.lora_{matrix[0]}.default.weight"])
    expected = theirs(IDS).logits
    torch.testing.assert_close(logits(ours), expected, atol=1e-5, rtol=1e-5)
    labels = IDS.clone()
    theirs(IDS, labels=labels).loss.backward()
    ours(IDS, labels=labels).loss.backward()
    for name, value in ours.named_parameters():
        if ".lora." in name:
            path, matrix = name.split(".lora.")
            grad = matrices[f"base_model.model.{path}.lora_{matrix[0]}.default.weight"].grad
            torch.testing.assert_close(value.grad, grad, atol=1e-6, rtol=1e-4)
    merge(ours)
    torch.testing.assert_close(logits(ours), theirs.merge_and_unload()(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_our_export_loads_in_peft(moe, tmp_path):
    model = trained_adapter(base_model(use_moe=moe), rank=4, alpha=6.0, targets=["all"])
    export_peft(model, tmp_path / "adapter", base_name="full_sft_64.pth")
    theirs = peft.PeftModel.from_pretrained(base_model(use_moe=moe), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "full_sft_64.pth"
    again = base_model(use_moe=moe)
    load_lora(again, tmp_path / "adapter")  # a folder will do
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_imports(rslora, tmp_path):
    theirs = peft_model(use_rslora=rslora)
    theirs.save_pretrained(tmp_path / "a")
    ours = base_model()
    info = import_peft(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert info["lora"] == {"rank": 4, "alpha": 24 if rslora else 12, "targets": ["q_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        (
            {"layers_to_transform": [0]},
            r"adapts 2 of the 4 layers of these names, not model\.layers\.1\.mlp\.down_proj",
        ),
        (
            {"layers_to_transform": [1]},
            r"adapts 2 of the 4 layers of these names, not model\.layers\.0\.mlp\.down_proj",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to pissa: only plain LoRA on the base as it is"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights to pissa_niter_2"),
        ({"init_lora_weights": "olora"}, "init_lora_weights to olora"),
        ({"kasa_config": peft.KasaConfig()}, "kasa_config"),
        ({"target_modules": ["embed_tokens"]}, "is no LoRA adapter"),
        ({"target_modules": ["lm_head"]}, "is no LoRA adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights
def test_what_is_not_plain_lora_is_refused(settings, said, tmp_path):
    peft_model(**settings).save_pretrained(tmp_path)
    refused(tmp_path, said)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", False])
def test_starts_that_leave_the_base_alone_are_plain(start, tmp_path):
    theirs = peft_model(init_lora_weights=start)
    theirs.save_pretrained(tmp_path)
    ours = base_model()
    import_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "loftq"}, "to loftq"),  # these need more than a config to be made here
        ({"init_lora_weights": "corda"}, "to corda"),
        ({"init_lora_weights": "lora_ga"}, "to lora_ga"),
        ({"peft_type": "ADALORA"}, "peft_type to ADALORA"),
        ({"bias": "all"}, "bias to all"),
        ({"of_a_later_version": {"x": 1}}, "of_a_later_version to {'x': 1}"),
        ({"r": 8}, "r 8, its tensors have 4"),
        ({"r": [4]}, "no adapter of PEFT's"),
        ({"lora_alpha": "many"}, "no adapter of PEFT's"),
    ],
)
def test_what_a_config_must_not_say(change, said, tmp_path):
    export_peft(trained_adapter(base_model()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path, said)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_folders_of_peft(name, tmp_path):
    export_peft(trained_adapter(base_model()), tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut short"):
        load_lora(base_model(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        load_lora(base_model(), tmp_path)


# ------------------------------------------------------------------------------------------------------------- files


def saved(tmp_path, model=None, **keys):
    path = tmp_path / "lora" / "lora_x_64.pth"
    save_lora(model or trained_adapter(base_model(), alpha=7.0), path, **FILE, **keys)
    return path


def test_the_file_holds_lora_tensors_alone_in_half_precision(tmp_path):
    model = trained_adapter(base_model(), alpha=7.0)
    path = saved(tmp_path, model, base={"name": "full_sft_64.pth", "hash": "b"})
    state = torch.load(path, weights_only=True)
    assert set(state) == set(lora_of(model)) and {value.dtype for value in state.values()} == {torch.float16}
    info = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert info["lora"] == {"rank": 4, "alpha": 7.0, "targets": ["q_proj", "o_proj"]}
    assert info["base"] == {"name": "full_sft_64.pth", "hash": "b"}
    assert (info["stage"], info["data_file"], info["data_hash"], info["tokens_seen"]) == ("lora_x", "x.jsonl", "h", 5)
    assert info["config"]["hidden_size"] == 64
    again = base_model()
    assert load_lora(again, path)["lora"] == info["lora"]
    torch.testing.assert_close(logits(again), logits(model), atol=2e-3, rtol=2e-3)
    assert all(torch.equal(value.half(), state[name]) for name, value in lora_of(again).items())


def test_values_of_elsewhere_are_written(tmp_path):
    """DeepSpeed's weights are not whole in the model: `state` brings them."""
    model = trained_adapter(base_model())
    state = {name: torch.full_like(value, 0.5) for name, value in model.named_parameters()}
    written = read_state_dict(saved(tmp_path, model, state=state))
    assert set(written) == set(lora_of(model)) and all((value == 0.5).all() for value in written.values())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_public_file_has_no_json(prefix, tmp_path):
    model = trained_adapter(base_model(), rank=3, targets=["v_proj", "o_proj"])
    path = tmp_path / "lora_medical_64.pth"
    torch.save({prefix + name: value for name, value in lora_of(model).items()}, path)
    again = base_model()
    assert load_lora(again, path)["lora"] == {"rank": 3, "alpha": 3, "targets": ["v_proj", "o_proj"]}
    assert torch.equal(logits(again), logits(model))


def test_find_lora(tmp_path):
    config = MiniMindConfig(hidden_size=64)
    assert find_lora("out", "lora_x", config) == Path("out/lora/lora_x_64.pth")
    assert find_lora("out", "lora_x", MiniMindConfig(hidden_size=64, use_moe=True)).name == "lora_x_64_moe.pth"
    assert find_lora("out", "my.pth", config) == Path("my.pth") and find_lora("out", "a/b", config) == Path("a/b")


def test_an_adapter_of_another_size_names_both(tmp_path):
    path = saved(tmp_path)
    for sizes, said in (
        ({"hidden_size": 128}, "hidden size 64 with 2 layers, this one has 128 and 2"),
        ({"num_hidden_layers": 3}, "hidden size 64 with 2 layers, this one has 64 and 3"),
    ):
        refused(path, said, base_model(**sizes))
    path = saved(tmp_path, trained_adapter(base_model(), targets=["k_proj", "o_proj"]))
    said = r"k_proj.lora.B.weight is \(16, 4\), the model takes \(64, 4\)"
    refused(path, said, base_model(num_key_value_heads=8))
    path = saved(tmp_path, trained_adapter(base_model(), targets=["up_proj"]))
    refused(path, r"lacks model.layers.0.mlp.experts.0.*another model", base_model(use_moe=True))


def test_an_adapter_without_its_json_may_be_of_fewer_layers(tmp_path):
    """Nobody knows whether it left the last layers out or belongs to a shallower model: both are said."""
    path = saved(tmp_path)
    path.with_suffix(".json").unlink()
    refused(path, r"adapts 4 of the 6 layers .*, not model\.layers\.2\..*belongs to", base_model(num_hidden_layers=3))
    refused(path, "hidden size 64 with 2 layers, this one has 64 and 1", base_model(num_hidden_layers=1))


def test_the_weights_that_an_adapter_names(tmp_path):
    info = {"base": {"name": "full_sft_64.pth", "hash": "b"}}
    assert base_note(info, tmp_path / "x.pth", "b") == base_note({}, tmp_path, "c") == ""
    assert "trained on other weights, full_sft_64.pth" in base_note(info, tmp_path / "x.pth", "c")
    assert "is not known" in base_note(info, tmp_path, "c")  # a folder of the same weights has another hash


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("lora.rank", "eight", 'lora.rank is "eight"'),
        ("lora.rank", 4.0, "lora.rank is 4.0"),
        ("lora.alpha", None, "lora.alpha is null"),
        ("lora.alpha", True, "lora.alpha is true"),
        ("lora.targets", 5, "lora.targets is 5"),
        ("lora", ["q_proj"], r'lora is \["q_proj"\]'),
        ("lora", {"rank": 4}, "lora.alpha is not there"),
        ("base", "full_sft_64.pth", 'base is "full_sft_64.pth"'),
        ("base.name", 5, "base.name is 5"),
        ("base.hash", None, "base.hash is null"),
        ("config.num_hidden_layers", "two", 'config.num_hidden_layers is "two"'),
        ("vocabulary", 6400, "vocabulary is 6400"),
        ("", [1], "no object"),
    ],
)
def test_wrong_types_in_the_json_of_an_adapter_are_named(place, value, said, tmp_path):
    path = saved(tmp_path, base={"name": "full_sft_64.pth", "hash": "b"}).with_suffix(".json")
    part, _, name = place.rpartition(".")
    info = json.loads(path.read_text(encoding="utf-8"))
    (info[part] if part else info)[name] = value
    path.write_text(json.dumps(info if place else value))
    with pytest.raises(InputError, match=rf"{path} is cut short or not the JSON .*\({said}\): copy") as caught:
        load_lora(base_model(), path.with_suffix(".pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 0.5, 0.99])
def test_truncated_files_are_refused_by_name(size, tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    with pytest.raises(InputError, match=r"lora_x_64\.pth is cut short"):
        load_lora(base_model(), path)


def test_files_that_are_no_adapter(tmp_path):
    path = tmp_path / "x_64.pth"
    keys = {**FILE, "stage": "full_sft"}
    save_weights(base_model(), path, **keys)
    with pytest.raises(InputError, match=r"is no LoRA adapter: it holds model\.embed_tokens\.weight"):
        load_lora(base_model(), path)
    full = lora_of(trained_adapter(base_model()))
    for change, said in (
        (
            {"model.layers.0.self_attn.q_proj.lora.A.weight": None},
            "lacks model.layers.0.self_attn.q_proj.lora.A.weight",
        ),
        ({"model.layers.0.mlp.q_proj.lora.A.weight": torch.zeros(4, 64)}, "has the unknown model.layers.0.mlp.q_proj"),
        ({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(5, 64)}, r"has the ranks \[4, 5\]"),
        ({"model.layers.0.self_attn.q_proj.lora.B.weight": torch.zeros(4)}, "is no LoRA adapter"),
        ({"model.layers.0.self_attn.wq.lora.A.weight": torch.zeros(4, 64)}, "adapts wq"),
    ):
        torch.save({name: value for name, value in {**full, **change}.items() if value is not None}, path)
        refused(path, said)


def test_missing_adapters_say_what_there_is(tmp_path):
    saved(tmp_path)
    with pytest.raises(InputError, match=r"train_lora.py --lora_name lora_y \(.*holds lora_x_64.pth\)"):
        load_lora(base_model(), tmp_path / "lora" / "lora_y_64.pth")
    with pytest.raises(InputError, match="holds no adapters"):
        load_lora(base_model(), tmp_path / "nowhere" / "lora_y_64.pth")
