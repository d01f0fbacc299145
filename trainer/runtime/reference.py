"""The frozen model that a stage measures its policy against: the weights that the run began with."""

import argparse
import hashlib

import torch

from model.loading import find_weights, load_model
from trainer.runtime.checkpoint import computed_with
from trainer.runtime.run import Run


def open_reference(args: argparse.Namespace, model: torch.nn.Module, run: Run) -> torch.nn.Module:
    """The frozen --from_weight: at a run's start the policy itself, for a resumed run the weights it began with."""
    if not run.checkpoint or args.from_weight == "none":  # a new model has the same values again, from --seed
        return model
    path = find_weights(
        args.out_dir, args.from_weight, hidden_size=model.config.hidden_size, use_moe=model.config.use_moe
    )
    known = computed_with(model.config)  # of which a public .pth tells only a part
    return load_model(path, config_overrides=known, device=run.device)[0]


def weights_hash(model: torch.nn.Module) -> str:
    """BLAKE2b of all weights, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
