"""What the tests of the engine share: small models with opinions, prompts, and the distribution of a token in words."""

import math
import random
from collections import Counter

import torch

from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"inference_rope_scaling": True, "original_max_position_embeddings": 32, "max_position_embeddings": 256}
KINDS = {"dense": {}, "moe": {"use_moe": True}, "yarn": YARN}


def make_model(half=True, **overrides) -> MiniMindForCausalLM:
    """A small model with opinions: wide random weights, that float16 holds exactly (as those of a .pth) if `half`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "max_position_embeddings": 256, "tie_word_embeddings": False}
    model = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **sizes, **overrides}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.25)
        if half:
            parameter.data = parameter.data.half().float()
    return model.eval()


def make_prompts(*lengths, vocab_size=211, seed=1):
    generator = random.Random(seed)
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def plain_distribution(logits, request, reply):
    """Probabilities of a reply's next token, in words: penalties, temperature, top-k, top-p, min-p."""
    logits = list(logits)
    for token in {*request.prompt, *reply}:
        factor = request.repetition_penalty
        logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
    for token, count in Counter(reply).items():
        logits[token] -= request.presence_penalty + request.frequency_penalty * count
    if request.temperature == 0:
        best = max(range(len(logits)), key=lambda i: logits[i])
        return [float(i == best) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / request.temperature) for x in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: request.top_k or None]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass < request.top_p or not kept:
            kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= request.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]
