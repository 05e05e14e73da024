"""The embedded model while it learns."""

from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import torch
import torch.nn.functional as F
from data import BOS, EOS, GRID, IGNORED, IMAGE, NAMES, PAD, PATCH, PRESENT, Asked, Looks
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from eadaprune_vllm.demo.scenes import COLOURS, PLACES, SIDE

THIRDS = len(PLACES)  # a scene has as many rows and columns of places
SUBJECT = len(NAMES), len(COLOURS), THIRDS**2  # what there is to tell of one thing
LOOKING = (1, 2)  # layers of the language model that learn where to look


def make_config(vocab_size: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=144,
            intermediate_size=432,
            num_hidden_layers=7,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",  # one pass over memory where quick_gelu takes three
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            # What a token is must match over hundreds of tokens: at the usual 1e4 only a tenth of a head would turn
            # slowly enough for that.
            rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            max_position_embeddings=4096,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[B, H, N, D]`` to ``[B, N, H, D]``.

    A mask, ``[B, 1, T, N]``, tells that it is the language model, and what each of the last T tokens, those of
    questions, sees; before them lies the image. In the ``LOOKING`` layers what their first head attends to is given
    too, ``[B, T, N]``: all heads' would need the weights that fused attention never makes.
    """
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None
    shared = query.shape[2] - mask.shape[2]
    image, asked = query[:, :, :shared], query[:, :, shared:]
    out = torch.cat(
        (
            F.scaled_dot_product_attention(
                image, key[:, :, :shared], value[:, :, :shared], is_causal=True, scale=scaling
            ),
            F.scaled_dot_product_attention(asked, key, value, mask, scale=scaling),
        ),
        2,
    ).transpose(1, 2)
    if module.layer_idx not in LOOKING:
        return out, None
    return out, (asked[:, 0] * scaling @ key[:, 0].mT + mask[:, 0]).softmax(-1)


AttentionInterface.register("first_head_shown", attention)


def _initialize(tower: torch.nn.Module) -> None:
    """Where each patch is, as sines and cosines, and in two of three heads equal weights of queries and keys, so that
    a patch at first looks at those like it and near it. The tower then learns as much in half of the steps. (Trockman
    and Kolter, Mimetic Initialization of Self-Attention Layers, 2023.)"""
    state = dict(tower.named_parameters())
    with torch.no_grad():
        for name, weight in state.items():
            if name.endswith("position_embedding.weight"):
                width = weight.shape[1]
                frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
                angles = torch.arange(GRID)[:, None] * frequencies
                waves = torch.cat((angles.sin(), angles.cos()), 1)
                rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
                weight[1:] = 0.7 * torch.cat((rows, columns), -1).flatten(0, 1)
            elif name.endswith("q_proj.weight"):
                alike = weight.shape[0] * 2 // 3
                shared = torch.randn(alike, weight.shape[1]) * 1.4 * weight.shape[1] ** -0.5
                weight[:alike] = state[name.replace("q_proj", "k_proj")][:alike] = shared


class Learner(torch.nn.Module):
    """The model, and the heads that only learning needs."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        config = make_config(len(tokenizer))
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.set_attn_implementation("first_head_shown")
        _initialize(self.llava.model.vision_tower)
        width = config.vision_config.hidden_size
        self.names = torch.nn.Linear(width, 1 + len(NAMES))
        self.colours = torch.nn.Linear(width, 1 + len(COLOURS))
        self.places = torch.nn.Linear(width, THIRDS**2)
        self.letters = torch.nn.Linear(width, len(ascii_lowercase))
        self.centres = torch.nn.Linear(width, 1)
        self.present = torch.nn.Linear(width, len(PRESENT))
        self.words = torch.nn.Linear(config.text_config.hidden_size, len(tokenizer))
        self.subject = torch.nn.Linear(config.text_config.hidden_size, sum(SUBJECT))
        self.heads = [self.names, self.colours, self.places, self.letters, self.centres, self.present]
        prefix = tokenizer("USER: ", add_special_tokens=False).input_ids
        self.prefix = torch.tensor([BOS, *prefix])
        self.mean, self.std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1)

    def tower(self, pixels: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the projector is fed with, ``[B, N, D]``, and the CLS token after the last layer, ``[B, D]``."""
        tower = self.llava.model.vision_tower
        embeddings = tower.embeddings
        pixels = (pixels / 255 - self.mean) / self.std
        rows = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        position = embeddings.position_embedding.weight
        cls = (embeddings.class_embedding + position[0]).expand(len(rows), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat((cls, rows + position[1:][patches]), 1))
        for layer in tower.encoder.layers:
            features, hidden = hidden, layer(hidden, None)
        return features[:, 1:], tower.post_layernorm(hidden[:, 0])

    def see(self, batch: Looks) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of what features tell, and which patches of things are named right."""
        features, cls = self.tower(batch.pixels, batch.patches)
        thing = batch.names > 0
        third = GRID // THIRDS
        places = batch.patches // GRID // third * THIRDS + batch.patches % GRID // third
        names, colours, letters = self.names(features), self.colours(features), self.letters(features)
        spelled = F.binary_cross_entropy_with_logits(letters, batch.letters, reduction="none").sum(-1)
        # Most patches show nothing.
        seen, read = torch.where(thing, 1.0, 0.1), torch.where(batch.letters.any(-1), 1.0, 0.05)
        losses = {
            name: (loss * weight).sum() / weight.sum()
            for name, loss, weight in (
                ("names", F.cross_entropy(names.mT, batch.names, reduction="none"), seen),
                ("colours", F.cross_entropy(colours.mT, batch.colours, reduction="none"), seen),
                ("letters", spelled, read),
            )
        }
        losses["places"] = F.cross_entropy(self.places(features).mT, places)
        losses["centres"] = F.binary_cross_entropy_with_logits(self.centres(features)[..., 0], batch.centres)
        losses["present"] = F.binary_cross_entropy_with_logits(self.present(cls), batch.present)
        return losses, names.argmax(-1)[thing] == batch.names[thing]

    def answer(
        self, features: torch.Tensor, patches: torch.Tensor, batch: Asked, jitter: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The losses of answers to what features of these patches, ``[B, N]``, show, and for each target whether it
        would be said, ``[targets]``."""
        image = self.llava.model.multi_modal_projector(features)
        hidden, (heard, seen), attentions = self._language(image, patches, batch, jitter)
        # The last token before each answer, ``[B, Q]``.
        end = torch.arange(len(batch.last))[:, None], batch.last
        asked = batch.targets != IGNORED
        logits = self.llava.lm_head(hidden[asked])
        losses = {
            "answers": F.cross_entropy(logits, batch.targets[asked]),
            "looks": self._looks([weights[end] for weights in attentions], batch),
            "hears": self._hears(heard[end], batch),
            "sees": self._sees(seen[end], batch),
        }
        return losses, logits.argmax(-1) == batch.targets[asked]

    def _hears(self, first: torch.Tensor, batch: Asked) -> torch.Tensor:
        """How little the first layer, ``[B, Q, D]``, holds which words the question has: before the next ones can look
        for something, it must be known what for."""
        number, tokens = torch.arange(batch.last.shape[1]), torch.arange(batch.tokens.shape[1])
        own = (batch.question[:, None] == number[:, None]) & (tokens <= batch.last[..., None])
        logits = self.words(first)
        words = torch.zeros_like(logits).scatter_add(2, batch.tokens[:, None].expand(own.shape), own.to(logits.dtype))
        loss = F.binary_cross_entropy_with_logits(logits, words.clamp(max=1), reduction="none").sum(-1)
        # A sum over all words there are: in full it would leave the other losses no share of a clipped gradient.
        return 0.1 * loss[own.any(-1)].mean()

    def _sees(self, second: torch.Tensor, batch: Asked) -> torch.Tensor:
        """How little the second layer, ``[B, Q, D]``, holds of the one thing that the question is about."""
        logits = self.subject(second).split(SUBJECT, -1)
        return torch.stack(
            [
                F.cross_entropy(each.mT, batch.subject[..., number], ignore_index=IGNORED)
                for number, each in enumerate(logits)
            ]
        ).sum()

    def _looks(self, attentions: Sequence[torch.Tensor], batch: Asked) -> torch.Tensor:
        """How little the first head of these layers attends, each ``[B, Q, N]``, to what a question is about."""
        first, known = len(self.prefix), batch.about.any(-1)
        losses = []
        for weights in attentions:
            rows = weights[..., first : first + batch.about.shape[-1]]
            losses.append(-((rows * batch.about).sum(-1)[known] + 1e-6).log().mean())
        return torch.stack(losses).mean()

    def _language(
        self, image: torch.Tensor, patches: torch.Tensor, batch: Asked, jitter: bool
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Hidden states of the questions' tokens after the last layer, ``[B, T, D]``, and after the first and second,
        and what the first heads of those that are ``LOOKING`` attend to."""
        model, size, first, count = self.llava.model.language_model, len(image), len(self.prefix), image.shape[1]
        prefix = model.embed_tokens(self.prefix).expand(size, -1, -1)
        embeddings = torch.cat((prefix, image, model.embed_tokens(batch.tokens)), 1)
        scale = torch.ones(size, 1)
        if jitter:
            scale = torch.where(torch.rand(size, 1) < 0.7, torch.rand(size, 1) * 1.5, scale)
        positions = torch.cat(
            (
                torch.arange(first).expand(size, -1),
                first + patches * scale,
                first + GRID**2 * scale + batch.position,
            ),
            1,
        )
        asked = batch.question
        causal = torch.ones(asked.shape[1], asked.shape[1], dtype=torch.bool).tril()
        own = causal & (asked[:, None] == asked[:, :, None])
        sees = torch.cat((own.new_ones(size, asked.shape[1], first + count), own), -1)
        mask = torch.zeros(sees.shape, dtype=image.dtype).masked_fill(~sees, -torch.inf)[:, None]
        out = model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
        states = out.last_hidden_state, *out.hidden_states[1:3]
        last, *early = (hidden[:, first + count :] for hidden in states)
        return last, early, out.attentions
