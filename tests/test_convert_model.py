"""scripts/convert_model.py: the same logits in the classes of transformers, and back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeSharedForCausalLM, LlamaForCausalLM

from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_lora import attach, save_lora
from model.model_minimind import MiniMindForCausalLM
from scripts import convert_model

KEYS = {"stage": "full_sft", "tokens_seen": 7, "data_path": "x", "data_hash": "x", "trained_length": 64}
KINDS = {
    "dense": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4},
    "mixture": {"use_moe": True, "n_shared_experts": 2, "n_routed_experts": 3, "num_experts_per_tok": 2},
    "routed": {"use_moe": True, "n_shared_experts": 0},
}


def convert(*flags):
    convert_model.main(convert_model.parse_args(list(map(str, flags))))


@pytest.fixture(params=KINDS)
def weights(request, tmp_path):
    torch.manual_seed(1)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, **KINDS[request.param])
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    path = tmp_path / f"full_sft_64{'_moe' if config.use_moe else ''}.pth"
    save_weights(model, path, **KEYS)
    return path


@torch.no_grad()
def test_export_gives_the_same_logits_in_a_native_class(weights, tmp_path):
    convert(weights, tmp_path / "folder")
    ours, _ = load_model(weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert isinstance(theirs, GraniteMoeSharedForCausalLM if ours.config.use_moe else LlamaForCausalLM)
    ids = torch.randint(6400, (2, 90))
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=2e-5)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["rope_theta"] == ours.config.rope_theta  # transformers 4 reads it there
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    turns = [{"role": "user", "content": "你好 there"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).endswith("assistant\n")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_there_and_back_gives_the_same_bits(weights, tmp_path):
    convert(weights, tmp_path / "folder")
    back = tmp_path / weights.name.replace("full_sft", "my_back")
    convert(tmp_path / "folder", back)
    first, again = (torch.load(path, weights_only=True) for path in (weights, back))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    ours, theirs = (load_model(path)[0].config.to_dict() for path in (weights, back))
    lengths = "original_max_position_embeddings"  # a folder of another class does not tell it
    assert {**ours, lengths: 0, "rope_scaling": 0} == {**theirs, lengths: 0, "rope_scaling": 0}
    assert json.loads(back.with_suffix(".json").read_text())["stage"] == "my_back"
    with pytest.raises(InputError, match="is there already"):
        convert(tmp_path / "folder", back)


def test_a_granite_that_computes_otherwise_is_refused(tmp_path):
    torch.manual_seed(1)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=1, **KINDS["mixture"])
    save_weights(MiniMindForCausalLM(config), tmp_path / "a_64_moe.pth", **KEYS)
    convert(tmp_path / "a_64_moe.pth", tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    exported = json.loads(path.read_text())
    for change in ({"residual_multiplier": 0.5}, {"attention_multiplier": 1.0}, {"logits_scaling": 3.0}):
        path.write_text(json.dumps(exported | change))
        with pytest.raises(InputError, match=r"cannot become a \.pth"):
            convert(tmp_path / "folder", tmp_path / "b_64_moe.pth")
    assert not (tmp_path / "b_64_moe.pth").exists()


def test_a_wrong_export_is_not_left_behind(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_model, "difference", lambda *_: float("nan"))
    with pytest.raises(InputError, match="not written"):
        convert(weights, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_is_there_stays(weights, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        convert(weights, tmp_path / "folder")
    with pytest.raises(UsageError, match="one side"):
        convert(weights, tmp_path / "other.pth")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes.txt"]


@torch.no_grad()
def test_an_adapter_is_merged_or_written_for_peft(weights, tmp_path):
    """The merged export, and peft's own model of the plain export with the adapter folder: the same logits."""
    peft = pytest.importorskip("peft", reason="development package")
    model, _ = load_model(weights)
    attach(model, 4, 8.0, ["q_proj", "v_proj"])
    for name, parameter in model.named_parameters():
        if ".lora.B." in name:
            parameter.normal_(std=0.1)
    save_lora(model, tmp_path / "lora" / weights.name.replace("full_sft", "mine"), **{**KEYS, "stage": "mine"})
    convert(weights, tmp_path / "plain")
    convert(weights, tmp_path / "merged", "--lora_name=mine")
    convert(weights, tmp_path / "adapter", "--lora_name=mine", "--peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = torch.randint(6400, (1, 30))
    before = plain(ids).logits
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    assert (theirs - before).abs().max() > 1e-3
    torch.testing.assert_close(merged(ids).logits, theirs, rtol=1e-4, atol=2e-5)
    with pytest.raises(InputError, match="is there already"):
        convert(weights, tmp_path / "adapter", "--lora_name=mine", "--peft")
    with pytest.raises(UsageError, match="--lora_name"):
        convert(weights, tmp_path / "other", "--peft")
