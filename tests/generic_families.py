"""Small checkpoints of architectures whose adapter is generic, with random weights."""

from collections.abc import Callable
from typing import Any

from molmo2 import molmo2
from parts import FULL, LINEAR, LLAVA, PATCH, SIDE, TEMPLATE, TILES, qwen3_5_settings, text_settings, tower_config
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
    LlamaConfig,
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from eadaprune_vllm.demo.model import byte_tokenizer


def _named(tokens: dict[str, str], *others: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and some more, of which the first have names that processors know."""
    tokenizer = byte_tokenizer(*tokens.values())
    tokenizer.add_tokens(list(others))
    special = {name: getattr(tokenizer, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=tokens, model_max_length=4096, **special
    )


GEMMA = _named(
    {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    *("\n" * count for count in range(1, 5)),
)
GEMMA4 = _named(
    {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
    }
)
INTERN = _named(
    {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "<|video_pad|>",
)
KIMI = _named(
    {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_end|>",
)
MINICPM = _named(
    {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
)
MISTRAL = byte_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _llava_next_video() -> tuple[Any, Any, Any]:
    """Four patches are a token."""
    config = LlavaNextVideoConfig(
        vision_config=tower_config(CLIPVisionConfig, 2 * SIDE),
        text_config=LlamaConfig(**text_settings(LLAVA)),
        image_token_index=LLAVA.convert_tokens_to_ids("<image>"),
        video_token_index=LLAVA.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=TILES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    size, edge = {"height": 2 * SIDE, "width": 2 * SIDE}, {"shortest_edge": 2 * SIDE}
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(size=edge, crop_size=size),
        LlavaNextImageProcessor(size=edge, crop_size=size, image_grid_pinpoints=TILES),
        LLAVA,
        chat_template=TEMPLATE.format(image="<image>\n", video="<video>\n"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaNextVideoForConditionalGeneration, config, processor


def _gemma3() -> tuple[Any, Any, Any]:
    """Four patches are a token."""
    tokens = (SIDE // PATCH) ** 2
    config = Gemma3Config(
        vision_config=tower_config(SiglipVisionConfig, 2 * SIDE, vision_use_head=False),
        text_config=text_settings(GEMMA) | {"head_dim": 32, "query_pre_attn_scalar": 32},
        mm_tokens_per_image=tokens,
        boi_token_index=GEMMA.boi_token_id,
        eoi_token_index=GEMMA.eoi_token_id,
        image_token_index=GEMMA.image_token_id,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE}),
        GEMMA,
        chat_template=TEMPLATE.format(image="<start_of_image>", video=""),
        image_seq_length=tokens,
    )
    return Gemma3ForConditionalGeneration, config, processor


def _gemma4() -> tuple[Any, Any, Any]:
    """Nine patches are a token."""
    tokens = 70  # at most, of an image or a frame; the fewest that its processor allows
    text = {"head_dim": 32, "global_head_dim": 32, "sliding_window": 4096}
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "position_embedding_size": 1024,
        "default_output_length": tokens,
    }
    config = Gemma4Config(
        vision_config=vision,
        text_config=text_settings(GEMMA4)
        | text
        # vLLM takes it for granted that the token which stands for images is the first.
        | {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "pad_token_id": 0},
        boi_token_id=GEMMA4.boi_token_id,
        eoi_token_id=GEMMA4.eoi_token_id,
        image_token_id=GEMMA4.image_token_id,
        boa_token_id=GEMMA4.boa_token_id,
        eoa_token_index=GEMMA4.eoa_token_id,
        audio_token_id=GEMMA4.audio_token_id,
        video_token_id=GEMMA4.video_token_id,
    )
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=tokens),
        GEMMA4,
        Gemma4VideoProcessor(max_soft_tokens=tokens),
        chat_template=TEMPLATE.format(image="<|image|>", video="<|video|>"),
        image_seq_length=tokens,
    )
    return Gemma4ForConditionalGeneration, config, processor


def _internvl() -> tuple[Any, Any, Any]:
    """Four patches are a token."""
    tokens, size = (SIDE // PATCH) ** 2, {"height": 2 * SIDE, "width": 2 * SIDE}
    config = InternVLConfig(
        vision_config=tower_config(InternVLVisionConfig, 2 * SIDE, attention_bias=True),
        text_config=Qwen2Config(**text_settings(INTERN)),
        image_token_id=INTERN.context_image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        INTERN,
        InternVLVideoProcessor(size=size),
        image_seq_length=tokens,
        chat_template=TEMPLATE.format(image="<IMG_CONTEXT>\n", video="<video>\n"),
    )
    return InternVLForConditionalGeneration, config, processor


def _kimi_k25() -> tuple[Any, Any, Any]:
    """Four patches are a token, and the language model has multi-head latent attention."""
    latent = {"kv_lora_rank": 512, "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    rope = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    text = (
        text_settings(KIMI) | latent | {"num_key_value_heads": 4, "first_k_dense_replace": 3, "rope_parameters": rope}
    )
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Kimi_K25Config(
        vision_config=vision | {"pos_emb_height": 16, "pos_emb_width": 16},
        text_config=DeepseekV3Config(**text),
        projection_hidden_size=64,
        image_token_id=KIMI.image_token_id,
        video_token_id=KIMI.video_token_id,
        vision_start_token_id=KIMI.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=KIMI.convert_tokens_to_ids("<|media_end|>"),
        tie_word_embeddings=False,
    )
    processor = Kimi_K25Processor(
        Kimi_K25ImageProcessor(),
        KIMI,
        Kimi_K25VideoProcessor(),
        chat_template=TEMPLATE.format(
            image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
            video="<|kimi_k25_video_placeholder|>",
        ),
    )
    return Kimi_K25ForConditionalGeneration, config, processor


def _minicpm(layers: list[str]) -> tuple[Any, Any, Any]:
    """Sixteen patches are a token."""
    config = MiniCPMV4_6Config(
        vision_config=tower_config(dict, 2 * SIDE),
        text_config=text_settings(MINICPM) | qwen3_5_settings(layers) | {"model_type": "qwen3_5_text"},
        insert_layer_id=1,
        image_token_id=MINICPM.image_token_id,
        video_token_id=MINICPM.video_token_id,
    )
    slices = {"scale_resolution": 2 * SIDE, "patch_size": PATCH, "max_slice_nums": 4}
    processor = MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessor(**slices),
        MiniCPMV4_6VideoProcessor(**slices | {"max_slice_nums": 1}),
        MINICPM,
        chat_template=TEMPLATE.format(image="<|image_pad|>", video="<|video_pad|>"),
    )
    return MiniCPMV4_6ForConditionalGeneration, config, processor


def _mistral3() -> tuple[Any, Any, Any]:
    """Four patches are a token."""
    config = Mistral3Config(
        vision_config=tower_config(PixtralVisionConfig, 3 * SIDE),
        text_config=MistralConfig(**text_settings(MISTRAL)),
        image_token_index=MISTRAL.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 3 * SIDE}, patch_size=2 * PATCH),
        MISTRAL,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=TEMPLATE.format(image="[IMG]", video=""),
    )
    return Mistral3ForConditionalGeneration, config, processor


def _idefics3() -> tuple[Any, Any, Any]:
    """Four patches are a token, and an image is seen in tiles, and whole."""
    config = Idefics3Config(
        vision_config=tower_config(Idefics3VisionConfig),
        text_config=LlamaConfig(**text_settings(LLAVA)),
        image_token_id=LLAVA.convert_tokens_to_ids("<image>"),
        pad_token_id=LLAVA.pad_token_id,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        byte_tokenizer("<image>", "<video>"),
        image_seq_len=(SIDE // PATCH) ** 2 // 4,
        chat_template=TEMPLATE.format(image="<image>", video=""),
    )
    return Idefics3ForConditionalGeneration, config, processor


GENERIC: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "internvl": _internvl,
    "internvl_chat": _internvl,
    "kimi_k25": _kimi_k25,
    "kimi_vl": _kimi_k25,
    "llava_next_video": _llava_next_video,
    "minicpmv4_6": lambda: _minicpm(LINEAR),
    "minicpmv4_6_full": lambda: _minicpm(FULL),
    "mistral3": _mistral3,
    "molmo2": molmo2,
}
# Of these the architecture is not in our table.
UNLISTED: dict[str, Callable[[], tuple[Any, Any, Any]]] = {"idefics3": _idefics3}
