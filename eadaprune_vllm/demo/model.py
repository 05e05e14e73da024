"""Small LLaVA-1.5 models: how they are written, and one with random weights.

Their towers see 336x336 images as 576 tokens, as the real one does. Random weights show that the plumbing works; they
say nothing about the quality of answers.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SEED = 0
IMAGE_SIZE, PATCH_SIZE = 336, 14
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_model(folder: Path, tower: str = "clip", max_shard_size: str = "5GB", text_layers: int = 2) -> None:
    """Write a checkpoint with weights that depend on ``SEED`` alone.

    Args:
        folder: where to.
        tower: ``clip`` (with a CLS token) or ``siglip`` (without).
        max_shard_size: splits the weights over several files if they are larger.
        text_layers: depth of the language model; the deeper, the slower.
    """
    tokenizer = byte_tokenizer("<image>")
    vision = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision) if tower == "clip" else SiglipVisionConfig(**vision),
        text_config=LlamaConfig(
            vocab_size=320,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    model = random_model(LlavaForConditionalGeneration, config)
    save_model(model, tokenizer, folder, max_shard_size)


def save_model(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint, in bfloat16 and with the hub's names of weights. Arguments are those of ``make_model``."""
    save_without_weights(model.config, tokenizer, folder)
    weights = {_hub_name(name): weight.to(model.config.dtype) for name, weight in model.state_dict().items()}
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)


def save_without_weights(config: LlavaConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write all of a LLaVA-1.5 checkpoint but its weights; ``--load-format dummy`` needs no more.

    Args:
        config: of the model; its dtype and architecture are set.
        tokenizer: one with a placeholder for images.
        folder: where to.
    """
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.architectures = [LlavaForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    clip = config.vision_config.model_type == "clip_vision_model"
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    image_processor = (
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size) if clip else SiglipImageProcessor(size=size)
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=_CHAT_TEMPLATE,
        num_additional_image_tokens=int(clip),
    ).save_pretrained(folder)


def random_model(model_class: Any, config: Any) -> Any:
    """A model whose weights depend on ``SEED`` alone, and whose answers on its images."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = model_class(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, _scale(name, weight))
    return model


def _hub_name(name: str) -> str:
    """Names as in the checkpoints on the hub, which vLLM's loader knows; transformers 5 saves others."""
    for ours, theirs in (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _scale(name: str, weight: torch.Tensor) -> float:
    """Standard deviation of a weight: what an image shows must matter more than where, and reach the answer."""
    if "position_embedding" in name:
        return 0.05
    fan_in = weight[0].numel()
    return float(fan_in**-0.5) if "embed_tokens" not in name else 1.0


def byte_tokenizer(*placeholders: str, vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after the special ones and those that stand for images. Up to ``vocab_size`` the rest are words
    that no text is made into, so that whatever a model says can be read."""
    special = [*SPECIAL, *placeholders]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{number}" for number in range(vocab_size - len(special) - len(alphabet))]
    vocabulary = {token: index for index, token in enumerate(special + alphabet + words)}
    tokenizer = byte_level(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return fast(tokenizer)


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer that ``model`` cuts bytes together for."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same as transformers takes it; it has the tokens ``SPECIAL``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=4096,
    )
