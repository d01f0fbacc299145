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


def is_right(response: str, answer: str) -> bool:
    """Whether the answer occurs in the response; Latin words and numbers must stand alone ("7" is not in "17")."""
    response, answer = (unicodedata.normalize("NFKC", text).casefold() for text in (response, answer))
    left = r"(?<![a-z0-9.])" if re.match(r"[a-z0-9]", answer) else ""
    right = r"(?![a-z0-9]|\.\d)" if re.search(r"[a-z0-9]$", answer) else ""
    return re.search(left + re.escape(answer) + right, response) is not None


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
