"""The operator's options, and the one place where the options of an image are resolved from all sources."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from eadaprune_vllm.core.budget import Curve, Targets
from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.core.options import KEY, Budget, PruneOptions, overlay
from eadaprune_vllm.errors import InvalidOptionsError


@dataclass(frozen=True)
class OptionSource:
    """A source of options that overrides others.

    Attributes:
        where: its name in error messages.
        given: None, or a mapping of option names to values.
        trusted: whether it is the operator's: clamped to the bounds, never rejected.
    """

    where: str
    given: object
    trusted: bool = False

    def sets(self, *names: str) -> bool:
        """Whether it sets any of these options."""
        return isinstance(self.given, dict) and any(self.given.get(name) is not None for name in names)


@dataclass(frozen=True)
class Choice:
    """The options of one image or video.

    Attributes:
        options: resolved, before load lowers the threshold.
        energy_floor: the threshold at full load; None if load does not lower it.
        from_previous_turn: whether the image is from an earlier turn of the conversation.
    """

    options: PruneOptions
    energy_floor: float | None = None
    from_previous_turn: bool = False

    def at(self, level: float) -> PruneOptions:
        """The options with the threshold lowered by this share of its distance to the floor."""
        threshold, floor = self.options.threshold, self.energy_floor
        if not level or floor is None or threshold <= floor:
            return self.options
        energy = round(threshold - level * (threshold - floor), 6)
        return self.options.model_copy(update={"enabled": True, "energy": energy, "target": None})


class ServerOptions(PruneOptions):
    """The operator's options: defaults of all options, presets, and bounds for requests."""

    target: float | None = Field(default=0.33, gt=0, le=1, description=PruneOptions.model_fields["target"].description)
    min_share: float = Field(
        default=round(1 / 9, 6), ge=0, le=1, description=PruneOptions.model_fields["min_share"].description
    )
    budget: Budget = Field(
        default="spectrum",
        description="How the energy of k tokens is computed: 'spectrum', from the k largest singular values of the "
        "features, as in the paper; 'span', from the span of the first k tokens that the selector of this name "
        "chooses. 'span' is faster, and keeps more tokens at the same energy.",
    )
    detail_low: dict[str, Any] = Field(
        default={"target": 0.2, "max_tokens": 256},
        description="Options of images with OpenAI's detail 'low'.",
    )
    detail_high: dict[str, Any] = Field(
        default={"energy": 1.0},
        description="Options of images with OpenAI's detail 'high' or 'original'.",
    )
    energy_floor: float | None = Field(default=None, gt=0, le=1, description="Smallest energy a request may set.")
    energy_ceiling: float | None = Field(default=None, gt=0, le=1, description="Largest energy a request may set.")
    max_tokens_ceiling: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens of an image, whatever energy and min_tokens a request sets.",
    )
    out_of_bounds: Literal["reject", "clamp"] = Field(
        default="reject", description="Whether requests beyond these bounds are rejected, or clamped to them."
    )
    report: bool = Field(default=True, description="Whether responses report what pruning saved.")
    report_cached: bool = Field(
        default=False,
        description="Whether reports include which images and videos were cached, and how long the others took. A "
        "client can then find out what other clients sent.",
    )
    page: bool = Field(default=True, description="Whether to serve the page /eadaprune, which shows what is kept.")
    any_model: bool = Field(
        default=False,
        description="Whether to serve models that are not in the list of supported ones, if the reference pictures "
        "can be pruned when the server starts.",
    )
    trust_kv_connector: bool = Field(
        default=False,
        description="Whether to serve with a KV connector (--kv-transfer-config) that the plugin does not know. It has "
        "to find blocks by vLLM's block hashes or by the identifiers of images; otherwise answers are wrong.",
    )
    load_aware: LoadPolicy | None = Field(
        default=None,
        description="Lower thresholds while the engine is under load. Without a value: "
        f"{LoadPolicy().model_dump_json()}.",
    )

    _targets: Targets | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _energy_before_target(cls, values: Any) -> Any:
        return {"target": None} | values if "energy" in values else values

    @model_validator(mode="after")
    def _consistent(self) -> "ServerOptions":
        if self.energy_floor and self.energy_ceiling and self.energy_floor > self.energy_ceiling:
            raise ValueError(f"energy_floor={self.energy_floor} is above energy_ceiling={self.energy_ceiling}")
        for source in (OptionSource("the default", None), *map(self.preset, ("low", "high"))):
            self.resolve(source)
        self._check_load()
        return self

    @staticmethod
    def of(multimodal_config: Any) -> "ServerOptions":
        """The options in vLLM's multimodal configuration."""
        options: ServerOptions = getattr(multimodal_config, KEY)
        return options

    def with_curves(self, curves: Sequence[Curve]) -> Self:
        """A copy that can translate targets into energies.

        Args:
            curves: of the model's reference pictures.

        Raises:
            ValueError: if load would not lower the default threshold.
        """
        copy = self.model_copy()
        copy._targets = Targets(curves, self.resolve())
        copy._check_load()
        return copy

    @property
    def targets(self) -> Targets | None:
        """The energies of targets; None before ``with_curves``."""
        return self._targets

    @property
    def defaults(self) -> PruneOptions:
        """The options of an image without options in its request."""
        options = PruneOptions(**{name: getattr(self, name) for name in PruneOptions.model_fields})
        return self._solved(options, OptionSource(KEY, None, trusted=True))

    def preset(self, detail: object, where: str = "detail") -> OptionSource:
        """The options of OpenAI's ``detail`` of an image.

        Raises:
            InvalidOptionsError: if OpenAI has no such detail.
        """
        presets = {"auto": None, "low": self.detail_low, "high": self.detail_high, "original": self.detail_high}
        if not isinstance(detail, str) or detail not in presets:
            raise InvalidOptionsError(
                f"{where}={reprlib.repr(detail)} is not allowed; it must be one of {', '.join(presets)}", where
            )
        return OptionSource(f"detail_{detail}", presets[detail], trusted=True)

    def resolve(self, *sources: OptionSource) -> PruneOptions:
        """The one place where options are resolved: the defaults, overridden by each source in turn.

        Raises:
            InvalidOptionsError: naming field, value and allowed range, or the bounds that a source exceeds.
        """
        # The energy of the default target is clamped to the bounds.
        options = self._bounded(
            self.defaults, OptionSource(KEY, None, trusted=self.target is not None and self.enabled)
        )
        for source in sources:
            options = overlay(options, source.given, source.where)
            if source.sets("target"):
                options = self._solved(options, source)
            options = self._bounded(options, source)
        # Without a maximum of its own, an image has the server's.
        return options.model_copy(update={"max_tokens": options.max_tokens or self.max_tokens_ceiling})

    def _solved(self, options: PruneOptions, source: OptionSource) -> PruneOptions:
        """The options with the energy of their target."""
        targets, target = self._targets, options.target
        if targets is None or target is None:
            return options
        if source.trusted:
            target = min(max(target, targets.min_target), targets.max_default_target)
        elif not targets.min_target <= target <= targets.max_target:
            field = f"{source.where}.target"
            raise InvalidOptionsError(
                f"{field}={target} is not allowed; with this model it must be at least {targets.min_target:.3f} and at "
                f"most {targets.max_target:.3f}",
                field,
            )
        return options.model_copy(update={"target": target, "energy": targets.energy(target)})

    def choose(self, *sources: OptionSource, from_previous_turn: bool = False) -> Choice:
        """``resolve``, together with the threshold at full load."""
        options, policy = self.resolve(*sources), self.load_aware
        explicit = any(source.sets("energy", "target", "enabled") for source in sources)
        lowers = policy and (policy.explicit == "lower" or not explicit)
        return Choice(options, self._load_floor() if lowers else None, from_previous_turn)

    def _load_floor(self) -> float | None:
        """The threshold at full load; None before ``with_curves``."""
        assert self.load_aware
        if self.load_aware.energy_floor is not None:
            return self.load_aware.energy_floor
        return self._targets.energy(self.load_aware.target) if self._targets else None

    def _check_load(self) -> None:
        policy = self.load_aware
        if not policy or policy.explicit == "lower" or (self.target is not None and not self._targets):
            return
        energy, floor = self.resolve().threshold, self._load_floor()
        if floor is not None and energy <= floor:
            name = "target" if policy.energy_floor is None else "energy_floor"
            raise ValueError(
                f"load_aware.{name}={getattr(policy, name):g} is not below the default, which is energy={energy:g}"
            )

    def _bounded(self, options: PruneOptions, source: OptionSource) -> PruneOptions:
        energy = min(max(options.threshold, self.energy_floor or 0), self.energy_ceiling or 1)
        ceiling = self.max_tokens_ceiling
        within: dict[str, Any] = {}
        if energy != options.threshold or (ceiling and not options.enabled):
            within |= {"enabled": True, "energy": energy}
        if ceiling:
            within |= {
                "min_tokens": min(options.min_tokens, ceiling),
                "max_tokens": options.max_tokens and min(options.max_tokens, ceiling),
            }
        outside = [name for name, value in within.items() if getattr(options, name) != value]
        if outside and self.out_of_bounds == "reject" and not source.trusted:
            name = "target" if outside[0] == "energy" and source.sets("target") else outside[0]
            field, value = f"{source.where}.{name}", repr(getattr(options, name))
            if name == "target":
                value += f" (energy {options.energy:g})"
            limits = ("energy_floor", "energy_ceiling", "max_tokens_ceiling")
            bounds = ", ".join(f"{name}={getattr(self, name):g}" for name in limits if getattr(self, name))
            raise InvalidOptionsError(f"{field}={value} is outside the bounds of this server: {bounds}", field)
        if "energy" in outside:
            within["target"] = None
        return options.model_copy(update=within)
