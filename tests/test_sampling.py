"""From logits to tokens: frequencies of draws, transformers' processors, penalties."""

import math
import random

import pytest
import torch
from pretended_cuda import PretendedCuda
from small_engine import make_prompts, plain_distribution
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.generation import Engine, Request, sample_seed
from model.sampling import Sampler, penalise

SETTINGS = [
    {"temperature": 0.6},
    {"temperature": 1.5},
    {"top_p": 0.7},
    {"top_k": 5},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
]


def fits(counts, probs):
    """Whether a chi-square test leaves counts of draws from probs plausible (p > 0.001); nothing drawn where p = 0."""
    total = counts.sum()
    assert counts[probs == 0].sum() == 0
    expected, counts = probs[probs > 0] * total, counts[probs > 0]
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum(0, keepdim=True).clamp(min=1e-9)))
    counts = torch.cat((counts[~rare], counts[rare].sum(0, keepdim=True)))
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2) > 0.001


@pytest.fixture(scope="module")
def uniforms():
    """The first number of each of 100,000 samples of one request."""
    return [random.Random(sample_seed(7, i)).getrandbits(52) / 2**52 for i in range(100_000)]


@pytest.mark.parametrize("wanted", SETTINGS, ids=str)
def test_frequencies_of_100k_draws(wanted, uniforms):
    torch.manual_seed(0)
    request = Request([1], **wanted)
    logits = torch.randn(40) * 2
    probs = torch.tensor(plain_distribution(logits.tolist(), request, []), dtype=torch.float64)
    counts = torch.zeros(40, dtype=torch.float64)
    sampler = Sampler([request] * 10_000, 40, torch.device("cpu"))
    logprobs = sampler.logprobs(logits.expand(10_000, -1))
    torch.testing.assert_close(logprobs[0].exp().double(), probs, atol=1e-6, rtol=1e-5)
    for start in range(0, 100_000, 10_000):
        drawn = sampler.draw(logprobs, uniforms[start : start + 10_000])
        counts += drawn.bincount(minlength=40)
    assert fits(counts, probs)
    assert not fits(counts, (probs + 0.02 * (probs > 0)) / (probs + 0.02 * (probs > 0)).sum())  # the test can fail


def test_frequencies_through_the_engine(dense):
    """4,000 samples of one prompt, of which the first reads it: first tokens as often as the model says."""
    request = Request(make_prompts(6)[0], n=4000, seed=5, max_new_tokens=1, temperature=2.5, top_p=0.9)
    results = Engine(dense, max_batch=64).generate([request])
    logits = dense(torch.tensor([request.prompt])).logits[0, -1]
    probs = torch.tensor(plain_distribution(logits.tolist(), request, []), dtype=torch.float64)
    counts = torch.tensor([result.ids[0] for result in results]).bincount(minlength=len(probs)).double()
    assert fits(counts, probs)
    for result in results[:50]:
        assert result.logprobs[0] == pytest.approx(math.log(probs[result.ids[0]]), abs=1e-4)


def test_a_number_at_the_very_end_draws_nothing_impossible():
    logits = torch.tensor([[-30.0, 2.0, 1.0, -math.inf], [0.0, -math.inf, -math.inf, -math.inf]])
    sampler = Sampler([Request([1])] * 2, 4, torch.device("cpu"))
    logprobs = sampler.logprobs(logits)
    assert sampler.draw(logprobs, [1 - 2**-52] * 2).tolist() == [2, 0]
    assert sampler.draw(logprobs, [0.0, 0.0]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("wanted", "warpers"),
    [
        ({"temperature": 0.7, "top_k": 50}, [TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)]),
        ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
        ({"top_p": 0.99}, [TopPLogitsWarper(0.99)]),  # more tokens than the first look at the best finds
        ({"top_k": 2000, "top_p": 0.95}, [TopKLogitsWarper(2000), TopPLogitsWarper(0.95)]),
        ({"top_k": 30, "top_p": 0.6}, [TopKLogitsWarper(30), TopPLogitsWarper(0.6)]),
        ({"min_p": 0.02, "temperature": 1.4}, [TemperatureLogitsWarper(1.4), MinPLogitsWarper(0.02)]),
        (
            {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(0.8), TopKLogitsWarper(100), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_distributions_are_those_of_transformers(wanted, warpers):
    torch.manual_seed(3)
    logits = torch.randn(4, 6400) * 2
    requests = [Request([1], **wanted), Request([1]), Request([1], temperature=0), Request([1], **wanted)]
    logprobs = Sampler(requests, 6400, torch.device("cpu")).logprobs(logits)
    for row in (0, 3):
        scores = logits[row][None]
        for warper in warpers:
            scores = warper(torch.tensor([[1]]), scores)
        assert torch.equal(logprobs[row].isinf(), scores[0].isinf())
        torch.testing.assert_close(logprobs[row], scores[0].log_softmax(-1), atol=1e-5, rtol=1e-5)
    for row in (1, 2):  # the neighbours keep all tokens
        torch.testing.assert_close(logprobs[row], logits[row].log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_a_deterministic_run_draws_on_a_gpu(monkeypatch):
    """CUDA has no deterministic cumsum of floats and would raise; the numbers drawn are the same."""
    torch.manual_seed(0)
    logits, uniforms = torch.randn(3, 50) * 2, [0.1, 0.5, 0.9]
    sampler = Sampler([Request([1], top_p=0.8, top_k=20)] * 3, 50, torch.device("cpu"))
    expected = sampler.draw(sampler.logprobs(logits), uniforms)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with PretendedCuda():
        with pytest.raises(RuntimeError, match="deterministic"):
            logits.cumsum(-1)  # the pretence holds
        drawn = sampler.draw(sampler.logprobs(logits), uniforms)
    assert drawn.tolist() == expected.tolist()


def test_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits = torch.randn(50)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 4, 3, 9, 12]]), logits[None])[0]
    torch.testing.assert_close(penalise(logits, Request([3, 4, 3], repetition_penalty=1.7), [9, 12]), expected)


def test_presence_and_frequency_count_the_reply_alone():
    logits = torch.zeros(6)
    lowered = penalise(logits, Request([1, 1], presence_penalty=1.0, frequency_penalty=0.5), [2, 3, 2])
    assert lowered.tolist() == [0, 0, -2.0, -1.5, 0, 0] and logits.tolist() == [0] * 6
