"""How held-out questions are scored: greedy answers, whether they are right and in form, counts by kind."""

import re
import unicodedata
from collections import defaultdict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.chat import encode_prompt
from model.generation import Engine, Request


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    batch_size: int = 128,
    max_new_tokens: int = 48,
) -> list[str]:
    """Greedy answers to the last question of every chat row."""
    engine = Engine(model, tokenizer, max_batch=batch_size, prefill_chunk=4096)
    prompts = [encode_prompt(tokenizer, row["conversations"][:-1]) for row in rows]
    requests = [Request(prompt, temperature=0, max_new_tokens=max_new_tokens) for prompt in prompts]
    return [result.text.strip() for result in engine.generate(requests)]


HAN = r"\u3400-\u9fff"
BEFORE_ONE = r"(?:^|(?<=[^\w])|(?<=[是为叫称作成写]))"  # what may stand before an answer of one character
AFTER_ONE = rf"(?=$|[^\w\s]|\s*(?:是|为|is\b|stands\b|means\b|[{HAN}]))"  # "I do" is no iodine


def is_right(response: str, answer: str, question: str = "") -> bool:
    """Whether the response gives the answer, as a whole word or number and not as a part of the repeated question.

    "7" is not in "17"; "川" is not given by repeating "四川"; "He" is helium's symbol, "he" is not.
    """
    response, answer, question = (unicodedata.normalize("NFKC", text).strip() for text in (response, answer, question))
    flags = 0 if re.fullmatch("[A-Z][a-z]?", answer) else re.IGNORECASE  # chemical symbols keep their case
    pattern = whole(answer)
    if re.fullmatch(f"[A-Z{HAN}]", answer):
        pattern = BEFORE_ONE + pattern + (AFTER_ONE if answer.isascii() else r"(?=$|\W|[是为])")
    for match in re.finditer(pattern, response, flags):
        before = re.search(rf"(?:[{HAN}]|[A-Za-z0-9]+)\s*$", response[: match.start()])
        after = re.match(rf"\s*(?:[{HAN}]|[A-Za-z0-9]+)", response[match.end() :])
        wider = [before[0] + match[0]] if before else []
        wider += [match[0] + after[0]] if after else []
        if not any(re.search(whole(text), question, re.IGNORECASE) for text in wider):
            return True
    return False


def whole(text: str) -> str:
    """A pattern of the text where it begins and ends no longer word or number."""
    left = r"(?<![A-Za-z0-9.])" if re.match(r"[A-Za-z0-9]", text) else ""
    right = r"(?![A-Za-z0-9]|\.\d)" if re.search(r"[A-Za-z0-9]$", text) else ""
    return left + re.escape(text) + right


REASONED = re.compile(r"<think>\n.+\n</think>\n+<answer>\n(.+)\n</answer>", re.DOTALL)


def reasoned_answer(response: str) -> str | None:
    """What stands between the answer tags of a response that is exactly a thought and an answer, else None."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    match = REASONED.fullmatch(response) if all(response.count(tag) == 1 for tag in tags) else None
    return match and match[1]


def score_by(rows: list[dict], right: list[bool], key: str) -> dict[str, list[int]]:
    """{value of key: [right, asked]}, worst first."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row, ok in zip(rows, right, strict=True):
        counts[row[key]][0] += ok
        counts[row[key]][1] += 1
    return dict(sorted(counts.items(), key=lambda item: item[1][0] / item[1][1]))
