"""Whatever says in one number what an answer is worth: open_judge(path, ...) -> judge(conversations) -> scores.

    reward_*.pth, or a folder of MiniMindForScoring    our own (train_reward.py), of the policy's tokenizer
    a folder of transformers' sequence classifiers     one label; its own tokenizer and chat template, batched
    a folder whose class has get_score(tokenizer, messages), such as InternLM2-1.8B-reward: --trust_remote_code 1

Code that lies in a folder runs with --trust_remote_code alone. A foreign model reads text: what the policy said is
tokenised again, by the tokenizer of the judge.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from dataset.chat import SYSTEM_ROLES, Turn, render_assistant, tools_of
from model.errors import InputError
from model.formats import check_tensors, reason
from model.heads import MiniMindForScoring
from model.loading import load_model, tokenizer_beside
from trainer.runtime.run import Run

Judge = Callable[[list[list[Turn]]], list[float]]
BATCH = 32
ASKED: Turn = {"role": "user", "content": "1 + 1?"}
SAMPLE = [[ASKED, {"role": "assistant", "content": text}] for text in ("2", "It is 2.")]


def open_judge(path: Path, run: Run, tokenizer: PreTrainedTokenizerBase, trusted: bool) -> Judge:
    """The reward model in path on the training device; a foreign one scores two answers at once, to show it can."""
    config = foreign_config(path)
    if not config:
        model, _ = load_model(path, device=run.device, kind=MiniMindForScoring)
        if model.config.vocab_size < len(tokenizer):
            raise InputError(
                f"{path} knows {model.config.vocab_size} tokens, the policy's tokenizer has {len(tokenizer)}: "
                "train a reward model with the same tokenizer"
            )
        return partial(model.get_scores, tokenizer)
    loader = choose_loader(path, config, trusted)
    own = open_own_tokenizer(path, trusted)
    model = load_foreign(path, loader, run, trusted)
    judge = ScoringCode(path, model, own) if hasattr(model, "get_score") else Classifier(path, model, own)
    judge(SAMPLE)
    return judge


def foreign_config(path: Path) -> dict[str, Any]:
    """config.json of a folder that is not MiniMind's own; {} for what load_model reads, or refuses."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and config.get("model_type") != "minimind" else {}


def choose_loader(path: Path, config: dict[str, Any], trusted: bool) -> Any:
    """The class of transformers that opens a folder; InputError for one that is no reward model."""
    kind, names, code = (config.get(key) for key in ("model_type", "architectures", "auto_map"))
    known = CLASSIFIERS.get(str(kind))
    architecture = str(names[0]) if names and isinstance(names, list) else str(names or known or kind)
    if architecture == known:
        return AutoModelForSequenceClassification
    code = code if isinstance(code, dict) else {}
    if code and not trusted:
        raise InputError(brings_code(path))
    for loader in (AutoModel, AutoModelForSequenceClassification):
        if loader.__name__ in code:
            return loader
    raise InputError(
        f"{path} is a {architecture}, no reward model: take a sequence classifier with "
        "one label, or a folder whose code has an AutoModel with get_score"
    )


def brings_code(path: Path) -> str:
    """The sentence for a folder whose code nobody allowed to run."""
    files = ", ".join(sorted(file.name for file in path.glob("*.py"))) or "named in its config.json"
    return f"{path} brings code of its own ({files}): read it, and give --trust_remote_code 1 to have it run"


def open_own_tokenizer(path: Path, trusted: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, with a chat template."""
    if tokenizer_beside(path) is None:
        raise InputError(f"{path} has no tokenizer: put the files of its own there (tokenizer.json, ...)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # the Rust reader raises bare Exception, code of a folder anything
        if not trusted and "trust_remote_code" in str(error):
            raise InputError(brings_code(path)) from error
        raise InputError(f"the tokenizer in {path} cannot be read ({reason(error)})") from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer in {path} has no chat template: add the one that the model was trained with")
    return tokenizer


def load_foreign(path: Path, loader: Any, run: Run, trusted: bool) -> PreTrainedModel:
    """The model of a folder in eval mode; InputError where a weight would be made up, or there are several scores."""
    check_tensors(path)
    keys = {"local_files_only": True, "trust_remote_code": trusted}
    dtype = run.dtype if run.device.type == "cuda" else torch.float32
    try:
        config = AutoConfig.from_pretrained(path, **keys)
        config._attn_implementation = None  # config.json may name a kernel of the hub, which is code
        model, report = loader.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True, **keys)
    except Exception as error:  # safetensors, zip, JSON and shape errors have no common class, nor has foreign code
        raise InputError(f"{path} cannot be loaded ({reason(error)}): copy it again, or take another") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            example = min(map(str, report[problem]))
            raise InputError(f"{path} has {problem.replace('_', ' ')} such as {example}: it is no whole reward model")
    if not hasattr(model, "get_score"):
        if loader is AutoModel:
            raise InputError(f"{path}: its {type(model).__name__} has no get_score(tokenizer, messages)")
        if model.config.num_labels != 1:
            raise InputError(
                f"{path} tells {model.config.num_labels} labels apart, a reward model gives one number: take one that "
                "was trained with num_labels 1"
            )
    return model.to(run.device).eval().requires_grad_(False)


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns in the words that every chat template knows: roles and texts."""
    named = [("system" if turn["role"] in SYSTEM_ROLES else turn["role"], turn) for turn in turns]
    said = [render_assistant(turn) if role == "assistant" else turn["content"] for role, turn in named]
    return [{"role": role, "content": text} for (role, _), text in zip(named, said, strict=True)]


class Classifier:
    """A sequence classifier with one label. It scores a batch as it scores each conversation alone.

    Padding is on the right, whatever the tokenizer says: decoders score the last token that is no padding, which they
    tell by config.pad_token_id; where that is not set, by a token that none of the conversations has.
    """

    def __init__(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.path, self.model, self.tokenizer = path, model, tokenizer
        self.config = model.config.get_text_config()
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.longest = getattr(self.config, "max_position_embeddings", None)
        pad = getattr(self.config, "pad_token_id", None)
        self.pad_id = pad if pad is not None and 0 <= pad < self.vocab_size else None
        if len(tokenizer) > self.vocab_size:
            raise InputError(
                f"the tokenizer in {path} has {len(tokenizer)} tokens, the model {self.vocab_size}: put its own there"
            )

    def __call__(self, conversations: list[list[Turn]]) -> list[float]:
        sequences = [self.encode(turns) for turns in conversations]
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for begin in range(0, len(sequences), BATCH):
            chosen = by_length[begin : begin + BATCH]
            for i, value in zip(chosen, self.score([sequences[i] for i in chosen]).tolist(), strict=True):
                scores[i] = value
        return scores

    def encode(self, turns: list[Turn]) -> list[int]:
        """The ids of a conversation, as the model's own chat template writes it."""
        tools = tools_of(turns[0]) if turns[0]["role"] in SYSTEM_ROLES else None
        try:
            text = self.tokenizer.apply_chat_template(messages_of(turns), tools=tools or None, tokenize=False)
        except Exception as error:  # of jinja, or of the template's own
            raise InputError(f"{self.path}: its chat template refuses a conversation ({reason(error)})") from error
        ids = self.tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        if self.longest and len(ids) > self.longest:
            raise InputError(
                f"{self.path} reads {self.longest} tokens, a conversation has {len(ids)} of its: lower --max_seq_len"
            )
        return ids

    @torch.inference_mode()
    def score(self, sequences: list[list[int]]) -> Tensor:
        """The scores of B conversations, (B,) float32."""
        pad = self.pad_id
        if pad is None:
            present = {token for ids in sequences for token in ids}
            pad = self.config.pad_token_id = next(i for i in range(len(present) + 1) if i not in present)
        ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(ids) for ids in sequences])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()


class ScoringCode:
    """A class of a folder's own code that has get_score(tokenizer, messages), a conversation at a time."""

    def __init__(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.path, self.model, self.tokenizer = path, model, tokenizer

    @torch.no_grad()
    def __call__(self, conversations: list[list[Turn]]) -> list[float]:
        with torch.autocast(self.model.device.type, enabled=False):
            return [self.score(messages_of(turns)) for turns in conversations]

    def score(self, messages: list[dict[str, str]]) -> float:
        try:
            return float(self.model.get_score(self.tokenizer, messages))
        except Exception as error:
            raise InputError(f"{self.path}: its get_score fails, or gives no number ({reason(error)})") from error
