"""A model small enough for tests, whose logits differ clearly, and random tokens for it."""

import torch

from model.LMConfig import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(**overrides) -> MiniMindForCausalLM:
    """A small model in eval mode whose weights are large enough for logits that differ clearly."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SIZES, **overrides}))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))
