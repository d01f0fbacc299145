"""scripts/eval_ppl.py: loss, perplexity and bits per byte against a direct computation; loss by position with YaRN."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.lm_dataset import encode_texts
from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import convert_model, eval_ppl

TEXTS = ["床前明月光，疑是地上霜。", "The quick brown fox jumps over the lazy dog. " * 3, "12 + 30 = 42"]
TRAINED = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with texts, chats, and the weights of a model."""
    folder = tmp_path_factory.mktemp("ppl")
    save_random(folder / "pretrain_64.pth")
    write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write(folder / "long.jsonl", [{"text": text * 20} for text in TEXTS])
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    write(folder / "chats.jsonl", [{"conversations": turns}])
    return folder


def save_random(path, **sizes):
    torch.manual_seed(3)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    keys = {"stage": "pretrain", "tokens_seen": 0, "data_path": "x", "data_hash": "x", "trained_length": TRAINED}
    save_weights(model, path, **keys)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def report(home, *flags):
    path = home / "report.json"
    common = [f"--out_dir={home}", f"--json={path}", "--device=cpu", "--dtype=float32"]
    eval_ppl.main(eval_ppl.parse_args([*map(str, flags), *common]))
    return json.loads(path.read_text())


def direct_losses(model, ids):
    """-log p of each token but the first, one text alone."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")


def test_a_file_of_texts(home, tokenizer):
    """Packing changes nothing; the bytes are those of the texts (special tokens stand for none)."""
    model, _ = load_model(home / "pretrain_64.pth")
    with torch.no_grad():
        losses = torch.cat([direct_losses(model, document.ids) for document in encode_texts(tokenizer, TEXTS)])
    found = report(home, home / "texts.jsonl", "--max_seq_len=256")
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (found["bytes"], found["targets"]) == (n_bytes, len(losses))
    assert found["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / n_bytes, rel=1e-5)


def test_chats_count_the_answers_alone(home, tokenizer):
    found = report(home, home / "chats.jsonl", "--max_seq_len=256")
    assert found["targets"] == len(tokenizer("It is 2.<|im_end|>", add_special_tokens=False).input_ids)
    assert found["bytes"] == len("It is 2.")


def test_rows_of_the_trained_length_are_the_default(home, capsys):
    report(home, home / "texts.jsonl", "--rows=1")
    assert f"rows of {TRAINED}" in capsys.readouterr().out


def test_rows_end_where_the_context_does(home, tmp_path, capsys):
    """A row longer than the context is refused where it is asked for; the default never is."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=24))
    keys = {"stage": "pretrain", "tokens_seen": 0, "data_path": "x", "data_hash": "x", "trained_length": TRAINED}
    save_weights(model, tmp_path / "pretrain_64.pth", **keys)
    weight = f"--weight={tmp_path / 'pretrain_64.pth'}"
    report(home, home / "texts.jsonl", weight)
    assert "rows of 24)" in capsys.readouterr().out
    report(home, home / "texts.jsonl", weight, "--max_seq_len=24")
    with pytest.raises(InputError, match="rows of 25 tokens pass the context of 24: lower --max_seq_len"):
        report(home, home / "texts.jsonl", weight, "--max_seq_len=25")


@pytest.mark.parametrize("factor", [2, 4])
def test_loss_by_position(factor, home, tokenizer):
    """Each point is the mean over the windows; the YaRN curve is that of the stretched model; the curve is drawn."""
    png = home / "curve.png"
    found = report(home, home / "long.jsonl", f"--by_position={factor}", "--rows=5", f"--png={png}")
    length = factor * TRAINED
    assert found["length"] == found["ends"][-1] == length and png.stat().st_size > 5000
    documents = encode_texts(tokenizer, [text * 20 for text in TEXTS])
    windows = [d.ids[i : i + length] for d in documents for i in range(0, len(d.ids) - length + 1, length)][:5]
    scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": TRAINED}
    for name, overrides in (("plain", {}), ("yarn", {"inference_rope_scaling": True, "rope_scaling": scaling})):
        model, _ = load_model(home / "pretrain_64.pth", config_overrides=overrides)
        with torch.no_grad():
            losses = torch.stack([direct_losses(model, window) for window in windows]).mean(0)  # (length - 1,)
        assert found["loss"][name][1] == pytest.approx(float(losses[7:15].mean()), rel=1e-4)
        assert found["beyond"][name] == pytest.approx(float(losses[TRAINED - 1 :].mean()), rel=1e-4)
        assert found["whole"][name] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["loss"]["plain"] != found["loss"]["yarn"]


@pytest.mark.parametrize("use_moe", [False, True])
def test_an_export_has_the_figures_of_its_weights(use_moe, home, tmp_path):
    """Llama and Granite: documents of a packed row do not see each other, rows are of the trained length, YaRN too."""
    weights, folder = tmp_path / "pretrain_64.pth", tmp_path / "folder"
    save_random(weights, use_moe=use_moe)
    convert_model.main(convert_model.parse_args([str(weights), str(folder)]))
    for flags in ([home / "texts.jsonl"], [home / "long.jsonl", "--by_position=2", "--rows=3"]):
        expected, found = (report(home, *flags, f"--weight={path}") for path in (weights, folder))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name == "loss" and isinstance(value, dict):
                assert all(found[name][curve] == pytest.approx(value[curve], rel=1e-4) for curve in value)
            elif name != "weights":
                assert found[name] == pytest.approx(value, rel=1e-4)


def test_another_class_is_refused_in_one_sentence(home, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=6400, attention_bias=True)).save_pretrained(tmp_path / "folder")
    with pytest.raises(UsageError, match="not this llama model, with its biases"):
        report(home, home / "texts.jsonl", f"--weight={tmp_path / 'folder'}")


def test_bad_input(home):
    for flags, error, sentence in (
        ([home / "texts.jsonl", "--by_position=64"], InputError, "has no text of 2048 tokens"),
        ([home / "long.jsonl", "--by_position=4096"], InputError, "pass the context"),
        ([home / "chats.jsonl", "--by_position=2"], InputError, "pretraining row needs"),
        ([home / "texts.jsonl", "--png=x.png"], UsageError, "--by_position"),
        ([home / "nothing.jsonl"], InputError, "does not exist"),
    ):
        with pytest.raises(error, match=sentence):
            report(home, *flags)
