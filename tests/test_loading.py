"""Weights on disk: what is written, what loads, what is refused and in which words."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model import loading
from model.errors import InputError, UsageError
from model.foreign import to_granite, to_llama
from model.LMConfig import MiniMindConfig
from model.loading import check_vocab, find_weights, load_model, load_tokenizer, save_weights, weights_path
from model.model_lora import attach, export_peft, load_lora
from model.model_minimind import MiniMindForCausalLM

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
IDS = torch.arange(3, 15)[None]


def make_model(**overrides) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **overrides})).eval()
    for parameter in model.parameters():  # values that float16 holds exactly, so that a round trip is bit-equal
        parameter.data = parameter.data.normal_(std=0.1).half().float()
    return model


def save(model, path, **overrides) -> None:
    facts = {"stage": "pretrain", "tokens_seen": 1234, "data_path": "/some/where/data.jsonl", "data_hash": "abc"}
    save_weights(model, path, **{**facts, "trained_length": 340, **overrides})


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_path(tmp_path):
    assert weights_path(tmp_path, "rlhf", MiniMindConfig()) == tmp_path / "rlhf_512.pth"
    assert weights_path("out", "grpo", MiniMindConfig.from_preset("minimind2-moe")).name == "grpo_640_moe.pth"


@pytest.mark.parametrize("overrides", [{}, {"use_moe": True, "n_shared_experts": 2}, {"tie_word_embeddings": False}])
def test_round_trip_is_bit_equal(tmp_path, overrides):
    model = make_model(num_attention_heads=4, rope_theta=1e4, dropout=0.1, **overrides)
    path = tmp_path / "new" / "pretrain_64.pth"
    save(model, path)
    assert names(path.parent) == ["pretrain_64.json", "pretrain_64.pth"]
    state = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.is_contiguous() for tensor in state.values())
    random = torch.get_rng_state()
    again, info = load_model(path)
    assert torch.equal(random, torch.get_rng_state())  # loading draws no random numbers
    assert not again.training and again.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == again.config.tie_word_embeddings
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (info["stage"], info["tokens_seen"], info["data_file"]) == ("pretrain", 1234, "data.jsonl")
    assert (info["data_hash"], info["trained_length"], info["dtype"]) == ("abc", 340, "float16")
    assert again.config.original_max_position_embeddings == 340
    assert (again.config.rope_theta, again.config.num_attention_heads) == (1e4, 4)


def test_tied_weights_are_stored_once(tmp_path):
    save(make_model(), tmp_path / "a.pth")
    save(make_model(tie_word_embeddings=False), tmp_path / "b.pth")
    assert (tmp_path / "b.pth").stat().st_size - (tmp_path / "a.pth").stat().st_size > 97 * 64 * 2 * 0.9


def test_wrappers_leave_no_trace_in_the_keys(tmp_path):
    model = make_model()

    class Wrapped(nn.Module):  # what DistributedDataParallel and DeepSpeed look like
        def __init__(self, module):
            super().__init__()
            self.module = module

    save(Wrapped(torch.compile(model)), tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True).keys() == model.state_dict().keys()


def test_values_beyond_float16_are_stored_as_bfloat16(tmp_path):
    model = make_model()
    model.model.norm.weight.data[3] = 2.0**17
    save(model, tmp_path / "a.pth")
    again, info = load_model(tmp_path / "a.pth")
    assert info["dtype"] == "bfloat16" and again.model.norm.weight[3] == 2.0**17


def test_not_a_number_never_replaces_weights(tmp_path):
    model, path = make_model(), tmp_path / "a.pth"
    save(model, path)
    before = path.read_bytes()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN"):
        save(model, path)
    assert path.read_bytes() == before and names(tmp_path) == ["a.json", "a.pth"]


@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "json"])
def test_failure_leaves_the_former_files_whole(tmp_path, monkeypatch, place):
    """A full disk while the weights, or the JSON after them, are written."""
    path = tmp_path / "a.pth"
    save(make_model(), path)
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if place == "torch.save":
        monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), fail()))
    elif place == "os.fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        calls = []
        monkeypatch.setattr(os, "fsync", lambda number: calls.append(number) if not calls else fail())
    with pytest.raises(OSError, match="No space"):
        save(make_model(rope_theta=3.0), path, tokens_seen=9)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """Each file is synced with all its bytes, and before any of them gets its name."""
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_size) or sync(number))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(str(new)) or replace(old, new))
    texts = {tmp_path / "a": b"x" * 5000, tmp_path / "b": b"y"}
    loading.write_files({path: lambda file, text=text: file.write(text) for path, text in texts.items()})
    assert events == [5000, 1, str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_name_that_is_not_utf8_is_kept(tmp_path):
    """Bytes of another encoding come from the system as lone surrogates; the JSON is UTF-8 all the same."""
    save(make_model(), tmp_path / "a.pth", data_path="/data/\udcb2\udce2.jsonl")
    (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert load_model(tmp_path / "a.pth")[1]["data_file"] == "\udcb2\udce2.jsonl"


def test_a_stage_is_not_taken_for_its_neighbours(tmp_path):
    """Newer files whose names only begin alike are not the stage's weights."""
    path = tmp_path / "full_sft_64.pth"
    save(make_model(), path)
    decoys = ("full_sft_old_64", "full_sft_64_resume", "full_sft_64_moe_old", "full_sft_x", "my_full_sft_64")
    for number, name in enumerate(decoys, start=1):
        (tmp_path / f"{name}.pth").write_bytes(b"")
        os.utime(tmp_path / f"{name}.pth", (4e9 + number, 4e9 + number))
    assert find_weights(tmp_path, "full_sft") == path
    newer = tmp_path / "full_sft_128_moe.pth"
    newer.write_bytes(b"")
    os.utime(newer, (4e9, 4e9))
    assert find_weights(tmp_path, "full_sft") == newer


def test_files_are_replaced_not_overwritten(tmp_path):
    """Whoever has the former file open keeps reading it whole."""
    path = tmp_path / "a.pth"
    save(make_model(), path)
    before = path.read_bytes()
    with open(path, "rb") as former:
        save(make_model(rope_theta=3.0, intermediate_size=128), path)
        assert former.read() == before
    assert path.read_bytes() != before and names(tmp_path) == ["a.json", "a.pth"]


def test_public_file_without_json(tmp_path):
    """Sizes come from the shapes, heads and rope_theta from the MiniMind2 family."""
    for overrides in ({}, {"use_moe": True, "n_routed_experts": 5, "n_shared_experts": 2}):
        model = make_model(intermediate_size=96, **overrides)
        torch.save(model.state_dict(), tmp_path / "public.pth")
        again, info = load_model(tmp_path / "public.pth")
        assert again.config.intermediate_size == 96 and again.config.rope_theta == 1e6
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert "stage" not in info


def test_an_untied_public_file_stays_untied(tmp_path):
    """Nothing but the two tensors tells it."""
    model = make_model(tie_word_embeddings=False, intermediate_size=192)
    torch.save(model.state_dict(), tmp_path / "public.pth")
    again, _ = load_model(tmp_path / "public.pth")
    assert not again.config.tie_word_embeddings
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("json_beside", [False, True])
def test_tied_weights_may_be_stored_without_their_head(json_beside, tmp_path):
    model, path = make_model(), tmp_path / "public.pth"
    if json_beside:
        save(model, path)
    torch.save({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}, path)
    again, _ = load_model(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    model, path = make_model(), tmp_path / "public.pth"
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, path)
    assert torch.equal(load_model(path)[0](IDS).logits, model(IDS).logits)
    state = model.state_dict()
    torch.save({**state, f"{prefix}model.norm.weight": state["model.norm.weight"] * 2}, path)
    with pytest.raises(InputError, match="both with and without the prefix"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype, tmp_path):
    state = make_model().state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    torch.save({**state, name: (state[name] * 9).to(dtype)}, tmp_path / "public.pth")
    words = rf"public\.pth holds {name} as {str(dtype)[6:]}: quantised weights cannot be read"
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "public.pth")


LAYOUTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
CLASSES = {"own": ({}, lambda model: model), "Llama": ({}, to_llama), "Granite": ({"use_moe": True}, to_granite)}


def save_folder(folder, kind, layout, change):
    """A folder of this class whose weights lie in one file or in two with an index -> the model in it."""
    sizes, convert = CLASSES[kind]
    model = make_model(**sizes)
    convert(model).save_pretrained(folder)
    state = change(safetensors.torch.load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    write = torch.save if ".bin" in layout else safetensors.torch.save_file
    if not layout.endswith(".json"):
        write(state, folder / layout)
        return model
    suffix = Path(layout.removesuffix(".index.json")).suffix
    places = {key: f"part{number % 2}{suffix}" for number, key in enumerate(state)}
    for file in ("part0" + suffix, "part1" + suffix):
        write({key: state[key] for key in state if places[key] == file}, folder / file)
    (folder / layout).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_in_a_folder_are_no_weights(dtype, kind, layout, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    save_folder(tmp_path, kind, layout, lambda state: {**state, name: (state[name] * 9).to(dtype)})
    with pytest.raises(InputError, match=rf"{tmp_path}/\S+ holds {name} as \w+: quantised weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_prefixes_of_wrappers_in_a_folder_are_taken_off(prefix, kind, layout, tmp_path):
    def change(state):
        return {prefix + name: value.clone() for name, value in state.items()}

    model = save_folder(tmp_path, kind, layout, change)
    again = load_model(tmp_path)[0]
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")[0](IDS).logits, again(IDS).logits)
    (tmp_path / "both").mkdir()
    save_folder(tmp_path / "both", kind, layout, lambda state: {**state, **change(state)})
    with pytest.raises(InputError, match="both with and without the prefix"):
        load_model(tmp_path / "both")


WRONG_TYPES = [
    ("hidden_size", "64"), ("num_hidden_layers", 2.0), ("intermediate_size", "192"), ("intermediate_size", 192.5),
    ("dropout", "none"), ("dropout", None), ("rope_theta", "1e6"), ("rms_norm_eps", [1e-5]), ("aux_loss_alpha", "x"),
    ("use_moe", "false"), ("tie_word_embeddings", None), ("flash_attn", 1), ("rope_scaling", [4]),
    ("rope_scaling", {"factor": "4"}), ("rope_scaling", {"beta_fast": [32]}), ("eos_token_id", "</s>"),
    ("eos_token_id", [2, "x"]), ("bos_token_id", [1]), ("pad_token_id", 0.5), ("n_shared_experts", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types_in_a_config_get_one_sentence(name, value, tmp_path):
    """In the JSON of a .pth and in config.json."""
    save(make_model(), tmp_path / "a.pth")
    make_model().save_pretrained(tmp_path / "own")
    for path, weights in ((tmp_path / "a.json", "a.pth"), (tmp_path / "own" / "config.json", "own")):
        content = json.loads(path.read_text())
        content.get("config", content)[name] = value
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=name) as error:
            load_model(tmp_path / weights)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "x"}, {"rope_parameters": [1]}, {"model_type": 7}, {"vocab_size": None}]
)
def test_wrong_types_in_another_class_get_one_sentence(change, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=96)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"r": "4"}, {"r": None}, {"lora_alpha": "8"}, {"lora_alpha": [8]}])
def test_wrong_types_in_the_config_of_an_adapter_get_one_sentence(change, tmp_path):
    model = make_model()
    attach(model, rank=4, targets=["q_proj"])
    export_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"{tmp_path} is cut short or no adapter of PEFT's"):
        load_lora(make_model(), tmp_path)


def test_public_v1_file_needs_its_heads(tmp_path):
    model = make_model(num_attention_heads=16, num_key_value_heads=8, rope_theta=1e4)
    path = tmp_path / "public.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(InputError, match="has 32 key rows, but 8 heads with 2 key/value heads"):
        load_model(path)
    again, _ = load_model(path, config_overrides={"num_attention_heads": 16, "rope_theta": 1e4})
    assert again.config.num_key_value_heads == 8
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_public_file_with_preset(tmp_path):
    config = MiniMindConfig.from_preset("minimind-v1-small")
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    torch.manual_seed(0)
    state = {name: torch.randn(tensor.shape).half() * 0.02 for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "full_sft_512.pth")
    again, _ = load_model(tmp_path / "full_sft_512.pth", preset="minimind-v1-small", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert (again.config.num_attention_heads, again.config.rope_theta) == (16, 1e4)
    with pytest.raises(InputError, match="says num_hidden_layers 8, you ask for 16"):
        load_model(tmp_path / "full_sft_512.pth", preset="minimind-v1", config_overrides={"hidden_size": 512})
    with pytest.raises(InputError, match="hidden_size 512, you ask for 768"):
        load_model(tmp_path / "full_sft_512.pth", preset="minimind-v1")


def test_disagreement_names_both_sides(tmp_path):
    path = tmp_path / "a.pth"
    save(make_model(), path)
    for overrides, words in (
        ({"hidden_size": 768}, r"a\.json says hidden_size 64, you ask for 768"),
        ({"rope_theta": 1e4}, r"rope_theta 1000000\.0, you ask for 10000\.0"),
        ({"use_moe": True}, "use_moe False, you ask for True"),
    ):
        with pytest.raises(InputError, match=words):
            load_model(path, config_overrides=overrides)
    with pytest.raises(InputError, match="hidden_size 64, you ask for 512"):
        load_model(path, preset="minimind2-small")
    with pytest.raises(UsageError, match="hiden_size"):
        load_model(path, config_overrides={"hiden_size": 64})
    model, _ = load_model(path, config_overrides={"dropout": 0.2, "flash_attn": False, "hidden_size": 64})
    assert model.config.dropout == 0.2 and not model.model.layers[0].self_attn.flash


def test_rope_scaling_starts_from_the_trained_length(tmp_path):
    save(make_model(), tmp_path / "a.pth")
    plain, _ = load_model(tmp_path / "a.pth")
    model, _ = load_model(tmp_path / "a.pth", inference_rope_scaling=True)
    assert plain.config.yarn_parameters() is None
    assert model.config.yarn_parameters()["original_max_position_embeddings"] == 340
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits)


def test_missing_file_says_what_to_train_and_what_there_is(tmp_path):
    save(make_model(), tmp_path / "pretrain_64.pth")
    with pytest.raises(InputError, match=r"trainer/train_dpo\.py \(.* holds pretrain_64\.pth\)"):
        load_model(tmp_path / "rlhf_64.pth")
    with pytest.raises(InputError, match="holds no weights"):
        load_model(tmp_path / "nowhere" / "full_sft_64_moe.pth")


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused_by_name(tmp_path, share):
    path = tmp_path / "a.pth"
    save(make_model(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"a\.pth is cut short or no weights file"):
        load_model(path)


def test_files_that_are_no_weights(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("hello")
    with pytest.raises(InputError, match="no weights file"):
        load_model(path)
    torch.save({"model": {}, "step": 3}, path)
    with pytest.raises(InputError, match="no plain state dict"):
        load_model(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled object: nothing of it may run
    with pytest.raises(InputError, match="no weights file"):
        load_model(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="no MiniMind weights"):
        load_model(path)


def test_damaged_json_is_refused_by_name(tmp_path):
    path = tmp_path / "a.pth"
    save(make_model(), path)
    text = path.with_suffix(".json").read_text()
    for broken in (text[:40], "[]", '{"format": 1}'):
        path.with_suffix(".json").write_text(broken)
        with pytest.raises(InputError, match=r"a\.json is cut short"):
            load_model(path)
    path.with_suffix(".json").write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        load_model(path)
    for wrong in ({"tokens_seen": "many"}, {"trained_length": [1]}, {"lora": []}, {"lora": {"alpha": "8"}}, {"base": 1},
                  {"vocabulary": {"hash": "h"}}, {"base": {"name": "x"}}):  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps({**json.loads(text), **wrong}))
        with pytest.raises(InputError, match=r"a\.json is cut short or not the JSON"):
            load_model(path)
    info = json.loads(text)
    info["config"]["hiden_size"] = 3
    path.with_suffix(".json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"a\.json: .*hiden_size"):
        load_model(path)


def test_tensors_that_do_not_fit(tmp_path):
    path = tmp_path / "a.pth"
    model = make_model()
    save(model, path)
    info, whole = path.with_suffix(".json").read_text(), model.state_dict()

    def refused(state, words, **config):
        torch.save(state, path)
        changed = json.loads(info)
        changed["config"].update(config)
        path.with_suffix(".json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            load_model(path)

    refused({k: v for k, v in whole.items() if k != "model.norm.weight"}, r"lacks model\.norm\.weight \(1 such")
    refused({**whole, "model.extra": torch.zeros(1)}, r"has the unknown model\.extra")
    refused({**whole, "model.norm.weight": torch.ones(3)}, r"is \(3,\) in the file and \(64,\) in the config")
    refused(whole, "holds a dense model, but the config is that of a model with experts", use_moe=True)
    refused({**whole, "lm_head.weight": torch.ones(97, 64)}, "lm_head of its own")
    refused(whole, "impossible model sizes", num_attention_heads=7)


def test_transformers_folders(tmp_path):
    model = make_model(num_attention_heads=4)
    model.config.original_max_position_embeddings = 340
    model.save_pretrained(tmp_path / "own")
    again, info = load_model(tmp_path / "own")
    assert type(again) is MiniMindForCausalLM and info["trained_length"] == 340
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    stretched, _ = load_model(tmp_path / "own", inference_rope_scaling=True)
    assert not torch.allclose(stretched(IDS).logits, model(IDS).logits)

    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    more = ("intermediate_size", "rms_norm_eps", "max_position_embeddings", "original_max_position_embeddings")
    config = LlamaConfig(
        **{name: getattr(model.config, name) for name in (*fields, *more)}, rope_theta=1e6, tie_word_embeddings=True
    )
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.state_dict())
    llama.save_pretrained(tmp_path / "llama")
    again, _ = load_model(tmp_path / "llama")
    assert type(again) is MiniMindForCausalLM  # what it computes itself becomes its own class
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again, _ = load_model(tmp_path / "llama", inference_rope_scaling=True)
    torch.testing.assert_close(again(IDS).logits, stretched(IDS).logits, atol=1e-5, rtol=0)
    for folder in ("own", "llama"):
        with pytest.raises(InputError, match="hidden_size 64, you ask for 768"):
            load_model(tmp_path / folder, config_overrides={"hidden_size": 768})
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    assert type(load_model(tmp_path / "biased")[0]) is LlamaForCausalLM  # any other stays what it is


def test_broken_folders(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole, config = weights.read_bytes(), (tmp_path / "config.json").read_text()
    weights.write_bytes(whole[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path)
    weights.write_bytes(whole)
    for change, words in (
        ({"num_hidden_layers": 3}, r"missing keys such as model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unexpected keys such as model\.layers\.1"),
        ({"hidden_size": 128}, "mismatched keys|cannot be loaded"),
        ({"nonsense": 1}, r"config\.json: .*nonsense"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(InputError, match=words):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(config[:20])
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)


def test_tokenizer(tmp_path, tokenizer):
    check_vocab(tokenizer, MiniMindConfig())
    for path, words in (
        (None, r"the new model a vocabulary of 97: train a tokenizer of .*train_tokenizer\.py --vocab_size 97"),
        (tmp_path / "a.pth", "the model a vocabulary of 97: use the tokenizer that the model was trained with"),
    ):
        with pytest.raises(InputError, match=rf"has {len(tokenizer)} tokens, {words}"):
            check_vocab(tokenizer, MiniMindConfig(**SIZES), path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_trained_by_names_every_stage():
    assert {"pretrain", "full_sft", "rlhf", "reason", "distill", "reward", "ppo_actor", "grpo", "spo"} == set(
        loading.TRAINED_BY
    )
