"""The pruning options: one schema for server flags, request fields and cache keys, resolved in one place."""

import reprlib
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.selectors import SELECTORS

# The options' name wherever they travel: request field, attribute of vLLM's multimodal config, cache key.
KEY = "eadaprune"


def _known_selector(name: str) -> str:
    if name not in SELECTORS:
        raise ValueError(f"Input should be one of {', '.join(SELECTORS)}")
    return name


class PruneOptions(BaseModel):
    """How one image is pruned. Strict: ``true`` and ``"0.5"`` are no numbers, NaN is refused, unknown keys too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    energy: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="Share of the spectral energy of an image that its tokens must hold; 1.0 keeps every token. "
        "The default is not verified against the paper: its own threshold is not known to us.",
    )
    min_tokens: int = Field(default=16, ge=1, description="Fewest tokens an image is cut down to.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens an image may keep; by default as many as it has."
    )
    selector: Annotated[str, AfterValidator(_known_selector)] = Field(
        default="attention",
        description="Which tokens stay: 'attention', those the vision tower attends to most; 'span', those that "
        "span most of the energy.",
        json_schema_extra={"enum": list(SELECTORS)},
    )
    enabled: bool = Field(default=True, description="False keeps every token, as energy 1.0 does.")

    @model_validator(mode="after")
    def _min_not_above_max(self) -> "PruneOptions":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self

    @property
    def key(self) -> str:
        """Canonical JSON: equal options give equal strings. Part of every image's cache key."""
        return self.model_dump_json()


def resolve(defaults: PruneOptions, override: object, where: str = KEY) -> PruneOptions:
    """The options of a request: the server's ``defaults``, with the client's ``override`` on top.

    Args:
        defaults: options that hold where the override is silent.
        override: what the client sent: None, or a mapping of option names to values.
        where: name of the override in error messages.

    Raises:
        InvalidOptionsError: naming field, value and allowed range.
    """
    if override is None:
        return defaults
    if not isinstance(override, dict):
        raise InvalidOptionsError(f"{where}={reprlib.repr(override)} is not an object of pruning options", where)
    try:
        return PruneOptions.model_validate(defaults.model_dump() | override)
    except ValidationError as error:
        raise _explain(error, where) from None


def _explain(error: ValidationError, where: str) -> InvalidOptionsError:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # the cross-field check
        return InvalidOptionsError(f"{where}: {first['msg'].removeprefix('Value error, ')}", where)
    name = str(first["loc"][0])
    field = f"{where}.{name}"
    if name not in PruneOptions.model_fields:
        known = ", ".join(PruneOptions.model_fields)
        return InvalidOptionsError(f"{field} is not an option; the options are {known}", field)
    return InvalidOptionsError(
        f"{field}={reprlib.repr(first['input'])} is not allowed; it must be {allowed(name)}", field
    )


def allowed(name: str) -> str:
    """The values an option takes, in words: 'a number greater than 0 and at most 1'."""
    schema: dict[str, Any] = PruneOptions.model_json_schema()["properties"][name]
    nullable = any(branch.get("type") == "null" for branch in schema.get("anyOf", []))
    schema = schema.get("anyOf", [schema])[0] | {k: v for k, v in schema.items() if k == "enum"}
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    words = {"number": "a number", "integer": "an integer", "boolean": "true or false"}[schema["type"]]
    limits = {"exclusiveMinimum": "greater than", "minimum": "at least", "maximum": "at most"}
    bounds = [f"{text} {schema[key]:g}" for key, text in limits.items() if key in schema]
    return " ".join([words, " and ".join(bounds)]).strip() + (" or null" if nullable else "")
