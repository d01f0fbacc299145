"""dataset/scoring.py: what counts as right and as a thought with an answer, and whose answers are scored."""

import pytest
import torch
from transformers import GenerationConfig

from dataset import scoring
from dataset.chat import encode_prompt
from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The sum is 7.", "7", True),
        ("17", "7", False),
        ("71", "7", False),
        ("7.5", "7", False),
        ("1.7", "7", False),
        ("It is 7.", "7", True),
        ("7，对吗？", "7", True),
        ("等于7", "7", True),
        ("答案是１７。", "17", True),
        ("3.14", "3.14", True),
        ("13.14", "3.14", False),
        ("法国的首都是巴黎。", "巴黎", True),
        ("法国的首都是里昂。", "巴黎", False),
        ("It is PARIS!", "Paris", True),
        ("the parish", "Paris", False),
        ("(Au)", "Au", True),
        ("Australia", "Au", False),
        ("a+b", "+", True),
        ("", "Paris", False),
        ("New York City", "new york", True),
    ],
)
def test_is_right(response, answer, right):
    assert scoring.is_right(response, answer) is right


@pytest.mark.parametrize(
    ("question", "response", "answer", "right"),
    [
        ("四川省的简称是什么？", "四川省的简称是川。", "川", True),
        ("四川省的简称是什么？", "四川省的简称是鲁。", "川", False),
        ("四川省的简称是什么？", "川是四川省的简称。", "川", True),
        ("四川省简称", "川", "川", True),
        ("“大”的反义词是什么？", "“大”的反义词是“小”。", "小", True),
        ("“高大”的反义词是什么？", "是“矮小”。", "小", False),
        ("Symbol of oxygen?", "The symbol for oxygen is O.", "O", True),
        ("Symbol of oxygen?", "O is the symbol for oxygen.", "O", True),
        ("氧的符号？", "氧的元素符号是 O。", "O", True),
        ("氧的符号？", "O 是氧的符号", "O", True),
        ("Symbol of oxygen?", "The o is round", "O", False),
        ("Symbol of iodine?", "I do not know that.", "I", False),
        ("Symbol of iodine?", "The symbol for iodine is I.", "I", True),
        ("Symbol of helium?", "Who is he? A gas.", "He", False),
        ("Symbol of helium?", "He stands for helium.", "He", True),
        ("What is 7 plus 1?", "7 plus 1 is 8.", "8", True),
        ("What is the capital of Mexico?", "The capital of Mexico is Mexico City.", "Mexico City", True),
        ("The capital of Monaco?", "The capital of Monaco is Rome.", "Monaco", False),
        ("The capital of Monaco?", "Monaco", "Monaco", True),
        ("Capital of Singapore?", "The capital of Singapore is Singapore.", "Singapore", True),
        ("How is uranium abbreviated?", "The symbol for uranium is U.", "U", True),
        ("三的平方？", "3 的平方是 9", "9", True),
    ],
)
def test_repeating_the_question_is_no_answer(question, response, answer, right):
    assert scoring.is_right(response, answer, question) is right


def test_score_by_counts_and_sorts_worst_first():
    rows = [{"language": "en"}] * 2 + [{"language": "zh"}] * 3
    scores = scoring.score_by(rows, [True, True, True, False, False], "language")
    assert scores == {"zh": [1, 3], "en": [2, 2]} and list(scores) == ["zh", "en"]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\n3 + 4 = 7\n</think>\n<answer>\n7\n</answer>", "7"),
        ("<think>\na\nb\n</think>\n\n<answer>\n7\nor 8\n</answer>", "7\nor 8"),
        ("<think>\n3 + 4 = 7\n</think>\n7", None),
        ("<answer>\n7\n</answer>", None),
        ("7 <think>\na\n</think>\n<answer>\n7\n</answer>", None),
        ("<think>\na\n</think>\n<answer>\n7\n</answer> so", None),
        ("<think>\na\n</think>\n<answer>\n</answer>", None),
        ("<think>\na\n</think>\n<answer>\n7\n</answer>\n<answer>\n8\n</answer>", None),
    ],
)
def test_reasoned_answer_takes_the_exact_form_alone(response, answer):
    assert scoring.reasoned_answer(response) == answer


def test_answers_are_the_likeliest_tokens_of_each_question_alone(tokenizer):
    """Against transformers' generate, one question at a time."""
    torch.manual_seed(3)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2)).eval()
    with torch.no_grad():  # far from uniform, so that answers differ
        for parameter in model.parameters():
            parameter.mul_(4)
    turns = [[{"role": "user", "content": "Why? " * (1 + 3 * (i % 4)) + str(i)}] for i in range(7)]
    rows = [{"conversations": [*asked, {"role": "assistant", "content": "x"}]} for asked in turns]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    alone = []
    for asked in turns:
        ids = torch.tensor([encode_prompt(tokenizer, asked)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        alone.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert scoring.answer_all(model, tokenizer, rows, batch_size=3, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


def test_answers_end_with_the_context(tokenizer):
    rows = [{"conversations": [{"role": role, "content": "Why?"} for role in ("user", "assistant")]}]
    length = len(encode_prompt(tokenizer, rows[0]["conversations"][:1]))
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, max_position_embeddings=length + 2)
    torch.manual_seed(3)
    model = MiniMindForCausalLM(config).eval()
    (cut,) = scoring.answer_all(model, tokenizer, rows)
    assert [cut] == scoring.answer_all(model, tokenizer, rows, max_new_tokens=2)
