"""The pruning options: one schema for server flags, request fields and cache keys, resolved in one place."""

import reprlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.load import LoadPolicy

# The options' name wherever they travel: request field, attribute of vLLM's multimodal config, cache key.
KEY = "eadaprune"
MODALITIES = ("image", "video")  # what can be pruned, as vLLM calls it
# The functions of these names are ``selectors.SELECTORS``; this module is also for those who have no torch.
SELECTOR_NAMES = ("span", "attention", "diversity", "hybrid", "uniform", "random")


def _known_selector(name: str) -> str:
    if name not in SELECTOR_NAMES:
        raise ValueError(f"Input should be one of {', '.join(SELECTOR_NAMES)}")
    return name


class PruneOptions(BaseModel):
    """How one image is pruned. Strict: ``true`` and ``"0.5"`` are no numbers, NaN is refused, unknown keys too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    energy: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="Share of the spectral energy of an image that its tokens must hold; 1.0 keeps every token. "
        "The default is not verified against the paper: its own threshold is not known to us. For models that read "
        "pages of text it is 1.0.",
    )
    min_tokens: int = Field(default=16, ge=1, description="Fewest tokens an image is cut down to.")
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
        "itself; 'image', the whole image or video. min_tokens and max_tokens are of the whole one either way.",
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

    @property
    def threshold(self) -> float:
        """The energy in force: 1.0 when pruning is switched off."""
        return self.energy if self.enabled else 1.0


@dataclass(frozen=True)
class Layer:
    """One source of options that goes on top of others.

    Attributes:
        where: its name in error messages.
        given: what it says: None, or a mapping of option names to values.
        trusted: whether it is the operator's own: brought within the bounds, never refused.
    """

    where: str
    given: object
    trusted: bool = False


@dataclass(frozen=True)
class Choice:
    """What was chosen for one image or video.

    Attributes:
        options: resolved.
        energy_floor: how far load may lower its threshold; None if it may not.
        answered: whether it is of an earlier turn of the conversation.
    """

    options: PruneOptions
    energy_floor: float | None = None
    answered: bool = False

    def at(self, level: float) -> PruneOptions:
        """The options in force where the threshold has gone this share of its way to the floor."""
        threshold, floor = self.options.threshold, self.energy_floor
        if not level or floor is None or threshold <= floor:
            return self.options
        energy = round(threshold - level * (threshold - floor), 6)
        return self.options.model_copy(update={"enabled": True, "energy": energy})


class ServerOptions(PruneOptions):
    """What the operator sets: the defaults of every option, presets, and bounds of what requests may ask for."""

    detail_low: dict[str, Any] = Field(
        default={"energy": 0.9, "max_tokens": 64},
        description="Options of images that a request sends with OpenAI's detail 'low'.",
    )
    detail_high: dict[str, Any] = Field(
        default={"energy": 1.0},
        description="Options of images that a request sends with OpenAI's detail 'high' or 'original'.",
    )
    energy_floor: float | None = Field(default=None, gt=0, le=1, description="Least energy a request may ask for.")
    energy_ceiling: float | None = Field(default=None, gt=0, le=1, description="Most energy a request may ask for.")
    max_tokens_ceiling: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens a request may let an image keep, at any energy and whatever its min_tokens.",
    )
    out_of_bounds: Literal["reject", "clamp"] = Field(
        default="reject", description="What becomes of a request beyond these bounds."
    )
    report: bool = Field(default=True, description="Whether responses say what pruning saved.")
    report_cached: bool = Field(
        default=False,
        description="Whether they also say which images and videos were cached and how long the others took, by which "
        "a client can find out what others sent.",
    )
    any_model: bool = Field(
        default=False,
        description="Whether to try models that are not in the list of supported ones, on the grounds that one image "
        "fits when the server starts.",
    )
    load_aware: LoadPolicy | None = Field(
        default=None,
        description="Lower thresholds while the engine is under load. "
        f"By default {LoadPolicy().model_dump_json()}, or what is given in its place;",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ServerOptions":
        if self.energy_floor and self.energy_ceiling and self.energy_floor > self.energy_ceiling:
            raise ValueError(f"energy_floor={self.energy_floor} is above energy_ceiling={self.energy_ceiling}")
        for layer in (Layer("the default", None), *map(self.preset, ("low", "high"))):
            self.resolve(layer)
        policy, energy = self.load_aware, self.resolve().threshold
        if policy and policy.explicit == "keep" and energy <= policy.energy_floor:
            raise ValueError(f"load_aware.energy_floor={policy.energy_floor:g} is not below energy={energy:g}")
        return self

    @property
    def defaults(self) -> PruneOptions:
        """The options of an image about which a request says nothing."""
        return PruneOptions(**{name: getattr(self, name) for name in PruneOptions.model_fields})

    def preset(self, detail: object, where: str = "detail") -> Layer:
        """The layer that OpenAI's ``detail`` of an image stands for.

        Raises:
            InvalidOptionsError: if there is no such detail.
        """
        presets = {"auto": None, "low": self.detail_low, "high": self.detail_high, "original": self.detail_high}
        if not isinstance(detail, str) or detail not in presets:
            raise InvalidOptionsError(
                f"{where}={reprlib.repr(detail)} is not allowed; it must be one of {', '.join(presets)}", where
            )
        return Layer(f"{KEY}.detail_{detail}", presets[detail], trusted=True)

    def resolve(self, *layers: Layer) -> PruneOptions:
        """The one place where options are resolved: the defaults, with each layer on top of those before it.

        Raises:
            InvalidOptionsError: naming field, value and allowed range, or the bounds that a layer leaves.
        """
        options = self._bounded(self.defaults, Layer(KEY, None))
        for layer in layers:
            options = self._bounded(overlay(options, layer.given, layer.where), layer)
        # As many as an image has is as many as it may.
        return options.model_copy(update={"max_tokens": options.max_tokens or self.max_tokens_ceiling})

    def choose(self, *layers: Layer, answered: bool = False) -> Choice:
        """``resolve``, and how far load may lower the threshold that comes of it."""
        options, policy = self.resolve(*layers), self.load_aware
        explicit = any(isinstance(of.given, dict) and of.given.keys() & {"energy", "enabled"} for of in layers)
        lowers = policy and (policy.explicit == "lower" or not explicit)
        return Choice(options, policy.energy_floor if policy and lowers else None, answered)

    def _bounded(self, options: PruneOptions, layer: Layer) -> PruneOptions:
        energy = min(max(options.threshold, self.energy_floor or 0), self.energy_ceiling or 1)
        most = self.max_tokens_ceiling
        within: dict[str, Any] = {}
        if energy != options.threshold or (most and not options.enabled):
            within |= {"enabled": True, "energy": energy}
        if most:
            within |= {
                "min_tokens": min(options.min_tokens, most),
                "max_tokens": options.max_tokens and min(options.max_tokens, most),
            }
        outside = [name for name, value in within.items() if getattr(options, name) != value]
        if outside and self.out_of_bounds == "reject" and not layer.trusted:
            field = f"{layer.where}.{outside[0]}"
            limits = ("energy_floor", "energy_ceiling", "max_tokens_ceiling")
            bounds = ", ".join(f"{name}={getattr(self, name):g}" for name in limits if getattr(self, name))
            raise InvalidOptionsError(
                f"{field}={getattr(options, outside[0])!r} is outside the bounds of this server: {bounds}", field
            )
        return options.model_copy(update=within)


Options = TypeVar("Options", bound=PruneOptions)


def overlay(options: Options, override: object, where: str) -> Options:
    """``options`` with what ``override`` says in their place.

    A ``max_tokens`` that comes alone lowers ``min_tokens`` with it: who asks for at most 8 need not know of the 16.

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
    values = options.model_dump() | override
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
