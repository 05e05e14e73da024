"""Models of real geometry without weights, for ``--load-format dummy``: time and memory are real, answers are not."""

from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from eadaprune_vllm.demo.model import byte_tokenizer, save_without_weights

# CLIP-L/14-336, the tower of LLaVA-1.5.
CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
IMAGE_TOKENS = 576  # of LLaVA-1.5
VOCABULARY = 32064
# Llama 3.2 1B, and the Vicuna 7B of LLaVA-1.5. The tiny ones, with towers as tiny, are to try a benchmark out.
LANGUAGE_MODELS = {
    "tiny": {"hidden_size": 1024, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "wide": {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 1},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
}
TINY_TOWER = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
# Qwen2.5-VL-7B, as far as it differs from the defaults of its configuration.
QWEN = {
    "7b": (
        {"out_hidden_size": 3584, "intermediate_size": 3420, "hidden_size": 1280},
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ),
    "wide": (
        {"out_hidden_size": 3584, "intermediate_size": 64, "hidden_size": 64, "depth": 1, "num_heads": 2},
        {"hidden_size": 3584, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 28}
        | {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ),
    "tiny": (
        {"out_hidden_size": 256, "intermediate_size": 256, "hidden_size": 64, "depth": 2, "num_heads": 2}
        | {"fullatt_block_indexes": [1]},
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
    ),
}


def make_geometry(folder: Path, language_model: str = "1b", vocabulary: int = VOCABULARY) -> LlavaConfig:
    """Write configuration, processor and tokenizer of a LLaVA-1.5 with one of ``LANGUAGE_MODELS``."""
    tokenizer = byte_tokenizer("<image>", vocab_size=vocabulary)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L | (TINY_TOWER if language_model in ("tiny", "wide") else {})),
        text_config=LlamaConfig(
            **LANGUAGE_MODELS[language_model],
            num_attention_heads=32,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    save_without_weights(config, tokenizer, folder)
    return config


def flops(config: LlavaConfig, images: int, prompt_tokens: float) -> float:
    """Additions and multiplications for one prompt up to its first token: a pair of them counts as two."""

    def layers(width: int, inner: int, kv: int, gated: bool, depth: int, tokens: float, causal: bool) -> float:
        weights = width * width * 2 + width * kv * 2 + width * inner * (3 if gated else 2)
        attention = 4 * tokens * width / (2 if causal else 1)
        return depth * tokens * (2 * weights + attention)

    vision, text = config.vision_config, config.text_config
    width, depth = vision.hidden_size, vision.num_hidden_layers + 1 + config.vision_feature_layer
    tower = layers(width, vision.intermediate_size, width, False, depth, IMAGE_TOKENS + 1, causal=False)
    width, kv = text.hidden_size, text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    language = layers(width, text.intermediate_size, kv, True, text.num_hidden_layers, prompt_tokens, causal=True)
    return images * tower + language


def make_qwen(folder: Path, language_model: str, vocabulary: int = VOCABULARY) -> None:
    """The same of a Qwen2.5-VL, which takes images of up to 16384 tokens."""
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokens |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokenizer = byte_tokenizer(*tokens.values(), vocab_size=vocabulary)
    vision, text = QWEN[language_model]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = text | special | {"vocab_size": vocabulary}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids)
    config.dtype, config.architectures = "bfloat16", ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
    )
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=sizes), tokenizer, Qwen2VLVideoProcessor(size=sizes), chat_template=template
    ).save_pretrained(folder)
