"""Every config class on one page, and the rules between them. One YAML is one run: config_file.py reads it.

No torch and no Ray is imported here: a config is checked in well under a second.

Steps count optimizer updates, from 0. "After step s" and every `*_steps` value count finished updates.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from relora_ray.location import location_problem, secret_in_url, shown
from relora_ray.masking import LITERAL_OPTIONS, REFERENCE, must_be_reference
from relora_ray.plan import Plan, all_values, cycle_ends, read_plan, value_at
from relora_ray.sizes import DEFAULT_VOCAB_SIZE, LLAMA_LINEARS, LLAMA_SIZES, LlamaSize


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def _rule(text: str) -> PydanticCustomError:
    """A broken rule of one field; its key and value are put in front."""
    return PydanticCustomError("field_rule", "{text}", {"text": text})


def _location(value: str) -> str:
    """A folder or URL as it will be used: `~` expanded; one that is not plain (location.py), or unexpanded, refused."""
    if problem := location_problem(value):
        raise _rule(problem)
    if "$" in value:
        raise _rule("has a $: environment variables are not expanded here. Write the path out.")
    return os.path.expanduser(value)


Location = Annotated[str, AfterValidator(_location)]


class _Mapping(dict[str, Any]):
    """A config is frozen, and so may be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def _storage_options(value: dict[str, Any]) -> dict[str, Any]:
    """Options as given; what may be a secret among them must be the name of an environment variable."""
    for dotted, option in flatten(value).items():
        if isinstance(option, str) and REFERENCE.fullmatch(option):
            continue
        if must_be_reference(dotted, option):
            variable = re.sub(r"[^A-Z0-9_]", "_", dotted.rpartition(".")[2].upper())
            raise _secret_option(
                f"{dotted} must not be written out: the config is stored and shown, and this is no option that is "
                f"known to hold no secret.{nearest(dotted, sorted(LITERAL_OPTIONS), 0.8)} If it is what you mean, name "
                f"an environment variable that holds it, such as {dotted}: $STORAGE_{variable}."
            )
        if isinstance(option, str) and (problem := secret_in_url(option)):
            raise _secret_option(f"{dotted}={shown(option)} {problem}")
    return _Mapping(value)


def _secret_option(text: str) -> PydanticCustomError:
    """A broken rule of one option, complete but for the section in front: its value must not be shown."""
    return PydanticCustomError("secret_option", "{text}", {"text": text})


Options = Annotated[dict[str, Any], AfterValidator(_storage_options)]


def _plan(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return read_plan(value)
    except ValueError as error:
        raise _rule(str(error)) from error


Planned = Annotated[Annotated[int, Field(gt=0)] | dict[int, int], BeforeValidator(_plan), AfterValidator(_plan)]
"""A number above 0, or a plan of them."""


class ModelConfig(Section):
    size: str = ""
    """A reference LLaMA size: 9m, 20m, 35m, 60m, 130m, 250m, 350m, 1b, 3b or 7b."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the residual stream; overrides `size`."""
    intermediate_size: int | None = Field(None, gt=0)
    """Inner width of the feed-forward layers; overrides `size`."""
    num_layers: int | None = Field(None, gt=0)
    """Transformer blocks; overrides `size`."""
    num_heads: int | None = Field(None, gt=0)
    """Attention heads; must divide `hidden_size`; overrides `size`."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding. Default: 32100 for LLaMA sizes, its own for `huggingface`."""
    tie_embeddings: bool = False
    """Share the embedding with the output head (LLaMA sizes only; `huggingface` brings its own choice)."""
    huggingface: str = ""
    """Instead of a size: a Hugging Face folder, `config.json` or hub name that gives the architecture of any
    causal language model. Its weights are not read: see `init_from`. Its content is stored when the run begins, and
    read from there ever after: the folder may move, and hub names are looked up once. A loss of the router that its
    config asks for (output_router_logits) counts in training, as transformers has it: it is one of a micro-batch, so
    that the result then depends on `train.micro_batch_rows` and the number of workers."""
    fingerprint: str = ""
    """Expected digest of the architecture that `huggingface` names; empty: whatever is there when the run begins, fixed
    from then on."""
    frozen: tuple[str, ...] = ()
    """Parts of the model that are not trained, by segments of their names, such as `encoder_attn` or `vision_tower`:
    what the model has and never uses."""
    init_from: str = ""
    """Weights to start from: a Hugging Face folder, a checkpoint of the published ReLoRA code (its adapters are
    merged), or a run's folder (`RUN` for its newest checkpoint, `RUN@STEP` for a named one; a folder that is called so
    is itself). Optimizer state is not taken over. Empty: a seeded random start."""

    @field_validator("init_from")
    @classmethod
    def _check_place(cls, value: str) -> str:
        if secret_in_url(value):
            raise _rule(secret_in_url(value))
        if value and (problem := location_problem(split_step(value)[0])):
            raise _rule(problem)
        return value

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        dims = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
        given = [name for name in dims if getattr(self, name) is not None]
        if self.huggingface:
            taken = given + (["size"] if self.size else []) + (["tie_embeddings"] if self.tie_embeddings else [])
            if taken:
                raise ValueError(
                    f"model.{taken[0]}={getattr(self, taken[0])!r} is given together with "
                    f"model.huggingface={self.huggingface!r}, which decides it. Remove one of the two."
                )
            return self
        if self.fingerprint:
            raise ValueError(
                f"model.fingerprint={self.fingerprint!r} has no effect without model.huggingface, whose "
                f"architecture it is of. Remove it, or set that."
            )
        if self.size in LLAMA_SIZES and len(given) == len(dims):
            raise ValueError(
                f"model.size={self.size!r} has no effect: {', '.join(dims)} are all given. Remove it, or them."
            )
        if self.size and self.size not in LLAMA_SIZES:
            raise ValueError(
                f"model.size={self.size!r} is not one of {', '.join(LLAMA_SIZES)}."
                f"{nearest(self.size, list(LLAMA_SIZES))}"
            )
        if not self.size and len(given) < len(dims):
            missing = [name for name in dims if name not in given]
            raise ValueError(
                f"model.{missing[0]} is missing: without model.size or model.huggingface all of "
                f"{', '.join(dims)} are needed. Set model.size to one of {', '.join(LLAMA_SIZES)}, or set them."
            )
        llama = self.llama
        assert llama is not None
        if llama.hidden_size % llama.num_heads or (llama.hidden_size // llama.num_heads) % 2:
            raise ValueError(
                f"model.hidden_size={llama.hidden_size} with model.num_heads={llama.num_heads}: the width of a "
                f"head, hidden_size / num_heads, must be a whole, even number (rotary embedding). "
                f"Change one of the two."
            )
        return self

    @property
    def llama(self) -> LlamaSize | None:
        """The LLaMA dimensions with overrides applied, or None for a `huggingface` architecture."""
        if self.huggingface:
            return None
        known = LLAMA_SIZES[self.size] if self.size else LlamaSize(0, 0, 0, 0)
        return LlamaSize(
            self.hidden_size or known.hidden_size,
            self.intermediate_size or known.intermediate_size,
            self.num_layers or known.num_layers,
            self.num_heads or known.num_heads,
            known.max_positions,
        )

    @property
    def llama_vocab_size(self) -> int:
        return self.vocab_size or DEFAULT_VOCAB_SIZE


class DataConfig(Section):
    path: Location
    """Folder or URL written by `python -m relora_ray.data.prepare`."""
    storage_options: Options | None = None
    """As `storage_options`, for `path`. Default: those of `storage`, if it is of the same kind."""
    seq_len: int = Field(512, gt=0)
    """Tokens a row feeds to the model; each is also predicted once (a row reads one token more)."""
    fingerprint: str = ""
    """Expected fingerprint of the data; empty: whatever is there at the first start, fixed from then on."""


class ResetConfig(Section):
    """What a merge does to the Adam state of the adapters. m and v share one mask (the reference draws two).

    The defaults are the best of benchmarks/results/ablations-resets (1.2 M parameters, 600 updates, 3 merges, learning
    rate and scale tuned for each row; held-out loss, mean of 3 seeds, which differ from each other by up to 0.04):
    zero 2.1304, magnitude 0.9 2.1332, random 0.9 2.1342, zero with the step kept 2.1344, none 2.1379. As published:
    random 0.999 2.1557, magnitude 0.9 3.1709.
    """

    kind: Literal["zero", "magnitude", "random", "none"] = "zero"
    """zero: all of m and v. magnitude: all but the largest `1 - ratio` by |m|. random: a keyed random `ratio`.
    none: keep everything (for ablations)."""
    ratio: float = Field(0.95, gt=0, lt=1)
    """Share of entries that magnitude and random prune. Above, the more the better: none of them (kind none), 0.9 and
    all of them (kind zero) came out in this order."""
    adam_step: Literal["reset", "keep"] = "reset"
    """Adam's bias-correction counter of the adapters. reset: starts again at 0, so the first updates are
    corrected and stay near the learning rate. keep: as published; with beta2 = 0.999 an entry with fresh
    moments then moves up to (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate at once and
    6.6 times within 12 steps. Each wants a learning rate of its own: at best 8e-3 and 4e-3 in the runs above."""


class FullConfig(Section):
    kind: Literal["full"] = "full"
    """Full-rank training: every weight is trained."""


class LoraConfig(Section):
    kind: Literal["lora"] = "lora"
    """LoRA pre-training: adapters on frozen weights, never merged during training."""
    lora_rank: Planned = 128
    """Inner dimension of the adapters. With relora it may change at merges: `{0: 256, 20000: 128}` is 256 at first and
    128 after the merge at step 20000. Adapters of another rank begin without moments, whatever `reset` says."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / lora_rank (rsLoRA: alpha / sqrt(lora_rank))."""
    rslora: bool = False
    """Scale by alpha / sqrt(lora_rank) (Kalajdzievski 2023)."""
    frozen_weights: Literal["fp32", "bf16_int8", "bf16"] = "fp32"
    """How the frozen weights are stored, and so what a merge can add to. fp32: 4 bytes a weight; a merge changes
    nothing in the function, bit for bit. bf16_int8: 3 bytes, bf16 and the next 8 bits of the mantissa. bf16: 2 bytes,
    as published; most of a small update is rounded away (for comparison only). Error of the sum of 20 merges of rms
    1e-4 and 1e-5 into weights of std 0.02 (benchmarks/results/merge-numerics.md): fp32 5e-6 and 5e-5, bf16_int8 1.3e-3
    and 1.3e-2, bf16 0.33 and 0.90."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input; experts' adapters have none. Above 0 the layer is computed in two branches
    instead of with one merged matrix: slower, and a merge then changes the function by rounding."""
    trainable_scaling: bool = False
    """Learn one factor per layer on top of the scale; 1 at the start and again after every merge."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear layers and stacks of experts in the transformer blocks get adapters: all of them, or these last path
    segments. A name that matches nothing is an error. With all-linear, what is too narrow for `lora_rank` is left
    out, and a line says so."""
    leave_out: tuple[str, ...] = ()
    """Last path segments of layers that get none and stay trained in full, such as a layer whose weight the model reads
    without calling it."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            raise _rule("must be all-linear or a list of names, such as [q_proj, v_proj].")
        if not value or len(set(value)) < len(value):
            raise _rule("must name at least one layer, and each once.")
        return value

    warm_start_steps: int = Field(0, ge=0)
    """Full-rank updates before the adapters are put in, inside the same run."""
    warm_start_lr_ratio: float = Field(1.0, gt=0)
    """Learning rate during the warm start, relative to the schedule's. The reference warms up at 5e-4 and
    trains ReLoRA at 1e-3: 0.5."""


class ReloraConfig(LoraConfig):
    kind: Literal["relora"] = "relora"  # type: ignore[assignment]
    """ReLoRA (Lialin et al. 2023): merge and redraw the adapters every `merge_every_steps`."""
    merge_every_steps: Planned
    """Updates in a cycle, counted from the end of the warm start. Cycles may change their length where one begins:
    `{0: 1000, 5000: 2000}`; the learning rate then restarts at every merge."""
    reset: ResetConfig = ResetConfig()
    compat: Literal["", "reference"] = ""
    """reference: the arithmetic of the published code (Guitaricet/relora at 176f376) where it differs. A and B both
    start at zero; merges fall one update later, so that none follows the last cycle; a reset only where the learning
    rate restarts; m and v are pruned with masks of their own; reset kind zero prunes a random 0.999; Adam's step is
    kept; after a warm start optimizer and schedule begin anew. Draws stay keyed. For comparisons, and to continue what
    was begun there; the published layer also has dropout=0.1."""

    @model_validator(mode="after")
    def _check_compat(self) -> ReloraConfig:
        if not self.compat:
            return self
        rules = {
            "reset.adam_step='keep'": self.reset.adam_step == "keep",
            "reset.kind zero, magnitude or random": self.reset.kind != "none",
            "trainable_scaling=false (the published one is dead after a merge)": not self.trainable_scaling,
            "merge_every_steps of 2 or more": min(all_values(self.merge_every_steps)) > 1,
            "merge_every_steps that does not change": not isinstance(self.merge_every_steps, Plan),
            "lora_rank that does not change": not isinstance(self.lora_rank, Plan),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ValueError(f"method.compat='reference' needs method.{rule}. Set that, or remove compat.")
        return self


MethodConfig = Annotated[FullConfig | LoraConfig | ReloraConfig, Field(discriminator="kind")]

METHOD_KINDS: dict[str, type[Section]] = {
    c.model_fields["kind"].default: c for c in get_args(get_args(MethodConfig)[0])
}


class OptimizerConfig(Section):
    learning_rate: float = Field(gt=0)
    """Peak learning rate. ReLoRA wants about twice that of full-rank training."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay of every trained matrix (not of norms, biases and scalars)."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""


class ScheduleConfig(Section):
    kind: Literal["constant", "linear", "cosine", "cosine_cycles", "jagged_cosine"] = "cosine"
    """jagged_cosine: one cosine over the run; at each restart the rate falls to 0 and climbs linearly back to
    where the cosine then is. cosine_cycles: a whole cosine per cycle. All begin with `warmup_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Linear climb from 0 at the start of the run."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the decay ends, relative to the peak (linear, cosine, cosine_cycles, jagged_cosine)."""
    restart_every_steps: int | None = Field(None, gt=0)
    """Restart period of jagged_cosine and cosine_cycles. Default: method.merge_every_steps."""
    restart_warmup_steps: int = Field(0, ge=0)
    """Linear climb after each restart."""


class TrainConfig(Section):
    micro_batch_rows: int = Field(gt=0)
    """Rows one worker puts through the model at once. Changes speed and memory; the result only by rounding, and
    by other dropout masks if there is dropout."""
    micro_batch_rows_by_device: Annotated[dict[str, Annotated[int, Field(gt=0)]], AfterValidator(_Mapping)] = {}
    """Instead, on GPUs whose name has this in it: `{H100: 32, L4: 8}`. Every worker makes its share of the global batch
    in steps of its own size; the first entry that fits counts. Kinds that round differently are found at the first
    boundary, where all ranks must hold the same bits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 (autocast). Weights, adapters and moments stay fp32, so merges are exact."""
    compile: bool | None = None
    """torch.compile the model and the loss. Default: on GPUs. A merge compiles nothing anew."""
    effective_weights: Literal["auto", "kept", "rebuilt"] = "auto"
    """Wrapped layers multiply by W + scale * B A. kept: added up once per update, for 2 bytes a wrapped weight in bf16
    and 4 in fp32. rebuilt: added up twice per micro-batch, one layer at a time: slower, and without that memory. The
    result is the same bit for bit. auto: kept, unless `method.frozen_weights` says that memory is short."""
    loss_chunk_tokens: int | None = Field(None, ge=0)
    """Tokens whose logits exist at a time; 0: all of a micro-batch. Changes memory, and the result by rounding.
    Default: all where that is less than 64 MiB in fp32, else 256 MiB of logits (4,181 tokens of 32,100 classes in
    bf16)."""
    skip_steps: tuple[int, ...] = ()
    """Updates, from 0, that are not made: their rows are passed over and nothing else moves. Fixed for a run, as it
    decides the result."""
    stop_after_steps: int | None = Field(None, gt=0)
    """Store the state after so many updates and end there, in the middle of the run. With another value, or none, the
    same run goes on. Default: `steps`."""
    max_nonfinite_steps: int = Field(10, ge=0)
    """A step whose loss or gradient is not finite is skipped and counted; more than this many in a row and the run has
    diverged. Schedule, boundaries and data do not shift."""
    divergence_nats: float = Field(2.0, gt=0)
    """A loss this far above the best that its average over a hundred updates or so has been since the last boundary is
    a sign of divergence, as is one that is not finite, ..."""
    divergence_steps: int = Field(20, gt=0)
    """... and so many signs among the last twice as many updates are divergence."""
    max_rollbacks: int = Field(3, ge=0)
    """A run that has diverged goes back to the last boundary before it, and does not make the updates around the
    first sign (rollback.py): at most so often. Then it ends. 0: only losses that are not finite end it, at once."""
    log_every_steps: int = Field(10, gt=0)
    eval_every_steps: int = Field(0, ge=0)
    """Evaluate after every so many updates, besides the start, the end of the warm start and the end of the
    run; 0: only those."""
    eval_rows: int = Field(256, gt=0)
    """Validation rows per evaluation: the first so many, the same at any world size."""
    eval_micro_batch_rows: int = Field(0, ge=0)
    """Rows per forward pass in evaluation; 0: micro_batch_rows."""


class CheckpointConfig(Section):
    save_every_steps: int = Field(gt=0)
    """Save after every so many updates, besides the start, every boundary and the end."""
    keep_last: int = Field(3, gt=0)
    """Checkpoints to keep, newest first. Those of the last two boundaries are kept too, so that a run that diverges can
    go back, and every base that a kept delta needs."""
    keep_every_steps: int = Field(0, ge=0)
    """Also keep every checkpoint at a multiple of this; 0: none."""
    save_async: bool = True
    """Store checkpoints while training goes on, which then waits only for a copy to host memory. A save that comes due
    while the one before is under way is left out, unless it is the first after a boundary: that one is waited for."""
    max_unsaved_steps: int | None = Field(None, gt=0)
    """Where storage fails, the run goes on until so many updates are not stored, and then ends. Default: 4 *
    save_every_steps."""


class ClusterConfig(Section):
    workers: int = Field(1, gt=0)
    """Training processes (data-parallel ranks), at most."""
    min_workers: int | None = Field(None, gt=0)
    """Train on with as few as these while machines are missing, and grow again when they come. Default: `workers`."""
    cpus_per_worker: int = Field(1, gt=0)
    """Whole CPUs reserved per worker, and its number of compute threads."""
    gpus_per_worker: int = Field(0, ge=0, le=1)
    """1: every worker has a GPU to itself, with NCCL; 0: training on the CPU with gloo."""
    max_failures: int = Field(20, ge=-1)
    """Attempts that may fail one after the other, without a checkpoint committed in between, before the run gives up;
    -1: any number. A run that gets on may fail any number of times in all. Resizes, and going back after a divergence,
    are no failures. Before an attempt that follows one without a step there is a pause: 1, 2, 4, ... 60 s. An error
    that another attempt would meet again ends the run at once, whatever this says: see verdict.py."""
    collective_timeout_s: int = Field(600, gt=0)
    """A collective operation that takes longer fails the attempt."""
    stall_timeout_s: int = Field(900, gt=0)
    """A worker that finishes no step, evaluation, checkpoint or start for so long is ended, and says where it was."""
    silence_timeout_s: int = Field(60, gt=0)
    """A worker whose process gives no sign of life for so long (stopped, or swapped out) is ended."""


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9](\.?[A-Za-z0-9_-])*$")
    """Name of the run: its folder under `storage`. Letters, digits, dashes, underscores, and single dots within."""
    storage: Location = "runs"
    """Folder or URL under which runs live: s3://, gs://, abfss://, or a folder that all machines share."""
    storage_options: Options = {}
    """For the fsspec file system of `storage`, such as endpoint_url. `$NAME` is read from the environment where it is
    used. Text must be written so unless its option is known to hold no secret (`LITERAL_OPTIONS` in masking.py). S3
    also takes the usual AWS_* variables, profiles and instance roles."""
    storage_retry_s: float = Field(60, gt=0)
    """A remote read or write that fails in passing is tried again for so many seconds."""
    seed: int = Field(0, ge=0)
    steps: int = Field(gt=0)
    """Optimizer updates in the whole run, warm start included. Left out if `tokens` is given."""
    tokens: int | None = Field(None, gt=0)
    """Instead of steps: a budget in tokens that the model is fed, over all workers, a whole number of updates of
    global_batch_rows * data.seq_len tokens."""
    global_batch_rows: int = Field(gt=0)
    """Rows per update over all workers, at any world size."""
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _steps_of_tokens(cls, raw: Any) -> Any:
        """Fill in `steps` where a token budget is given; what is malformed is left to the fields' own checks."""
        if not isinstance(raw, dict) or raw.get("tokens") is None or raw.get("steps") is not None:
            return raw
        data = raw.get("data")
        seq_len: Any = data.get("seq_len", 512) if isinstance(data, dict) else getattr(data, "seq_len", None)
        tokens, rows = raw["tokens"], raw.get("global_batch_rows")
        if not all(isinstance(n, (int, float)) and n > 0 for n in (tokens, rows, seq_len)):
            return raw
        return raw | {"steps": max(1, int(tokens // (rows * seq_len)))}  # a remainder is refused below

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        problems = [
            *_token_problems(self),
            *_stop_problems(self),
            *_skip_problems(self),
            *_compat_problems(self),
            *_batch_problems(self),
            *_cycle_problems(self),
            *_plan_problems(self),
            *_worker_problems(self),
            *_schedule_problems(self),
            *_rank_problems(self),
            *_idle_settings(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def warm_start_steps(self) -> int:
        return getattr(self.method, "warm_start_steps", 0)

    @property
    def merge_every_steps(self) -> int | Plan | None:
        return getattr(self.method, "merge_every_steps", None)

    @property
    def merges(self) -> tuple[int, ...]:
        """Finished updates at the end of each cycle, the last at `steps`; none without cycles."""
        if self.merge_every_steps is None:
            return ()
        return cycle_ends(self.warm_start_steps, self.merge_every_steps, self.steps)

    @property
    def restart_every_steps(self) -> int | Plan | None:
        return self.schedule.restart_every_steps or self.merge_every_steps

    @property
    def restarts(self) -> tuple[int, ...]:
        """Finished updates after which the learning rate restarts, in a schedule that does so: the end of the warm
        start and of every period but the last."""
        if self.restart_every_steps is None:
            return ()
        warm = self.warm_start_steps
        later = cycle_ends(warm, self.restart_every_steps, self.steps)[:-1]
        return (warm, *later) if warm else later

    @property
    def last_step(self) -> int:
        """Finished updates where this start of the run ends: `steps`, or `train.stop_after_steps`."""
        return self.train.stop_after_steps or self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_rows * self.data.seq_len

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, flattened to dotted keys.

        Two attempts of one run must agree on these; everything else (workers, micro-batch, cadences, where
        things lie) may change between attempts. `data.fingerprint` stands for the data, not its path, and
        `model.fingerprint` for what `model.huggingface` names; runs of versions without it are told apart by that.
        """
        return {k: v for k, v in self.settings().items() if not k.startswith(_OPERATIONAL)}

    def settings(self) -> dict[str, Any]:
        """All settings, flattened to dotted keys, less those that versions before did not have and that are not used:
        what was stored is known by the others."""
        other = {"model.huggingface" if self.model.fingerprint else "model.fingerprint"}
        given = flatten(self.model_dump(mode="json"))
        return {k: v for k, v in given.items() if k not in other and (v or k not in STRUCTURAL)}

    @property
    def keeps_effective_weights(self) -> bool:
        """Whether wrapped layers keep W + scale * B A, see `train.effective_weights`."""
        if not isinstance(self.method, LoraConfig) or self.method.dropout:
            return False
        if self.train.effective_weights == "auto":
            return self.method.frozen_weights == "fp32"
        return self.train.effective_weights == "kept"

    @property
    def min_workers(self) -> int:
        return self.cluster.min_workers or self.cluster.workers


STRUCTURAL = ("method.leave_out", "model.frozen")
"""Settings that decide which tensors there are. A run whose version did not have them may be given any that fit its
checkpoints."""

MAX_CYCLES = 1_000_000


_OPERATIONAL = (
    "name", "storage", "data.path", "data.storage_options", "checkpoint.", "cluster.",
    "tokens",  # steps says it
    "model.init_from",  # a run that has a checkpoint never reads it again
    "train.micro_batch_rows", "train.max_nonfinite_steps", "train.log_every_steps", "train.eval_",
    "train.compile", "train.effective_weights", "train.loss_chunk_tokens",
    "train.divergence_", "train.max_rollbacks", "train.stop_after_steps",
)  # fmt: skip


def _worker_problems(cfg: RunConfig) -> list[str]:
    cluster = cfg.cluster
    if cluster.min_workers is not None and cluster.min_workers > cluster.workers:
        return [
            f"cluster.min_workers={cluster.min_workers} is more than cluster.workers={cluster.workers}, the most that "
            f"are used. Lower it, or raise cluster.workers."
        ]
    return []


def _token_problems(cfg: RunConfig) -> list[str]:
    per_step = cfg.tokens_per_step
    if cfg.tokens is None or cfg.tokens == cfg.steps * per_step:
        return []
    if cfg.tokens % per_step == 0:
        return [
            f"tokens={cfg.tokens} is {cfg.tokens // per_step} updates of {per_step} tokens, but steps={cfg.steps}. "
            f"Remove one of the two."
        ]
    below = cfg.tokens // per_step * per_step
    return [
        f"tokens={cfg.tokens} is not a whole number of updates of {per_step} tokens (global_batch_rows="
        f"{cfg.global_batch_rows} * data.seq_len={cfg.data.seq_len}). Use tokens="
        + " or ".join(str(n) for n in (below, below + per_step) if n)
        + "."
    ]


def _stop_problems(cfg: RunConfig) -> list[str]:
    if (stop := cfg.train.stop_after_steps) is not None and stop > cfg.steps:
        return [f"train.stop_after_steps={stop} is more than steps={cfg.steps}, the whole run. Lower it, or remove it."]
    return []


def _skip_problems(cfg: RunConfig) -> list[str]:
    if wrong := [s for s in cfg.train.skip_steps if not 0 <= s < cfg.steps]:
        return [f"train.skip_steps has {wrong[0]}, which is no update of the run: they are 0 to {cfg.steps - 1}."]
    return []


def _compat_problems(cfg: RunConfig) -> list[str]:
    if getattr(cfg.method, "compat", "") == "reference" and cfg.optimizer.weight_decay:
        return [
            f"optimizer.weight_decay={cfg.optimizer.weight_decay} with method.compat='reference': the published code "
            f"decays norms and biases too, which is not reproduced. Set optimizer.weight_decay=0."
        ]
    return []


def _batch_problems(cfg: RunConfig) -> list[str]:
    rows, train = cfg.global_batch_rows, cfg.train
    sizes = {"micro_batch_rows": train.micro_batch_rows}
    sizes |= {f"micro_batch_rows_by_device.{name}": micro for name, micro in train.micro_batch_rows_by_device.items()}
    return [
        f"global_batch_rows={rows} is not a multiple of train.{key}={micro}. A global batch is made of whole "
        f"micro-batches: use train.{key}={math.gcd(rows, micro)} or global_batch_rows={-(-rows // micro) * micro}."
        for key, micro in sizes.items()
        if rows % micro
    ]


def _cycle_problems(cfg: RunConfig) -> list[str]:
    warm, merge = cfg.warm_start_steps, cfg.merge_every_steps
    if warm >= cfg.steps:
        return [
            f"method.warm_start_steps={warm} is not less than steps={cfg.steps}: nothing would be left for "
            f"{cfg.method.kind}. Raise steps or shorten the warm start."
        ]
    for name, every in (
        ("method.merge_every_steps", merge),
        ("schedule.restart_every_steps", cfg.schedule.restart_every_steps),
    ):
        shortest = min(every.values()) if isinstance(every, Plan) else every
        if shortest and cfg.steps // shortest > MAX_CYCLES:
            return [
                f"steps={cfg.steps} with {name}={every} is {cfg.steps // shortest:,} cycles, more than {MAX_CYCLES:,}. "
                f"Is steps a number of tokens? Those are given as tokens={cfg.steps}."
            ]
    if merge and cfg.merges[-1] != cfg.steps:
        near = cfg.merges[-2:]
        return [
            f"method.merge_every_steps={merge} has cycles end at {' and '.join(map(str, near))} (counted from "
            f"method.warm_start_steps={warm}), and not at steps={cfg.steps}. Cycles must be whole: use steps="
            f"{min(near, key=lambda end: abs(end - cfg.steps))}, or another cycle length."
        ]
    return []


def _plan_problems(cfg: RunConfig) -> list[str]:
    method = cfg.method
    if isinstance(method, FullConfig):
        return []
    if not isinstance(method, ReloraConfig):
        if isinstance(method.lora_rank, Plan):
            return [
                f"method.lora_rank={method.lora_rank} changes, and method.kind={method.kind} never merges: adapters "
                f"can change their rank where they are merged. Give one rank, or use method.kind=relora."
            ]
        return []
    merges = cfg.merges[:-1]
    return [
        f"method.{key} changes at step {step}, where no cycle begins. Cycles begin at {_around(step, merges)}."
        for key in ("lora_rank", "merge_every_steps")
        if isinstance(planned := getattr(method, key), Plan)
        for step in planned
        if step and step not in merges
    ]


def _around(step: int, merges: tuple[int, ...]) -> str:
    near = [*[s for s in merges if s < step][-1:], *[s for s in merges if s > step][:1]]
    return " and ".join(map(str, near)) or "0 alone"


def _schedule_problems(cfg: RunConfig) -> list[str]:
    sched, every, merge = cfg.schedule, cfg.restart_every_steps, cfg.merge_every_steps
    if sched.kind not in ("jagged_cosine", "cosine_cycles"):
        given = {k: v for k in ("restart_every_steps", "restart_warmup_steps") if (v := getattr(sched, k))}
        if given:
            return [
                f"schedule.{k}={v} has no effect with schedule.kind={sched.kind}. Use jagged_cosine or cosine_cycles, "
                f"or remove it."
                for k, v in given.items()
            ]
        if sched.warmup_steps > cfg.steps:
            return [f"schedule.warmup_steps={sched.warmup_steps} is more than steps={cfg.steps}. Shorten the warm-up."]
        return []
    if every is None:
        return [f"schedule.kind={sched.kind} restarts, but schedule.restart_every_steps is not set. Set it."]
    if isinstance(merge, Plan) and sched.restart_every_steps:
        return [
            f"schedule.restart_every_steps={sched.restart_every_steps} with method.merge_every_steps={merge}: where "
            f"cycles change their length, the learning rate restarts at every merge. Remove one of the two."
        ]
    problems = []
    first, shortest = cfg.warm_start_steps or value_at(every, 0), min(all_values(every))
    if sched.kind == "jagged_cosine" and not sched.restart_warmup_steps:
        problems.append(
            "schedule.restart_warmup_steps=0 with schedule.kind=jagged_cosine: without a climb after each restart it "
            "is the plain cosine. Set it, to a tenth of a cycle or less, or use kind cosine."
        )
    if sched.restart_every_steps and (cfg.steps - cfg.warm_start_steps) % sched.restart_every_steps:
        problems.append(
            f"schedule.restart_every_steps={every} does not divide the {cfg.steps - cfg.warm_start_steps} steps that "
            f"follow the warm start. Cycles must be whole: change it or steps."
        )
    if isinstance(every, int) and isinstance(merge, int) and every % merge:
        fits = sorted({(every // merge) * merge or merge, -(-every // merge) * merge})
        problems.append(
            f"schedule.restart_every_steps={every} is not a multiple of method.merge_every_steps={merge}. "
            f"LR restarts must fall on merges: use {' or '.join(map(str, fits))}, or change method.merge_every_steps."
        )
    if sched.warmup_steps > first:
        problems.append(
            f"schedule.warmup_steps={sched.warmup_steps} is longer than the {first} steps before the first restart. "
            f"Shorten the warm-up or restart later."
        )
    if sched.restart_warmup_steps >= shortest:
        problems.append(
            f"schedule.restart_warmup_steps={sched.restart_warmup_steps} is not less than the {shortest} steps between "
            f"restarts. Shorten it, or set schedule.restart_every_steps higher."
        )
    return problems


def _rank_problems(cfg: RunConfig) -> list[str]:
    method, llama = cfg.method, cfg.model.llama
    if isinstance(method, FullConfig) or llama is None:
        return []
    problems = []
    names = LLAMA_LINEARS if method.target_modules == "all-linear" else method.target_modules
    for name in names:
        if name not in LLAMA_LINEARS:
            problems.append(
                f"method.target_modules has {name!r}, which matches no linear layer of a LLaMA block "
                f"({', '.join(LLAMA_LINEARS)}).{nearest(name, list(LLAMA_LINEARS))}"
            )
    smaller_side = llama.hidden_size
    if set(names) - {"q_proj", "k_proj", "v_proj", "o_proj"}:
        smaller_side = min(llama.hidden_size, llama.intermediate_size)
    if max(all_values(method.lora_rank)) > smaller_side:
        problems.append(
            f"method.lora_rank={method.lora_rank} is more than {smaller_side}, the smaller side of the smallest "
            f"wrapped layer. Use a rank of at most {smaller_side}; well below it for any saving."
        )
    return problems


def _idle_settings(cfg: RunConfig) -> list[str]:
    """Settings that differ from their defaults and would be ignored."""
    method, schedule, save = cfg.method, cfg.schedule, cfg.checkpoint
    idle: list[tuple[str, object, str]] = []
    if isinstance(method, LoraConfig) and not method.warm_start_steps and method.warm_start_lr_ratio != 1:
        idle.append(("method.warm_start_lr_ratio", method.warm_start_lr_ratio, "with method.warm_start_steps=0"))
    if isinstance(method, ReloraConfig):
        reset = method.reset
        if reset.kind in ("zero", "none") and reset.ratio != ResetConfig().ratio:
            idle.append(("method.reset.ratio", reset.ratio, f"with method.reset.kind={reset.kind}"))
        if reset.kind == "none" and reset.adam_step != ResetConfig().adam_step:
            idle.append(("method.reset.adam_step", reset.adam_step, "with method.reset.kind=none"))
    if schedule.kind == "constant" and schedule.min_lr_ratio != ScheduleConfig().min_lr_ratio:
        idle.append(("schedule.min_lr_ratio", schedule.min_lr_ratio, "with schedule.kind=constant"))
    problems = [f"{key}={value} has no effect {why}. Remove one of the two." for key, value, why in idle]
    if save.keep_every_steps % save.save_every_steps:
        problems.append(
            f"checkpoint.keep_every_steps={save.keep_every_steps} is not a multiple of checkpoint.save_every_steps="
            f"{save.save_every_steps}: there would be no checkpoint to keep at most of its multiples. Make it one."
        )
    return problems


def split_step(place: str) -> tuple[str, int | None]:
    """`runs/a@5000` -> `runs/a`, 5000. What has no number after its last @ is a place as it is."""
    run, _, step = place.rpartition("@")
    return (run, int(step)) if run and step.isascii() and step.isdigit() else (place, None)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nearest(name: str, known: list[str], cutoff: float = 0.5) -> str:
    """The question "Did you mean 'x'?", a space before it, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
