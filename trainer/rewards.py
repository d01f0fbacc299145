"""What a reply is worth: named, weighted terms, each a function of the replies and of nothing else.

    answer      1 for the right answer: inside <answer> ... </answer>, else in what follows </think>, else in the reply;
                of numbers the last one counts, so that naming many gains nothing
    format      1 for the form alone: a thought and an answer where one is to reason, else a whole reply without tags
    tags        1/4 for each of <think> </think> <answer> </answer> that occurs exactly once
    length      0, falling to -1 over the last quarter of the tokens that a reply may have (arXiv 2503.14476)
    repetition  - the share of three words in a row that stood in the reply before
    reward_model  score of a reward model, clipped to [-3, 3]; where one is to reason 0.4 whole + 0.6 answer

Two accuracies are told beside the reward: lenient, the answer occurs anywhere; strict, it is right, and the reply is in
form and not cut. Much of what looks like a gain is form alone.
"""

import argparse
import math
import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.chat import Turn
from dataset.lm_dataset import BLANK, RLAIFDataset
from dataset.scoring import is_right, reasoned_answer
from model.errors import InputError
from model.loading import find_weights
from trainer.reward_models import Judge, open_judge
from trainer.runtime.flags import SWITCH
from trainer.runtime.run import Run

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NUMBER = re.compile(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?")
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
MOST = 3.0  # of a reward model's score, either way
PENALTIES, PENALTY = ("length", "repetition"), (-1.0, 0.0)
NAMES = ("answer", "format", "tags", "length", "repetition", "reward_model")


class Reply(NamedTuple):
    """A reply to a prompt, as it was sampled. Terms read what it says; the rest is for training."""

    turns: list[Turn]  # of the prompt
    text: str
    answer: str | None = None  # that it should give; None: nobody knows
    ids: tuple[int, ...] | list[int] = ()  # the end token too
    cut: bool = False  # it came to no end within the limit
    logprobs: tuple[float, ...] | list[float] = ()  # of the ids, under the distribution that they were drawn from
    number: int = -1  # of the prompt in its file
    row: int = BLANK  # where that stands in the order of the epoch; BLANK: it only fills up

    @property
    def question(self) -> str:
        return self.turns[-1]["content"] if self.turns else ""


class Term(NamedTuple):
    """weight * score(replies)[i] is what reply i gets."""

    name: str
    weight: float
    score: Callable[[list[Reply]], list[float]]

    @property
    def range(self) -> tuple[float, float]:
        """Least and most that it can be, unweighted."""
        return (-MOST, MOST) if self.name == "reward_model" else PENALTY if self.name in PENALTIES else (0.0, 1.0)


# -------------------------------------------------------------------------------------------------------- one reply


def answer_part(text: str) -> str:
    """What is between the last answer tags, else what follows the thought, else all."""
    inside = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return inside[-1] if inside else text.rpartition("</think>")[2]


def gives(text: str, answer: str, question: str = "") -> bool:
    """Whether a text gives this answer and, of numbers, no other one behind it; repeating the question is none."""
    text, answer = (unicodedata.normalize("NFKC", part).strip() for part in (text, answer))
    if NUMBER.fullmatch(answer):
        found = NUMBER.findall(text)
        return bool(found) and float(found[-1].replace(",", "")) == float(answer.replace(",", ""))
    return is_right(text, answer, question)


def in_form(reply: Reply, reasoning: bool) -> bool:
    """Whether a reply is whole and of the form that is asked for."""
    if reasoning:
        return not reply.cut and reasoned_answer(reply.text) is not None
    return not reply.cut and bool(reply.text) and not any(tag in reply.text for tag in TAGS)


def answer_term(reply: Reply) -> float:
    return float(reply.answer is not None and gives(answer_part(reply.text), reply.answer, reply.question))


def format_term(reply: Reply, reasoning: bool) -> float:
    return float(in_form(reply, reasoning))


def tags_term(reply: Reply) -> float:
    return sum(reply.text.count(tag) == 1 for tag in TAGS) / len(TAGS)


def length_term(reply: Reply, limit: int) -> float:
    margin = max(limit // 4, 1)
    return -max(0, len(reply.ids) - (limit - margin)) / margin


def repetition_term(reply: Reply) -> float:
    words = WORD.findall(reply.text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) - 1 if triples else 0.0


def accuracies(replies: list[Reply], reasoning: bool) -> dict[str, Tensor]:
    """Of the replies whose answer is known: strict and lenient, 1 or 0 each."""
    known = [reply for reply in replies if reply.answer is not None]
    strict = [answer_term(reply) * in_form(reply, reasoning) for reply in known]
    lenient = [float(is_right(reply.text, reply.answer, reply.question)) for reply in known]
    return {"accuracy": torch.tensor(strict), "lenient_accuracy": torch.tensor(lenient)}


# ---------------------------------------------------------------------------------------------------- a reward model


class ModelScore:
    """Scores of a reward model (reward_models.py), all replies of a step together, on the training device."""

    def __init__(self, judge: Judge, path: Path, reasoning: bool):
        self.judge, self.path, self.reasoning = judge, path, reasoning

    def __call__(self, replies: list[Reply]) -> list[float]:
        scores = self.clipped(replies, [reply.text for reply in replies])
        if not self.reasoning:
            return scores
        answers = self.clipped(replies, [answer_part(reply.text).strip() for reply in replies])
        tagged = ["</answer>" in reply.text for reply in replies]
        return [0.4 * s + 0.6 * a if t else s for s, a, t in zip(scores, answers, tagged, strict=True)]

    def clipped(self, replies: list[Reply], texts: list[str]) -> list[float]:
        said = zip(replies, texts, strict=True)
        scores = self.judge([[*reply.turns, {"role": "assistant", "content": text}] for reply, text in said])
        if any(math.isnan(score) for score in scores):
            raise InputError(f"{self.path} scores an answer NaN: its weights are broken, or too large for this --dtype")
        return [max(-MOST, min(MOST, score)) for score in scores]


# -------------------------------------------------------------------------------------------------------- the choice


def weights_by_name(text: str) -> dict[str, float]:
    """answer=1,length=0.5 -> {"answer": 1.0, "length": 0.5}, for argparse."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=WEIGHT, such as answer=1,length=0.5") from None
        if name not in NAMES or not abs(weights[name]) < 1e6:
            raise argparse.ArgumentTypeError(f"{part!r}: the terms are {', '.join(NAMES)}, with finite weights")
    return weights


def add_reward_flags(parser: argparse.ArgumentParser) -> None:
    """What replies are rewarded for."""
    group = parser.add_argument_group("rewards")
    group.add_argument(
        "--rewards", type=weights_by_name, metavar="NAME=WEIGHT,...",
        help=f"terms among {', '.join(NAMES)} (default: answer=1,length=0.5,repetition=0.5, where one is to reason "
        "format=0.5,tags=0.5 too; rows without answers: reward_model=1 in place of the answer)",
    )  # fmt: skip
    group.add_argument(
        "--reward_model",
        help="stage name or file of a reward model of ours, folder of a sequence classifier with one label, or of a "
        "class with get_score(tokenizer, messages) (default: reward, where no answers are known)",
    )
    group.add_argument(
        "--trust_remote_code", **SWITCH, default=False, help="1: run the code in the reward model's folder (default: 0)"
    )


def open_rewards(
    args: argparse.Namespace, run: Run, dataset: RLAIFDataset, tokenizer: PreTrainedTokenizerBase
) -> list[Term]:
    """The terms that flags, data and weights ask for, and one line that says which."""
    verifiable = any(answer is not None for answer in dataset.answers)
    path = find_weights(args.out_dir, args.reward_model or "reward")
    weights = dict(args.rewards or {})
    if not weights:
        weights = {"answer": 1.0} if verifiable else {}
        weights |= {"format": 0.5, "tags": 0.5} if args.reasoning else {}
        weights |= {"length": 0.5, "repetition": 0.5}
        if args.reward_model or (not verifiable and path.exists()):
            weights["reward_model"] = 1.0
    elif args.reward_model and "reward_model" not in weights:
        weights["reward_model"] = 1.0
    if "answer" in weights and not verifiable:
        raise InputError(f'{dataset.data_path}: no row has an "answer": leave answer out of --rewards')
    scores = {
        "answer": each(answer_term), "format": each(partial(format_term, reasoning=args.reasoning)),
        "tags": each(tags_term), "length": each(partial(length_term, limit=args.max_new_tokens)),
        "repetition": each(repetition_term),
    }  # fmt: skip
    if "reward_model" in weights:
        judge = open_judge(path, run, tokenizer, args.trust_remote_code)
        scores["reward_model"] = ModelScore(judge, path, args.reasoning)
    why = "" if verifiable or "reward_model" in weights else f" (no answers in the data, and no {path.name})"
    named = f" of {path}" if "reward_model" in weights else ""
    print("rewards: " + " + ".join(f"{weight:g} {name}" for name, weight in weights.items()) + named + why)
    return [Term(name, weight, scores[name]) for name, weight in weights.items()]


def each(function: Callable[[Reply], float]) -> Callable[[list[Reply]], list[float]]:
    """A function of one reply as one of many."""
    return lambda replies: [function(reply) for reply in replies]


def score(terms: list[Term], replies: list[Reply]) -> dict[str, Tensor]:
    """{name: (N,) float32} of every term, unweighted, and "reward": their weighted sum."""
    values = {term.name: torch.tensor(term.score(replies), dtype=torch.float32) for term in terms}
    return {"reward": sum(term.weight * values[term.name] for term in terms), **values}
