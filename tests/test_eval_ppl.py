"""scripts/eval_ppl.py: loss, perplexity and bits per byte against a direct computation; loss by position with YaRN."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from dataset.lm_dataset import encode_texts
from model.errors import InputError, UsageError
from model.LMConfig import MiniMindConfig
from model.loading import load_model, save_weights
from model.model_minimind import MiniMindForCausalLM
from scripts import eval_ppl

TEXTS = ["床前明月光，疑是地上霜。", "The quick brown fox jumps over the lazy dog. " * 3, "12 + 30 = 42"]
TRAINED = 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppl")
    torch.manual_seed(3)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    keys = {"stage": "pretrain", "tokens_seen": 0, "data_path": "x", "data_hash": "x", "trained_length": TRAINED}
    save_weights(model, folder / "pretrain_64.pth", **keys)
    write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write(folder / "long.jsonl", [{"text": text * 20} for text in TEXTS])
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    write(folder / "chats.jsonl", [{"conversations": turns}])
    return folder


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


def test_loss_by_position(home, tokenizer):
    """Each point is the mean over the windows; the YaRN curve is that of the stretched model; the curve is drawn."""
    png = home / "curve.png"
    found = report(home, home / "long.jsonl", "--by_position=4", "--rows=5", f"--png={png}")
    assert found["length"] == 4 * TRAINED and found["ends"][-1] == 4 * TRAINED and png.stat().st_size > 5000
    documents = encode_texts(tokenizer, [text * 20 for text in TEXTS])
    windows = [d.ids[i : i + 128] for d in documents for i in range(0, len(d.ids) - 127, 128)][:5]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
    for name, overrides in (("plain", {}), ("yarn", {"inference_rope_scaling": True, "rope_scaling": scaling})):
        model, _ = load_model(home / "pretrain_64.pth", config_overrides=overrides)
        with torch.no_grad():
            losses = torch.stack([direct_losses(model, window) for window in windows]).mean(0)  # (127,)
        assert found["loss"][name][1] == pytest.approx(float(losses[7:15].mean()), rel=1e-4)
        assert found["beyond"][name] == pytest.approx(float(losses[TRAINED - 1 :].mean()), rel=1e-4)
        assert found["whole"][name] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["loss"]["plain"] != found["loss"]["yarn"]


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
