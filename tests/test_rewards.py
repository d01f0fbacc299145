"""What replies are rewarded for: every term by hand, the choice of terms, a reward model of our own."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from dataset.demo_data import ensure_demo_data
from model.errors import InputError
from model.heads import MiniMindForScoring
from model.LMConfig import MiniMindConfig
from model.loading import save_weights
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
    return open_rewards(args, SimpleNamespace(device=torch.device("cpu")), dataset, tokenizer)


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
