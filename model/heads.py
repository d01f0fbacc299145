"""A number for every token instead of a word: the reward model, and the critic of PPO.

    score(x_1 .. x_t) = w . h_t        h_t (D,) the last hidden state of token t, w (D,) the head

The score of an answer is that of its last token, which has seen all of it. The head starts at zero: at first every
answer scores 0, and none leads by chance. Weight keys are those of transformers' sequence classifiers: `model.*` and
`score.weight`.

Shapes: B batch, T tokens, D hidden.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.chat import Turn, encode_conversations

from .model_minimind import MiniMindForCausalLM, MiniMindModel, MiniMindPreTrainedModel
from .outputs import ScoringOutput


class MiniMindForScoring(MiniMindPreTrainedModel):
    """MiniMind with a scalar head on every token."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The head zero, all else as in the language model."""
        super()._init_weights(module)
        if module is getattr(self, "score", None):
            nn.init.zeros_(module.weight)

    @classmethod
    def from_language_model(cls, language_model: MiniMindForCausalLM) -> "MiniMindForScoring":
        """A scoring model on the layers of a language model (shared with it, not copied), its head zero."""
        with torch.device("meta"):  # no memory for layers that are replaced at once
            model = cls(language_model.config)
        model.model = language_model.model
        weight = language_model.model.norm.weight
        model.score.weight = nn.Parameter(weight.new_zeros(1, language_model.config.hidden_size))
        return model.train(language_model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_bounds: Tensor | None = None,
    ) -> ScoringOutput:
        """input_ids (B, T), attention_mask (B, T) and what else MiniMindForCausalLM takes -> scores (B, T) float32."""
        out = self.model(input_ids, attention_mask, position_ids, bounds=document_bounds)
        with torch.autocast(out.last_hidden_state.device.type, enabled=False):  # bfloat16 would round scores to 1%
            scores = nn.functional.linear(out.last_hidden_state.float(), self.score.weight.float())[..., 0]
        return ScoringOutput(scores=scores, aux_loss=out.aux_loss, expert_load=out.expert_load)

    @torch.inference_mode()
    def score_ids(self, sequences: list[list[int]], batch_size: int = 32) -> list[float]:
        """The score of the last token of each sequence; sequences of similar length share a batch."""
        scores = [0.0] * len(sequences)
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for begin in range(0, len(sequences), batch_size):
            chosen = by_length[begin : begin + batch_size]
            lengths = torch.tensor([len(sequences[i]) for i in chosen], device=self.device)
            input_ids = torch.zeros(len(chosen), int(lengths.max()), dtype=torch.long, device=self.device)
            for row, i in zip(input_ids, chosen, strict=True):
                row[: len(sequences[i])] = torch.tensor(sequences[i])
            mask = (torch.arange(input_ids.shape[1], device=self.device) < lengths[:, None]).long()
            last = self(input_ids, mask).scores.gather(1, lengths[:, None] - 1)[:, 0]
            for i, value in zip(chosen, last.tolist(), strict=True):
                scores[i] = value
        return scores

    def get_scores(
        self, tokenizer: PreTrainedTokenizerBase, conversations: list[list[Turn]], batch_size: int = 32
    ) -> list[float]:
        """The score of the last turn of each conversation, an assistant's; it may be empty."""
        if any(not turns or turns[-1]["role"] != "assistant" for turns in conversations):
            raise ValueError("the last turn of a conversation to score must be an assistant's")
        answered, end = [], tokenizer.convert_tokens_to_ids("<|im_end|>")
        for ids, _, _ in encode_conversations(tokenizer, conversations):
            answered.append(ids[: len(ids) - ids[::-1].index(end)])  # without the newline behind the last one
        return self.score_ids(answered, batch_size)
