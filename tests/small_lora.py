"""What the tests of LoRA share: a small base, an adapter on it that does something, and what it computes."""

import torch
from torch import nn

from model.LMConfig import MiniMindConfig
from model.model_lora import attach
from model.model_minimind import MiniMindForCausalLM

IDS = torch.arange(3, 27).view(2, 12)
FILE = {"stage": "lora_x", "tokens_seen": 5, "data_path": "d/x.jsonl", "data_hash": "h", "trained_length": 64}


def base_model(seed=0, **sizes):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **sizes})).eval()


def trained_adapter(model, *, rank=4, seed=1, **settings):
    """Attach an adapter whose B is not zero any more."""
    attach(model, rank, **settings)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora.B." in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def lora_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if ".lora." in name}


@torch.no_grad()
def logits(model):
    return model(IDS).logits
