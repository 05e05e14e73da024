"""The pruning options: one schema for server flags, request fields and cache keys."""

import math
import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.errors import InvalidOptionsError

# The options' name wherever they travel: request field, attribute of vLLM's multimodal config, cache key.
KEY = "eadaprune"
MODALITIES = ("image", "video")  # what can be pruned, as vLLM calls it
CHUNK = "vision_chunk"  # what vLLM calls both in models that take them as one
# The functions of these names are ``selectors.SELECTORS``; this module is also for those who have no torch.
SELECTOR_NAMES = ("span", "attention", "diversity", "hybrid", "uniform", "random")
Bound = Literal["min_tokens", "min_share", "max_tokens"]  # what may decide on a budget in the threshold's place
Budget = Literal["spectrum", "span"]  # what must hold the share of energy
UNBOUNDED: dict[str, Any] = {"min_tokens": 1, "min_share": 0.0, "max_tokens": None}


def _known_selector(name: str) -> str:
    if name not in SELECTOR_NAMES:
        raise ValueError(f"Input should be one of {', '.join(SELECTOR_NAMES)}")
    return name


class PruneOptions(BaseModel):
    """How one image is pruned. Strict: ``true`` and ``"0.5"`` are no numbers, NaN is refused, unknown keys too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    target: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of their tokens that images of many kinds keep on average. It stands for the energy at "
        "which the model's reference pictures do, with the server's own min_tokens, min_share, max_tokens and scope.",
    )
    energy: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the spectral energy of an image that as many singular values must hold as tokens stay; "
        "1.0 keeps every token. It takes the place of a target.",
    )
    min_tokens: int = Field(
        default=16, ge=1, description="Fewest tokens an image is cut down to. Given alone, it switches min_share off."
    )
    min_share: float = Field(
        default=0.0, ge=0, le=1, description="Least share of its tokens that an image is cut down to."
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens an image may keep; by default as many as it has."
    )
    selector: Annotated[str, AfterValidator(_known_selector)] = Field(
        default="span",
        description="Which tokens stay: 'span', those that span most of the energy; 'attention', those the vision "
        "tower attends to most; 'diversity', those least like each other; 'hybrid', half by attention and half by "
        "diversity. 'uniform' and 'random' do not look at the image, for comparison.",
        json_schema_extra={"enum": list(SELECTOR_NAMES)},
    )
    scope: Literal["tile", "image"] = Field(
        default="tile",
        description="What reaches the threshold: 'tile', each tile of an image and each temporal patch of a video by "
        "itself; 'image', the whole image or video. Of more than 1024 tokens (for 'image' 4096) each window of at most "
        "so many does. min_tokens and max_tokens are of the whole image or video either way.",
    )
    enabled: bool = Field(default=True, description="False keeps every token, as energy 1.0 does.")

    @model_validator(mode="after")
    def _min_not_above_max(self) -> "PruneOptions":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self

    @property
    def key(self) -> str:
        """Canonical JSON, part of every image's cache key: equal options give equal strings, wherever their energy
        comes from. (Others may come to the same tokens; the engine's caches then know them as the same.)"""
        return self.model_dump_json(exclude={"target"})

    @property
    def threshold(self) -> float:
        """The energy in force: 1.0 when pruning is switched off."""
        return self.energy if self.enabled else 1.0

    def floor(self, num_tokens: int) -> int:
        """Fewest tokens that an image of so many is cut down to."""
        return max(self.min_tokens, math.ceil(self.min_share * num_tokens))


Options = TypeVar("Options", bound=PruneOptions)


def overlay(options: Options, override: object, where: str) -> Options:
    """``options`` with what ``override`` says in their place.

    A ``max_tokens`` that comes alone lowers ``min_tokens`` with it: who asks for at most 8 need not know of the 16.
    A ``min_tokens`` that comes alone is the only floor. A ``target`` stands for an energy that is not known here.

    Args:
        options: what holds where the override is silent.
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
    if loc[:1] == ("load_aware",) and (loc[1:] or first["type"] == "value_error"):  # it has options of its own
        model, where, loc = LoadPolicy, f"{where}.load_aware", loc[1:]
    if not loc:  # a check across fields
        return InvalidOptionsError(f"{where}: {first['msg'].removeprefix('Value error, ')}", where)
    name = str(loc[0])
    if name not in model.model_fields:
        known = ", ".join(model.model_fields)
        # A client's own text, which may be long and of several lines.
        field = f"{where}.{reprlib.repr(name)[1:-1]}"
        return InvalidOptionsError(f"{field} is not an option; the options are {known}", field)
    field = f"{where}.{name}"
    return InvalidOptionsError(
        f"{field}={reprlib.repr(first['input'])} is not allowed; it must be {allowed(name, model)}", field
    )


def allowed(name: str, model: type[BaseModel] = PruneOptions) -> str:
    """The values an option takes, in words: 'a number greater than 0 and at most 1'."""
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
    """JSON schema of the field ``eadaprune`` of a request: every option may be left to the server."""
    schema = PruneOptions.model_json_schema()
    for option in schema["properties"].values():
        option.pop("default", None)
    return schema | {"description": "How to prune the images; what is left out is the server's default."}
