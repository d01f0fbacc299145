"""scripts/convert_model.py: the same logits in the classes of transformers, and back; scripts read what it wrote."""

import json

import pytest
import torch
from commands import ends
from small_runs import new_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import eval_model
from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_lora import attach, save_lora
from model.model_minimind import MiniMindForCausalLM
from scripts import convert_model
from trainer.runtime.start import build_model, weights_file_hash

KEYS = {"stage": "full_sft", "tokens_seen": 7, "data_path": "x", "data_hash": "x", "trained_length": 64}
IDS = {"bos_token_id": 7, "eos_token_id": [2, 5], "pad_token_id": 9}
YARN = {"inference_rope_scaling": True, "rope_scaling": {"factor": 3.0, "beta_fast": 16.0}}
KINDS = {
    "dense": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e4},
    "mixture": {"use_moe": True, "n_shared_experts": 2, "n_routed_experts": 3, "num_experts_per_tok": 2},
    "routed": {"use_moe": True, "n_shared_experts": 0},
    "untied": {"tie_word_embeddings": False, **IDS},
    "untied mixture": {"use_moe": True, "tie_word_embeddings": False, **IDS},
    "yarn": {**YARN, "original_max_position_embeddings": 64},
    "yarn mixture": {"use_moe": True, **YARN, "original_max_position_embeddings": 64},
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2}


def convert(*flags):
    convert_model.main(convert_model.parse_args(list(map(str, flags))))


@pytest.fixture(params=KINDS)
def weights(request, tmp_path):
    torch.manual_seed(1)
    config = MiniMindConfig(**TINY, **KINDS[request.param])
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
    yarn = ours.config.yarn_parameters()
    assert config.get("rope_scaling") == yarn and theirs.config.rope_parameters["rope_type"] == (
        "yarn" if yarn else "default"
    )
    for name in (*IDS, "tie_word_embeddings"):
        assert getattr(theirs.config, name) == getattr(ours.config, name)
    assert theirs.generation_config.eos_token_id == ours.config.eos_token_id
    assert config["original_max_position_embeddings"] == 64  # the length that it was trained at
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
    ours, theirs = (load_model(path)[0].config for path in (weights, back))
    assert ours.yarn_parameters() == theirs.yarn_parameters()  # rope_scaling now says all of it
    assert ours.to_dict() | {"rope_scaling": None} == theirs.to_dict() | {"rope_scaling": None}
    info = json.loads(back.with_suffix(".json").read_text())
    assert info["stage"] == "my_back" and info["trained_length"] == 64
    with pytest.raises(InputError, match="is there already"):
        convert(tmp_path / "folder", back)
    back.unlink()
    with pytest.raises(InputError, match=r"my_back_64.*\.json is there already"):
        convert(tmp_path / "folder", back)


@pytest.mark.parametrize("weights", ["dense", "mixture"], indirect=True)
def test_other_scripts_read_an_export(weights, tokenizer, tmp_path, capsys):
    """Typing to it, training on from it: the same as with the .pth (eval_ppl and eval_choice: see their tests)."""
    convert(weights, tmp_path / "folder")
    capsys.readouterr()
    flags = ["--prompt=你好", "--max_new_tokens=8", "--temperature=0", "--device=cpu"]
    replies = [
        ends(eval_model, [*flags, *which], capsys)
        for which in ([f"--weight={weights}"], ["--load=1", f"--weight={tmp_path / 'folder'}"])
    ]
    assert [code for code, *_ in replies] == [0, 0]
    assert len({out.partition("\n")[2] for _, out, _ in replies}) == 1 and replies[0][1].splitlines()[2]
    run = new_run(tmp_path, f"--from_weight={tmp_path / 'folder'}")
    model = build_model(run).eval()
    assert type(model) is MiniMindForCausalLM and run.name == weights.stem.replace("full_sft", "pretrain")
    ids = torch.randint(6400, (1, 9))
    torch.testing.assert_close(model(ids).logits, load_model(weights)[0](ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_public_file_keeps_its_precision(dtype, tmp_path):
    """It has no JSON that says it; float16 would round what bfloat16 or float32 hold."""
    torch.manual_seed(1)
    state = {name: value.to(dtype) for name, value in MiniMindForCausalLM(MiniMindConfig(**TINY)).state_dict().items()}
    torch.save(state, tmp_path / "public.pth")
    convert(tmp_path / "public.pth", tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    assert theirs.dtype == dtype
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


def test_mixed_precision_is_written_as_float32(tmp_path):
    state = MiniMindForCausalLM(MiniMindConfig(**TINY)).half().state_dict()
    state["model.norm.weight"] = torch.full((64,), 1 + 2**-12)  # more than float16 holds
    torch.save(state, tmp_path / "public.pth")
    convert(tmp_path / "public.pth", tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    assert torch.equal(theirs.model.norm.weight, state["model.norm.weight"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_float32_folder_is_rounded_and_nothing_else(prefix, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(
        **TINY, intermediate_size=64, num_attention_heads=8, vocab_size=300, max_position_embeddings=512
    )
    llama = LlamaForCausalLM(config)
    llama.config.save_pretrained(tmp_path / "folder")
    named = {prefix + name: value for name, value in llama.state_dict().items()}
    torch.save(named, tmp_path / "folder" / "pytorch_model.bin")
    convert(tmp_path / "folder", tmp_path / "a_64.pth")
    state, info = torch.load(tmp_path / "a_64.pth", weights_only=True), json.loads((tmp_path / "a_64.json").read_text())
    assert all(torch.equal(value.half(), state[name]) for name, value in llama.state_dict().items())
    assert info["trained_length"] == 512  # it has seen no more; MiniMind's 2048 would be a guess


def test_a_granite_that_computes_otherwise_is_refused(tmp_path):
    torch.manual_seed(1)
    config = MiniMindConfig(**TINY, **KINDS["mixture"])
    save_weights(MiniMindForCausalLM(config), tmp_path / "a_64_moe.pth", **KEYS)
    convert(tmp_path / "a_64_moe.pth", tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    exported = json.loads(path.read_text())
    for change in ({"residual_multiplier": 0.5}, {"attention_multiplier": 1.0}, {"logits_scaling": 3.0}):
        path.write_text(json.dumps(exported | change))
        with pytest.raises(InputError, match=r"cannot become a \.pth"):
            convert(tmp_path / "folder", tmp_path / "b_64_moe.pth")
    assert not (tmp_path / "b_64_moe.pth").exists()


@pytest.mark.parametrize("weights", ["dense"], indirect=True)
@pytest.mark.parametrize(("number", "back"), [(0, False), (0, True), (1, True)])
def test_what_computes_something_else_is_not_left_behind(number, back, weights, tmp_path, monkeypatch):
    """The way back is judged twice: what was read, and what was written."""
    convert(weights, tmp_path / "folder")
    there = set(tmp_path.iterdir())
    found = iter([0.0] * number + [float("nan")])
    monkeypatch.setattr(convert_model, "difference", lambda *_: next(found))
    source, target = (tmp_path / "folder", tmp_path / "back_64.pth") if back else (weights, tmp_path / "again")
    with pytest.raises(InputError, match=rf"{target.name} was not written"):
        convert(source, target)
    assert set(tmp_path.iterdir()) == there


def test_a_model_that_minimind_has_not_is_refused(tmp_path):
    sizes = {**TINY, "intermediate_size": 64, "num_attention_heads": 8, "vocab_size": 300}
    for change, said in (
        ({"attention_bias": True}, "with its biases"),
        ({"mlp_bias": True}, "with its biases"),
        ({"head_dim": 16}, "with its head_dim"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "with its rope_type linear"),
    ):
        LlamaForCausalLM(LlamaConfig(**sizes, **change)).save_pretrained(tmp_path / "folder")
        with pytest.raises(InputError, match=rf"folder cannot become a \.pth: .*this llama model, {said}"):
            convert(tmp_path / "folder", tmp_path / "a_64.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def byte_tokenizer(folder):
    """One token for each byte, and the three special ones."""
    alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": alphabet[0], "bos_token": alphabet[1], "eos_token": alphabet[2], "unk_token": alphabet[0]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def test_an_export_with_another_vocabulary(tmp_path):
    """The tokenizer beside the weights is theirs: the shipped one has ids that a smaller model has no place for."""
    byte_tokenizer(tmp_path / "bytes")
    model = MiniMindForCausalLM(MiniMindConfig(**TINY, vocab_size=259))
    save_weights(model, tmp_path / "full_sft_64.pth", **KEYS)
    there = set(tmp_path.iterdir())
    with pytest.raises(InputError, match="has 6400 tokens, the model a vocabulary of 259"):
        convert(tmp_path / "full_sft_64.pth", tmp_path / "folder")
    assert set(tmp_path.iterdir()) == there
    convert(tmp_path / "full_sft_64.pth", tmp_path / "folder", f"--tokenizer_path={tmp_path / 'bytes'}")
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("ab").input_ids == [3 + 64, 3 + 65]  # "!" is the first
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "folder").get_input_embeddings().weight.shape == (259, 64)


@pytest.mark.parametrize("weights", ["dense"], indirect=True)
def test_what_is_there_stays(weights, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        convert(weights, tmp_path / "folder")
    with pytest.raises(UsageError, match="one side"):
        convert(weights, tmp_path / "other.pth")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes.txt"]


@torch.no_grad()
@pytest.mark.parametrize("weights", ["dense", "mixture", "routed"], indirect=True)
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


@pytest.fixture
def adapter(tmp_path):
    """An adapter that names the weights it was trained on."""
    torch.manual_seed(1)
    base = tmp_path / "full_sft_64.pth"
    save_weights(MiniMindForCausalLM(MiniMindConfig(**TINY)), base, **KEYS)
    model, _ = load_model(base)
    attach(model, 4)
    for name, parameter in model.named_parameters():
        if ".lora.B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "lora" / "mine_64.pth"
    save_lora(model, path, **{**KEYS, "stage": "mine"}, base={"name": base.name, "hash": weights_file_hash(base)})
    return path


def test_an_adapter_of_other_weights_or_merged_twice_is_said(adapter, tmp_path, capsys):
    base, other = tmp_path / "full_sft_64.pth", tmp_path / "rlhf_64.pth"
    save_weights(MiniMindForCausalLM(MiniMindConfig(**TINY)), other, **KEYS)
    convert(base, tmp_path / "merged", "--lora_name=mine")
    convert(base, tmp_path / "adapter", "--lora_name=mine", "--peft")
    assert "note" not in capsys.readouterr().out
    said = f"{adapter} (note: trained on other weights, full_sft_64.pth)"
    convert(other, tmp_path / "merged2", "--lora_name=mine")
    assert said in capsys.readouterr().out
    convert(other, tmp_path / "adapter2", "--lora_name=mine", "--peft")
    assert said in capsys.readouterr().out
    convert(tmp_path / "merged", tmp_path / "merged_64.pth")  # it holds the adapter's sum
    assert "note" not in capsys.readouterr().out
    convert(tmp_path / "merged_64.pth", tmp_path / "twice", "--lora_name=mine")
    assert said in capsys.readouterr().out
    convert(base, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "back_64.pth")  # the same weights again: nothing to say
    capsys.readouterr()
    convert(tmp_path / "back_64.pth", tmp_path / "merged3", "--lora_name=mine")
    assert "note" not in capsys.readouterr().out
    convert(tmp_path / "plain", tmp_path / "merged_2_64.pth", f"--lora_name={adapter}")
    assert "whether" in capsys.readouterr().out
    merged, again = (torch.load(tmp_path / f"merged{name}_64.pth", weights_only=True) for name in ("", "_2"))
    assert all(torch.equal(merged[name], again[name]) for name in merged)
