"""What replies are rewarded for: every term by hand, the choice of terms, reward models of our own and of others."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import write_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from dataset.demo_data import ensure_demo_data
from dataset.lm_dataset import RLAIFDataset
from model.errors import InputError
from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import load_tokenizer, save_weights
from trainer import rewards
from trainer.rewards import (
    NAMES,
    Reply,
    Term,
    accuracies,
    add_reward_flags,
    answer_term,
    each,
    in_form,
    length_term,
    open_rewards,
    repetition_term,
    score,
    tags_term,
    weights_by_name,
)

ASKED = [{"role": "user", "content": "How much is 3 plus 4?"}]
THOUGHT = "<think>\n3 + 4 = 7.\n</think>\n<answer>\n7\n</answer>"


def reply(text, answer="7", **keys):
    return Reply(ASKED, text, answer, **keys)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3 + 4 = 7.", "7", 1),
        ("7", "7", 1),
        ("3+4=７。", "7", 1),
        ("It is 7.0", "7", 1),
        ("It is 1,234 m", "1234", 1),
        ("Minus: -7", "-7", 1),
        ("10-3", "3", 1),  # no sign between two numbers
        ("17", "7", 0),
        ("5, 6, 7, 8", "7", 0),  # naming many gains nothing
        ("7 or 8", "7", 0),
        ("", "7", 0),
        ("seven", "7", 0),
        ("3 + 4 = 7.", None, 0),
        ("The capital is Paris.", "Paris", 1),
        ("The parish", "Paris", 0),
        ("法国的首都是巴黎。", "巴黎", 1),
        (THOUGHT, "7", 1),
        ("<think>\nperhaps 7\n</think>\n<answer>\n8\n</answer>", "7", 0),
        ("<think>\nperhaps Paris\n</think>\nRome", "Paris", 0),
        ("<think>\nperhaps 7 and nothing behind it", "7", 1),  # no form, which is the business of another term
        ("<answer>6</answer> <answer>7</answer>", "7", 1),
    ],
)
def test_answer(text, answer, right):
    assert answer_term(reply(text, answer)) == right


def test_every_reply_of_the_embedded_data_is_right():
    folder = ensure_demo_data()
    for name in "sft_val", "unseen_val", "follow_up_val", "reason_val", "lora_medical_val":
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            *asked, answered = row["conversations"]
            assert answer_term(Reply(asked, answered["content"], row["answer"])) == 1, row


def test_repeating_the_question_gains_nothing():
    asked = [{"role": "user", "content": "四川省的简称是什么？"}]
    texts = ("四川省的简称是川。", "四川省的简称是鲁。", "四川省")
    assert [answer_term(Reply(asked, text, "川")) for text in texts] == [1, 0, 0]


def test_form():
    assert in_form(reply("3 + 4 = 7."), False) and in_form(reply(THOUGHT), True)
    assert not in_form(reply(THOUGHT), False) and not in_form(reply("7"), True)
    assert not in_form(reply("7", cut=True), False) and not in_form(reply(THOUGHT, cut=True), True)
    assert not in_form(reply(""), False)


def test_tags_length_repetition():
    assert [tags_term(reply(text)) for text in ("7", THOUGHT, THOUGHT * 2, "<think> 7 </think>")] == [0, 1, 0, 0.5]
    lengths = [length_term(reply("", ids=[5] * n), 16) for n in (0, 12, 13, 14, 16)]
    assert lengths == [0, 0, -0.25, -0.5, -1]
    assert length_term(reply("", ids=[5]), 1) == -1 and length_term(reply("", ids=[5]), 2) == 0
    assert repetition_term(reply("a b c d e")) == repetition_term(reply("")) == repetition_term(reply("a b")) == 0
    assert repetition_term(reply("a b a b a b")) == -0.5  # aba bab aba bab
    assert repetition_term(reply("好的好的好的")) == -0.5 and repetition_term(reply("no " * 12)) == -0.9


def test_strict_and_lenient_accuracy():
    replies = [
        reply(THOUGHT), reply("7, I think"), reply("7 or 8"), reply(THOUGHT, cut=True), reply("9"), reply("x", None),
    ]  # fmt: skip
    found = accuracies(replies, True)
    assert found["accuracy"].tolist() == [1, 0, 0, 0, 0]
    assert found["lenient_accuracy"].tolist() == [1, 1, 1, 1, 0]
    assert accuracies(replies, False)["accuracy"].tolist() == [0, 1, 0, 0, 0]
    assert not len(accuracies([reply("x", None)], False)["accuracy"])


def test_the_reward_is_the_weighted_sum():
    terms = [Term("answer", 2.0, each(answer_term)), Term("repetition", 0.5, each(repetition_term))]
    found = score(terms, [reply("7"), reply("7 7 7 7 7 7"), reply("no")])
    assert found["answer"].tolist() == [1, 1, 0] and found["repetition"].tolist() == [0, -0.75, 0]
    assert found["reward"].tolist() == [2, 2 - 0.375, 0] and found["reward"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- choices


def choose(tmp_path, tokenizer, *flags, answers=("7", None), reasoning=False):
    parser = argparse.ArgumentParser()
    add_reward_flags(parser)
    args = parser.parse_args(list(flags))
    vars(args).update(out_dir=tmp_path, reasoning=reasoning, max_new_tokens=16)
    dataset = SimpleNamespace(answers=list(answers), data_path="rl.jsonl")
    run = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    return open_rewards(args, run, dataset, tokenizer)


def weights_of(terms):
    return {term.name: term.weight for term in terms}


def save_reward_model(folder, tokenizer, **sizes):
    torch.manual_seed(0)
    model = MiniMindForScoring(MiniMindConfig(hidden_size=64, num_hidden_layers=1, **sizes)).eval()
    torch.nn.init.normal_(model.score.weight, std=0.2)
    save_weights(
        model, folder / "reward_64.pth", stage="reward", tokens_seen=0, data_path="x", data_hash="h", trained_length=64
    )
    return model


def test_defaults_by_data_and_by_what_is_there(tmp_path, tokenizer, capsys):
    plain = {"answer": 1, "length": 0.5, "repetition": 0.5}
    assert weights_of(choose(tmp_path, tokenizer)) == plain
    assert weights_of(choose(tmp_path, tokenizer, reasoning=True)) == plain | {"format": 0.5, "tags": 0.5}
    assert weights_of(choose(tmp_path, tokenizer, answers=[None])) == {"length": 0.5, "repetition": 0.5}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "rewards: 1 answer + 0.5 length + 0.5 repetition"
    assert "no answers in the data, and no reward_512.pth" in said[-1]
    save_reward_model(tmp_path, tokenizer)
    assert weights_of(choose(tmp_path, tokenizer)) == plain  # what can be verified needs no opinion
    assert weights_of(choose(tmp_path, tokenizer, "--reward_model=reward")) == plain | {"reward_model": 1}
    assert choose(tmp_path, tokenizer, answers=[None])[-1].name == "reward_model"
    assert "reward_64.pth" in capsys.readouterr().out.splitlines()[-1]
    chosen = choose(tmp_path, tokenizer, "--rewards=tags=2,reward_model=0.1")
    assert weights_of(chosen) == {"tags": 2, "reward_model": 0.1}


def test_what_is_missing_is_said(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no row has an"):
        choose(tmp_path, tokenizer, "--rewards=answer=1", answers=[None])
    with pytest.raises(InputError, match=r"reward_512.pth does not exist: train it with trainer/train_reward.py"):
        choose(tmp_path, tokenizer, "--rewards=reward_model=1")


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path, tokenizer):
    save_reward_model(tmp_path, tokenizer, vocab_size=97)
    with pytest.raises(InputError, match=r"reward_64\.pth knows 97 tokens, the policy's tokenizer has 6400"):
        choose(tmp_path, tokenizer, "--rewards=reward_model=1")


def test_weights_by_name():
    assert weights_by_name("answer=1, length=-0.5") == {"answer": 1, "length": -0.5}
    for wrong in "answer", "beauty=1", "answer=x", "answer=inf", "answer=nan", "":
        with pytest.raises(argparse.ArgumentTypeError):
            weights_by_name(wrong)
    assert set(NAMES) >= {"answer", "reward_model"}


# ------------------------------------------------------------------------------------------------- a model of our own


def test_scores_of_the_reward_model(tmp_path, tokenizer, monkeypatch):
    """All replies of a step at once, clipped; where one is to reason the answer part counts for more."""
    model = save_reward_model(tmp_path, tokenizer)
    (term,) = choose(tmp_path, tokenizer, "--rewards=reward_model=1")
    said = [reply("7"), reply("Seven, I think."), reply(THOUGHT), reply("")]
    conversations = [[*ASKED, {"role": "assistant", "content": text.text}] for text in said]
    whole = model.get_scores(tokenizer, conversations)
    assert term.score(said) == pytest.approx(whole, abs=2e-3) and len(set(term.score(said))) == 4
    (reasons,) = choose(tmp_path, tokenizer, "--rewards=reward_model=1", reasoning=True)
    found = reasons.score(said)
    assert found[2] == pytest.approx(0.4 * whole[2] + 0.6 * whole[0], abs=2e-3) and found[1] == pytest.approx(
        whole[1], abs=2e-3
    )
    monkeypatch.setattr(rewards, "MOST", 0.01)
    assert max(map(abs, term.score(said))) == 0.01


# -------------------------------------------------------------------------------------------------- models of others

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SAID = [reply("7"), reply("Seven, I think, for 3 and 4 make 7. " * 3), reply(""), reply("二十", "20"), reply("7 or 8")]


def save_tokenizer(folder, template=TEMPLATE):
    """The project's, which pads on the left and writes a chat otherwise than the policy's."""
    tokenizer = load_tokenizer()
    tokenizer.chat_template, tokenizer.padding_side = template, "left"
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_classifier(folder, kind="llama", **keys):
    torch.manual_seed(0)
    keys = {"vocab_size": 6400, "num_labels": 1, "pad_token_id": None, "initializer_range": 0.5, **keys}
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**SIZES, **keys))
        torch.nn.init.normal_(model.classifier.weight)
    else:
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES, **keys))
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    return model.eval()


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("kind", "pad"), [("llama", None), ("llama", 0), ("llama", 2), ("llama", -1), ("bert", 0), ("bert", None)]
)
def test_scores_of_a_sequence_classifier(kind, pad, tmp_path, tokenizer, monkeypatch, capsys):
    """In batches, padded, as each conversation scores alone; pad 2 is the token that ends every turn."""
    model, own = save_classifier(tmp_path, kind, pad_token_id=pad), save_tokenizer(tmp_path)
    assert own.eos_token_id == 2 == own.convert_tokens_to_ids("<|im_end|>")
    (term,) = choose(tmp_path, tokenizer, "--rewards=reward_model=1", f"--reward_model={tmp_path}")
    assert f"reward_model of {tmp_path}" in capsys.readouterr().out
    alone = []
    for said in SAID:
        text = f"<|im_start|>user: {ASKED[0]['content']}<|im_end|><|im_start|>assistant: {said.text}<|im_end|>"
        with torch.no_grad():
            alone.append(model(torch.tensor([own(text, add_special_tokens=False)["input_ids"]])).logits.item())
    assert len({round(value, 4) for value in alone}) == len(SAID)
    for batch, most in (32, 100.0), (2, 100.0), (32, 0.01):
        monkeypatch.setattr("trainer.reward_models.BATCH", batch)
        monkeypatch.setattr(rewards, "MOST", most)
        assert term.score(SAID) == pytest.approx([max(-most, min(most, value)) for value in alone], abs=1e-5)


def test_a_classifier_reads_system_turns_tools_and_thoughts(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(rewards, "MOST", 100.0)
    model = save_classifier(tmp_path)
    tools = "{% if tools %}<|im_start|>{{ tools[0].function.name }}<|im_end|>{% endif %}"
    own = save_tokenizer(tmp_path, tools + TEMPLATE)
    (term,) = choose(tmp_path, tokenizer, "--rewards=reward_model=1", f"--reward_model={tmp_path}")
    offered = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    before = {"role": "assistant", "content": "Hm.", "reasoning_content": "Why?"}
    turns = [{"role": "developer", "content": "Be brief.", "tools": offered}, *ASKED, before, *ASKED]
    ask = f"<|im_start|>user: {ASKED[0]['content']}<|im_end|>"
    text = f"<|im_start|>add<|im_end|><|im_start|>system: Be brief.<|im_end|>{ask}"
    text += f"<|im_start|>assistant: <think>\nWhy?\n</think>\n\nHm.<|im_end|>{ask}<|im_start|>assistant: 7<|im_end|>"
    ids = own(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits.item()
    assert term.score([Reply(turns, "7")]) == pytest.approx([alone], abs=1e-5)


CODE = """
import os
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

Path(os.environ["RAN"]).touch()


class TinyConfig(PretrainedConfig):
    model_type = "tiny_reward"


class TinyReward(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(6400, 1)
        self.post_init()

    @torch.no_grad()
    def get_score(self, tokenizer, messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
        return self.embed(ids.to(self.device)).mean().item() * 5
"""


@pytest.fixture
def coded(tmp_path, monkeypatch):
    """A folder with code of its own, which leaves the file `ran` when it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    folder = tmp_path / "judge"
    save_tokenizer(folder)
    (folder / "reward_code.py").write_text(CODE)
    config = {"model_type": "tiny_reward", "architectures": ["TinyReward"]}
    config["auto_map"] = {"AutoConfig": "reward_code.TinyConfig", "AutoModel": "reward_code.TinyReward"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file({"embed.weight": torch.randn(6400, 1)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_scores_of_a_folder_with_get_score(coded, tokenizer, monkeypatch):
    flags = ["--rewards=reward_model=1", f"--reward_model={coded}", "--trust_remote_code"]
    (term,) = choose(coded, tokenizer, *flags)
    own, weights = load_tokenizer(coded), load_file(coded / "model.safetensors")["embed.weight"]
    alone = []
    for said in SAID:
        text = f"<|im_start|>user: {ASKED[0]['content']}<|im_end|><|im_start|>assistant: {said.text}<|im_end|>"
        alone.append(weights[own(text, add_special_tokens=False)["input_ids"]].mean().item() * 5)
    assert len({round(value, 4) for value in alone}) == len(SAID)
    assert term.score(SAID) == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr(rewards, "MOST", 0.01)
    assert max(map(abs, term.score(SAID))) == 0.01


def test_code_in_a_folder_runs_only_where_it_is_trusted(coded, tokenizer):
    ran, flags = coded.parent / "ran", ["--rewards=reward_model=1", f"--reward_model={coded}"]
    said = r"judge brings code of its own \(reward_code.py\): read it, and give --trust_remote_code 1 to have it run"
    with pytest.raises(InputError, match=said):
        choose(coded, tokenizer, *flags)
    change_config(coded, model_type="llama")  # which transformers knows
    with pytest.raises(InputError, match=said):
        choose(coded, tokenizer, *flags)
    path = coded / "tokenizer_config.json"
    map_of_tokenizer = {"auto_map": {"AutoTokenizer": [None, "reward_code.TinyTokenizer"]}, "tokenizer_class": "Tiny"}
    path.write_text(json.dumps(json.loads(path.read_text()) | map_of_tokenizer))
    change_config(coded, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(InputError):
        choose(coded, tokenizer, *flags)
    assert not ran.exists()


def test_a_classifier_of_transformers_needs_no_trust_though_code_lies_beside_it(coded, tokenizer):
    save_classifier(coded)
    code = {"AutoModelForSequenceClassification": "reward_code.TinyReward"}
    change_config(coded, auto_map=code, attn_implementation="somebody/kernel")  # of the hub
    choose(coded, tokenizer, "--rewards=reward_model=1", f"--reward_model={coded}")
    assert not (coded.parent / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("reward_code.TinyReward", "reward_code.TinyConfig"), "no reward model|cannot be loaded"),
        (("def get_score", "def score_of"), "its TinyReward has no get_score"),
        ((".mean().item() * 5", ""), "its get_score fails, or gives no number"),
        (("self.post_init()", "self.head = torch.nn.Linear(1, 1); self.post_init()"), "missing keys such as head.bias"),
        (("import os\n", "import os\nraise RuntimeError('no luck')\n"), r"cannot be (read|loaded) \(no luck\)"),
    ],
)
def test_what_is_wrong_with_code_is_said(change, said, coded, tokenizer):
    for name in "reward_code.py", "config.json":
        path = coded / name
        path.write_text(path.read_text().replace(*change))
    with pytest.raises(InputError, match=said):
        choose(coded, tokenizer, "--rewards=reward_model=1", f"--reward_model={coded}", "--trust_remote_code=1")


def save_language_model(folder):
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=6400)).save_pretrained(folder)


def without_head(folder):
    save_language_model(folder)
    change_config(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "a"}, label2id={"a": 0})


def with_broken_weights(folder):
    save_classifier(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 99)


def with_config_of_another_kind(folder):
    save_classifier(folder)
    change_config(folder, model_type=["a"], architectures=5, auto_map=[1])


def with_nan(folder):
    model = save_classifier(folder)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "template", "said"),
    [
        (lambda folder: save_classifier(folder, num_labels=2), TEMPLATE, "tells 2 labels apart, .* num_labels 1"),
        (save_language_model, TEMPLATE, "is a LlamaForCausalLM, no reward model: take a sequence classifier"),
        (without_head, TEMPLATE, "missing keys such as score.weight: it is no whole reward model"),
        (with_broken_weights, TEMPLATE, "cannot be loaded"),
        (with_nan, TEMPLATE, "scores an answer NaN"),
        (with_config_of_another_kind, TEMPLATE, "is a 5, no reward model"),
        (save_classifier, None, "has no chat template: add the one"),
        (save_classifier, "{{ raise_exception('no users') }}", r"chat template refuses a conversation \(no users\)"),
        (save_classifier, "", "has no tokenizer: put the files"),
        (lambda folder: save_classifier(folder, vocab_size=99), TEMPLATE, "has 6400 tokens, the model 99: put its own"),
        (
            lambda folder: save_classifier(folder, max_position_embeddings=24), TEMPLATE,
            "judge reads 24 tokens, a conversation has .* lower --max_seq_len",
        ),
    ],
)  # fmt: skip
def test_folders_that_are_no_reward_models_are_refused(save, template, said, tmp_path, tokenizer):
    folder = tmp_path / "judge"
    save(folder)
    if template != "":
        save_tokenizer(folder, template)
    with pytest.raises(InputError, match=said) as refused:
        (term,) = choose(folder, tokenizer, "--rewards=reward_model=1", f"--reward_model={folder}")
        term.score(SAID)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------------------- keys of prompt rows


def test_keys_of_prompt_rows_that_nobody_reads_are_named_once(tmp_path, tokenizer, capsys):
    row = {"conversations": ASKED, "answer": "7", "language": "en", "system": "Be brief."}
    moody = {"conversations": [{**ASKED[0], "mood": "x"}], "id": 1}
    path = write_rows(tmp_path / "rl.jsonl", [row, moody, {**moody, "id": 2}])
    RLAIFDataset(path, tokenizer, 128)
    told = "'id' (line 2), 'mood' of user turns (line 2)"
    assert capsys.readouterr().out == f"{path}: keys that nobody reads, each where it stands first: {told}\n"
    for name in "rlaif-mini", "rlaif":
        if (data := ensure_demo_data() / f"{name}.jsonl").exists():
            RLAIFDataset(data, tokenizer, 128)
    assert "nobody reads" not in capsys.readouterr().out
