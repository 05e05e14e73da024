"""Models of real geometry without weights, for ``--load-format dummy``: time and memory are real, answers are not."""

from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

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
# Llama 3.2 1B, and the Vicuna 7B of LLaVA-1.5.
VOCABULARY = 32064
LANGUAGE_MODELS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
}


def make_geometry(folder: Path, language_model: str = "1b") -> LlavaConfig:
    """Write configuration, processor and tokenizer of a LLaVA-1.5 with one of ``LANGUAGE_MODELS``."""
    tokenizer = byte_tokenizer("<image>", vocab_size=VOCABULARY)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L),
        text_config=LlamaConfig(
            **LANGUAGE_MODELS[language_model],
            num_attention_heads=32,
            vocab_size=VOCABULARY,
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
