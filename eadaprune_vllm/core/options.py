"""The pruning options: one schema for server flags, request fields and cache keys."""

import math
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.errors import InvalidOptionsError

# The name of the options everywhere: request field, attribute of vLLM's multimodal config, cache key.
KEY = "eadaprune"
MODALITIES = ("image", "video")  # vLLM's modalities that can be pruned
CHUNK = "vision_chunk"  # vLLM's modality for both in some models
# The names of ``selectors.SELECTORS``, repeated because this module does not import torch.
SELECTOR_NAMES = ("span", "attention", "diversity", "hybrid", "uniform", "random")
Bound = Literal["min_tokens", "min_share", "max_tokens"]  # options that may replace the threshold's budget
Budget = Literal["spectrum", "span"]  # how the energy of k tokens is computed
UNBOUNDED: dict[str, Any] = {"min_tokens": 1, "min_share": 0.0, "max_tokens": None}


def _known_selector(name: str) -> str:
    if name not in SELECTOR_NAMES:
        raise ValueError(f"Input should be one of {', '.join(SELECTOR_NAMES)}")
    return name


class PruneOptions(BaseModel):
    """How one image is pruned. Strict: ``true`` and ``"0.5"`` are not numbers; NaN and unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    target: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of their tokens that images keep on average. The server translates it into the energy at "
        "which the model's reference pictures keep that share, under its own min_tokens, min_share, max_tokens and "
        "scope.",
    )
    energy: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Threshold: an image keeps the smallest number of tokens k whose top-k squared singular values "
        "hold this share of its spectral energy. 1.0 keeps every token. It replaces a target.",
    )
    min_tokens: int = Field(
        default=16, ge=1, description="Minimum number of tokens of an image. Given alone, it switches min_share off."
    )
    min_share: float = Field(default=0.0, ge=0, le=1, description="Minimum share of its tokens that an image keeps.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Maximum number of tokens of an image; by default as many as it has."
    )
    selector: Annotated[str, AfterValidator(_known_selector)] = Field(
        default="span",
        description="Which tokens are kept: 'span', those that span most of the energy; 'attention', those the vision "
        "tower attends to most; 'diversity', those least similar to each other; 'hybrid', half by attention and half "
        "by diversity. 'uniform' and 'random' ignore the image; they are for comparison.",
        json_schema_extra={"enum": list(SELECTOR_NAMES)},
    )
    scope: Literal["tile", "image"] = Field(
        default="tile",
        description="What has to reach the threshold: 'tile', each tile of an image and each temporal patch of a video "
        "by itself; 'image', the image or video as a whole. More than 1024 tokens (for 'image' 4096) are split into "
        "windows, each of which has to reach it. min_tokens and max_tokens always count the whole image or video.",
    )
    enabled: bool = Field(default=True, description="false keeps every token, as energy 1.0 does.")

    @model_validator(mode="after")
    def _min_not_above_max(self) -> "PruneOptions":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self

    @property
    def key(self) -> str:
        """Canonical JSON, part of the cache key of an image. Equal options have equal keys, whether their energy comes
        from a target or not. (Different options may keep the same tokens; the engine's caches then share the item.)"""
        return self.model_dump_json(exclude={"target"})

    @property
    def threshold(self) -> float:
        """The effective threshold: 1.0 if pruning is switched off."""
        return self.energy if self.enabled else 1.0

    def floor(self, num_tokens: int) -> int:
        """The minimum budget of an image of ``num_tokens`` tokens."""
        return max(self.min_tokens, math.ceil(self.min_share * num_tokens))


Options = TypeVar("Options", bound=PruneOptions)


def overlay(options: Options, override: object, where: str) -> Options:
    """``options``, overridden.

    A ``max_tokens`` given alone also lowers ``min_tokens``: a client that sets at most 8 need not know the default
    minimum of 16. A ``min_tokens`` given alone switches ``min_share`` off. The energy of a ``target`` is not resolved
    here.

    Args:
        options: to be overridden.
        override: None, or a mapping of option names to values.
        where: name of the override in error messages.

    Raises:
        InvalidOptionsError: naming field, value and allowed range.
    """
    if override is None:
        return options
    if not isinstance(override, dict):
        raise InvalidOptionsError(f"{where}={reprlib.repr(override)} is not an object of pruning options", where)
    if override.get("target") is not None and "energy" in override:
        raise InvalidOptionsError(f"{where}: energy and target exclude each other", where)
    values = options.model_dump() | override
    if "energy" in override:
        values["target"] = None
    if "min_tokens" in override and "min_share" not in override:
        values["min_share"] = 0.0
    if "max_tokens" in override and "min_tokens" not in override and isinstance(values["max_tokens"], int):
        values["min_tokens"] = max(1, min(values["min_tokens"], values["max_tokens"]))
    try:
        return type(options).model_validate(values)
    except ValidationError as error:
        raise _explain(error, type(options), where) from None


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> InvalidOptionsError:
    first = error.errors(include_url=False)[0]
    loc: tuple[Any, ...] = first["loc"]
    if loc[:1] == ("load_aware",) and (loc[1:] or first["type"] == "value_error"):  # a nested model
        model, where, loc = LoadPolicy, f"{where}.load_aware", loc[1:]
    if not loc:  # a validator of several fields
        return InvalidOptionsError(f"{where}: {first['msg'].removeprefix('Value error, ')}", where)
    name = str(loc[0])
    if name not in model.model_fields:
        known = ", ".join(model.model_fields)
        # A client's text, which may be long and have several lines.
        field = f"{where}.{reprlib.repr(name)[1:-1]}"
        return InvalidOptionsError(f"{field} is not an option; the options are {known}", field)
    field = f"{where}.{name}"
    return InvalidOptionsError(
        f"{field}={reprlib.repr(first['input'])} is not allowed; it must be {allowed(name, model)}", field
    )


def allowed(name: str, model: type[BaseModel] = PruneOptions) -> str:
    """The allowed values of an option, in words: 'a number greater than 0 and at most 1'."""
    schema: dict[str, Any] = model.model_json_schema()["properties"][name]
    nullable = any(branch.get("type") == "null" for branch in schema.get("anyOf", []))
    schema = schema.get("anyOf", [schema])[0] | {k: v for k, v in schema.items() if k == "enum"}
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    words = {
        None: "an object of options",
        "number": "a number",
        "integer": "an integer",
        "boolean": "true or false",
        "object": "an object of options",
    }
    limits = {"exclusiveMinimum": "greater than", "minimum": "at least", "maximum": "at most"}
    bounds = [f"{text} {schema[key]:g}" for key, text in limits.items() if key in schema]
    return " ".join([words[schema.get("type")], " and ".join(bounds)]).strip() + (" or null" if nullable else "")


def request_schema() -> dict[str, Any]:
    """JSON schema of the field ``eadaprune`` of a request: every option is optional."""
    schema = PruneOptions.model_json_schema()
    for option in schema["properties"].values():
        option.pop("default", None)
    return schema | {"description": "How to prune the images. Options that are left out have the server's defaults."}
