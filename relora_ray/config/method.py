"""How weights are trained, as far as a config says it: the base of every method's section, and where a kind is found.

A method's own section stands beside the method and imports no torch. The kinds below come with the package; others are
found by entry points of the group `relora_ray.methods`, whose name is the kind and whose object is the section.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from relora_ray.config.planned import Planned, all_values
from relora_ray.config.section import Section, nearest, rule
from relora_ray.config.sizes import LLAMA_LINEARS

if TYPE_CHECKING:
    from relora_ray.config.run import RunConfig

GROUP = "relora_ray.methods"
BUILT_IN = {
    "full": "relora_ray.methods.full_config:FullConfig",
    "lora": "relora_ray.methods.lowrank.config:LoraConfig",
    "relora": "relora_ray.methods.lowrank.config:ReloraConfig",
    "galore": "relora_ray.methods.projected.config:GaloreConfig",
    "sltrain": "relora_ray.methods.sparse.config:SltrainConfig",
}


class MethodConfig(Section):
    """The section `method` of one kind. A subclass gives `kind` as a Literal with itself as default."""

    kind: str
    implementation: ClassVar[str]
    """Where its `relora_ray.methods.base.Method` is, as `package.module:Class`; imported when a model is built."""
    exports: ClassVar[bool] = True
    """Whether what it trains has dense weights. If not, a run ends without an export, and says so before it begins."""
    free_at_boundaries: ClassVar[frozenset[str]] = frozenset()
    """Its settings in which a fork, which begins at a boundary, may differ from its parent."""
    tiny: ClassVar[Mapping[str, Any]] = {}
    """Settings at which it fits a model of width 32: for the tests of every method, and for trying an architecture."""

    def boundaries(self, steps: int) -> tuple[int, ...]:
        """Finished updates after which weights change that are not trained, of a run of so many updates; ascending."""
        return ()

    def cycles(self, steps: int) -> tuple[int, ...]:
        """Finished updates at the end of each of its cycles, the last at `steps`; none without cycles. The learning
        rate restarts there, in a schedule that does so and says no period of its own."""
        return ()

    def problems(self, cfg: RunConfig) -> list[str]:
        """What is wrong with it in this run. Each line names the key, the value, the rule and the fix."""
        return []

    @property
    def zeroes_moments(self) -> bool:
        """Whether boundaries set to zero all that the optimizer keeps of what the method draws anew there."""
        return True

    @property
    def begins_anew_after_warm_start(self) -> bool:
        """Whether the learning rate after the warm start is that of a run of its own."""
        return False


class WarmStart(MethodConfig):
    """Of methods that begin with full-rank training."""

    warm_start_steps: int = Field(0, ge=0)
    """Full-rank updates before the adapters are put in, inside the same run."""
    warm_start_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate during the warm start, relative to the schedule's. The reference warms up at 5e-4 and
    trains ReLoRA at 1e-3: 0.5."""

    def boundaries(self, steps: int) -> tuple[int, ...]:
        """Its end, and the cycles'."""
        warm = (self.warm_start_steps,) if self.warm_start_steps else ()
        return (*warm, *self.cycles(steps))

    def problems(self, cfg: RunConfig) -> list[str]:
        found = super().problems(cfg)
        if self.warm_start_steps >= cfg.steps:
            found.append(
                f"method.warm_start_steps={self.warm_start_steps} is not less than steps={cfg.steps}: nothing would be "
                f"left for {self.kind}. Raise steps or shorten the warm start."
            )
        if not self.warm_start_steps and self.warm_start_lr_ratio != 1:
            found.append(
                f"method.warm_start_lr_ratio={self.warm_start_lr_ratio} has no effect with method.warm_start_steps=0. "
                f"Remove one of the two."
            )
        return found


class OnBlocks(MethodConfig):
    """Of methods for the matrices of the transformer blocks; all else is trained in full."""

    rank_key: ClassVar[str] = "rank"
    """What its rank is called."""

    @property
    def ranks(self) -> Planned:
        found: Planned = getattr(self, self.rank_key)
        return found

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers and stacks of experts in the transformer blocks the method is for: all of them, or these last
    path segments. A name that matches nothing is an error. With all-linear, what is too narrow for the rank is left
    out, and a line says so."""
    leave_out: tuple[str, ...] = ()
    """Last path segments of layers that get none and stay trained in full, such as a layer whose weight the model reads
    without calling it."""

    @field_validator("leave_out", mode="before")
    @classmethod
    def _check_leave_out(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise rule("must be a list of names, such as [dt_proj].")
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            raise rule("must be all-linear or a list of names, such as [q_proj, v_proj].")
        if not value or len(set(value)) < len(value):
            raise rule("must name at least one layer, and each once.")
        return value

    def problems(self, cfg: RunConfig) -> list[str]:
        found, llama = super().problems(cfg), cfg.model.llama
        if llama is None:
            return found
        names = LLAMA_LINEARS if self.target_modules == "all-linear" else self.target_modules
        for name in names:
            if name not in LLAMA_LINEARS:
                found.append(
                    f"method.target_modules has {name!r}, which matches no linear layer of a LLaMA block "
                    f"({', '.join(LLAMA_LINEARS)}).{nearest(name, list(LLAMA_LINEARS))}"
                )
        smaller_side = llama.hidden_size
        if set(names) - {"q_proj", "k_proj", "v_proj", "o_proj"}:
            smaller_side = min(llama.hidden_size, llama.intermediate_size)
        if max(all_values(self.ranks)) > smaller_side:
            found.append(
                f"method.{self.rank_key}={self.ranks} is more than {smaller_side}, the smaller side of the smallest "
                f"wrapped layer. Use a rank of at most {smaller_side}; well below it for any saving."
            )
        return found


def kinds() -> list[str]:
    """All that are installed."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)} - BUILT_IN.keys())]


def config_class(kind: str) -> type[MethodConfig]:
    """The section of a kind. A ValueError that says what is wrong if there is none, or none that can be used."""
    if kind in BUILT_IN:
        built_in: type[MethodConfig] = resolve_name(BUILT_IN[kind])
        return built_in
    points = [point for point in entry_points(group=GROUP) if point.name == kind]
    if not points:
        raise ValueError(f"is not a method. Use one of {', '.join(kinds())}.{nearest(kind, kinds())}")
    if len({point.value for point in points}) > 1:
        raise ValueError(
            f"is in several packages: {', '.join(sorted(p.value for p in points))}. Uninstall all but one."
        )
    try:
        found = points[0].load()
    except Exception as error:  # of somebody else's package
        raise ValueError(f"is in {points[0].value}, which cannot be imported: {error!r}") from error
    if not (isinstance(found, type) and issubclass(found, MethodConfig) and _is_whole(found, kind)):
        raise ValueError(
            f"is in {points[0].value}, which is no section of a method: a class on "
            f"relora_ray.config.method.MethodConfig that gives itself kind (the entry point's name), implementation "
            f"(module:Class) and tiny. See docs/add-a-method.md."
        )
    return found


def _is_whole(section: type[MethodConfig], kind: str) -> bool:
    """Whether it has what each kind says for itself."""
    own = section.__dict__
    is_named = isinstance(own.get("implementation"), str) and own["implementation"].count(":") == 1
    return is_named and isinstance(own.get("tiny"), Mapping) and section.model_fields["kind"].default == kind


def problems_of(method: MethodConfig, cfg: RunConfig) -> list[str]:
    """What it says is wrong; that it could not be asked, if its package fails."""
    try:
        return method.problems(cfg)
    except Exception as error:  # of somebody else's package, which is named with what it raised
        if method.kind in BUILT_IN:
            raise
        return [f"method.kind={method.kind!r}: {type(method).__module__} could not check the config: {error!r}"]


def read_method(raw: Any) -> MethodConfig:
    """A section of its kind from what a file says. ValidationError; PydanticCustomError if there is no such kind."""
    if isinstance(raw, MethodConfig):
        return raw
    if not isinstance(raw, dict):
        raise _complete(f"method={raw!r} is no section. Write it as method: {{kind: {raw}}}.")
    kind = raw.get("kind")
    if kind is None:
        raise _complete(f"method.kind is missing: it says how weights are trained. Use one of {', '.join(kinds())}.")
    if not isinstance(kind, str):
        raise _complete(f"method.kind={kind!r} is not a method. Use one of {', '.join(kinds())}.")
    try:
        found = config_class(kind)
    except ValueError as error:
        raise _complete(f"method.kind={kind!r} {error}") from error
    return found.model_validate(raw)


def _complete(text: str) -> PydanticCustomError:
    return PydanticCustomError("complete", "{text}", {"text": text})
