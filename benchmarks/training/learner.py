"""The embedded model while it learns."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from data import BOS, EOS, GRID, IGNORED, IMAGE, NAMES, PAD, PATCH, PRESENT, Sample
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from eadaprune_vllm.demo.scenes import COLOURS, SIDE


def make_config(vocab_size: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=7,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",  # one pass over memory where quick_gelu takes three
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=4096,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix products and a softmax, ``[B, H, N, D]`` to ``[B, N, H, D]``: at the lengths of this model and on a CPU a
    third to a half of the time of torch's fused attention and its gradient. Transformers' own, ``eager``, has the
    softmax in float32, which makes a step on whole scenes twice as long."""
    scores = query * scaling @ key.transpose(2, 3)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("plain", plain_attention)


class Learner(torch.nn.Module):
    """The model, and the heads that only learning needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        config = make_config(len(tokenizer))
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.set_attn_implementation("plain")
        width = config.vision_config.hidden_size
        self.names = torch.nn.Linear(width, 1 + len(NAMES))
        self.colours = torch.nn.Linear(width, 1 + len(COLOURS))
        self.present = torch.nn.Linear(width, len(PRESENT))
        prefix = tokenizer("USER: ", add_special_tokens=False).input_ids
        self.prefix = torch.tensor([BOS, *prefix])
        self.mean, self.std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1)

    def tower(self, pixels: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projector is fed with, ``[B, N, D]``, and the CLS token after the last layer, ``[B, D]``."""
        tower = self.llava.model.vision_tower
        embeddings = tower.embeddings
        pixels = ((pixels / 255 - self.mean) / self.std).to(self.llava.dtype)
        rows = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        position = embeddings.position_embedding.weight
        cls = (embeddings.class_embedding + position[0]).expand(len(rows), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat((cls, rows + position[1:][patches]), 1))
        for layer in tower.encoder.layers:
            features, hidden = hidden, layer(hidden, None)
        return features[:, 1:], tower.post_layernorm(hidden[:, 0])

    def forward(self, batch: Sample, jitter: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses, and for each target whether it would be said, ``[targets]``."""
        features, cls = self.tower(batch.pixels, batch.patches)
        # Most patches show nothing.
        weight = torch.where(batch.names.flatten() == 0, 0.3, 1.0)
        losses = {}
        for name, labels in (("names", batch.names), ("colours", batch.colours)):
            logits = getattr(self, name)(features).flatten(0, 1).float()
            losses[name] = (F.cross_entropy(logits, labels.flatten(), reduction="none") * weight).mean()
        losses["present"] = F.binary_cross_entropy_with_logits(self.present(cls).float(), batch.present)
        hidden, attentions = self._language(self.llava.model.multi_modal_projector(features), batch, jitter)
        asked = batch.targets != IGNORED
        logits = self.llava.lm_head(hidden[asked]).float()
        losses["answers"] = F.cross_entropy(logits, batch.targets[asked])
        losses["looks"] = self._looks(attentions[1:3], batch)
        return losses, logits.argmax(-1) == batch.targets[asked]

    def _looks(self, attentions: Sequence[torch.Tensor], batch: Sample) -> torch.Tensor:
        """How little the first head of these layers attends, before it answers, to what a question is about."""
        first, scenes = len(self.prefix), torch.arange(len(batch.last))[:, None]
        known = batch.about.any(-1)
        losses = []
        for weights in attentions:
            image = weights[:, 0, :, first : first + batch.about.shape[-1]]
            rows = image[scenes, first + batch.about.shape[-1] + batch.last].float()
            losses.append(-((rows * batch.about).sum(-1)[known] + 1e-6).log().mean())
        return torch.stack(losses).mean()

    def _language(
        self, image: torch.Tensor, batch: Sample, jitter: bool
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Hidden states of the questions' tokens, ``[B, T, D]``, and of each layer what all tokens attend to."""
        model, size, first, count = self.llava.model.language_model, len(image), len(self.prefix), image.shape[1]
        prefix = model.embed_tokens(self.prefix).expand(size, -1, -1)
        embeddings = torch.cat((prefix, image, model.embed_tokens(batch.tokens)), 1)
        scale = torch.ones(size, 1)
        if jitter:
            scale = torch.where(torch.rand(size, 1) < 0.7, torch.rand(size, 1) * 1.5 * GRID**2 / count, scale)
        positions = torch.cat(
            (
                torch.arange(first).expand(size, -1),
                first + torch.arange(count) * scale,
                first + count * scale + batch.position,
            ),
            1,
        )
        shared = torch.full((size, first + count), -2)
        member = torch.cat((shared, batch.question), 1)
        causal = torch.ones(member.shape[1], member.shape[1], dtype=torch.bool).tril()
        sees = causal & ((member[:, None] == -2) | (member[:, None] == member[:, :, None]))
        mask = torch.zeros(sees.shape, dtype=image.dtype).masked_fill(~sees, -torch.inf)[:, None]
        out = model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_attentions=True,
        )
        return out.last_hidden_state[:, first + count :], out.attentions
