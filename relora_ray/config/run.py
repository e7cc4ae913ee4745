"""A run's config: its sections but for the method's, and the rules between them. One YAML is one run: file.py reads it.

No torch and no Ray is imported here: a config is checked in well under a second.

Steps count optimizer updates, from 0. "After step s" and every `*_steps` value count finished updates.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from relora_ray.config.method import MethodConfig, WarmStart, problems_of, read_method
from relora_ray.config.planned import cycle_ends
from relora_ray.config.section import Location, Mapping_, Options, Section, flatten, rule
from relora_ray.config.sizes import DEFAULT_VOCAB_SIZE, LLAMA_SIZES, LlamaSize, nearest_size
from relora_ray.config.tracking import TrackingConfig
from relora_ray.location import location_problem, secret_in_url


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
    is itself). Optimizer state is not taken over. Empty: a seeded random start. Without `size`, dimensions and
    `huggingface` it gives the architecture too."""

    @model_validator(mode="before")
    @classmethod
    def _architecture_of_its_weights(cls, raw: Any) -> Any:
        """`init_from` alone says what is trained: the folder has the architecture beside the weights."""
        if not isinstance(raw, dict) or not isinstance(place := raw.get("init_from"), str) or not place:
            return raw
        says = ("size", "huggingface", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        return raw if any(raw.get(name) not in (None, "") for name in says) else raw | {"huggingface": place}

    @field_validator("init_from")
    @classmethod
    def _check_place(cls, value: str) -> str:
        if secret_in_url(value):
            raise rule(secret_in_url(value))
        if value and (problem := location_problem(split_step(value)[0])):
            raise rule(problem)
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
                f"model.size={self.size!r} is not one of {', '.join(LLAMA_SIZES)}.{nearest_size(self.size)}"
            )
        if not self.size and len(given) < len(dims):
            missing = [name for name in dims if name not in given]
            raise ValueError(
                f"model.{missing[0]} is missing: without model.size, model.huggingface or model.init_from all of "
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


def _names_of_sets(sets: dict[str, str]) -> dict[str, str]:
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise rule(f"has the name {name!r}. Use letters, digits, dashes and underscores, at most 64.")
    return sets


class DataConfig(Section):
    path: Location
    """Folder or URL written by `python -m relora_ray.data.prepare`."""
    storage_options: Options | None = None
    """As `storage_options`, for `path`. Default: those of `storage`, if it is of the same kind."""
    seq_len: int = Field(512, gt=0)
    """Tokens a row feeds to the model; each is also predicted once (a row reads one token more)."""
    fingerprint: str = ""
    """Expected fingerprint of the data; empty: whatever is there at the first start, fixed from then on."""
    validation: Annotated[dict[str, Location], AfterValidator(_names_of_sets), AfterValidator(Mapping_)] = Field({})
    """More held-out text by name, `{books: FOLDER, code: URL}`: data prepared with the tokenizer of `path`. The
    first `train.eval_rows` validation rows of each are evaluated whenever the run's own are. No weight depends on them:
    sets may come and go between starts."""
    validation_fingerprints: Annotated[dict[str, str], AfterValidator(Mapping_)] = Field({})
    """Expected fingerprints of `validation`, by name; of those not named: whatever is there at the first start, fixed
    from then on, so that a name stands for one text."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if idle := sorted(self.validation_fingerprints.keys() - self.validation.keys()):
            raise ValueError(
                f"data.validation_fingerprints.{idle[0]} has no effect: data.validation has no set of that name. "
                f"Remove it, or name the set."
            )
        return self


class OptimizerConfig(Section):
    learning_rate: float = Field(gt=0)
    """Peak learning rate. ReLoRA wants about twice that of full-rank training."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """How much of the mean of gradients is kept in an update."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """How much of the mean of their squares is kept."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of that, after its bias is corrected."""
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
    micro_batch_rows_by_device: Annotated[dict[str, Annotated[int, Field(gt=0)]], AfterValidator(Mapping_)] = Field({})
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
    recompute: bool = False
    """Keep of each block's activations its input alone, and compute the rest again in the backward pass: a third more
    multiplications, and several times fewer bytes. The result is the same bit for bit."""
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
    """A line is printed after every so many updates. Every update's numbers are in the run's metrics all the same."""
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
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss. An evaluation that finds the lowest so far is then
    followed by a save, whatever `save_every_steps` says, which waits for one that is under way."""
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
    storage_options: Options = Field({})
    """For the fsspec file system of `storage`, such as endpoint_url. `$NAME` is read from the environment where it is
    used. Text must be written so unless its option is known to hold no secret (`LITERAL_OPTIONS` in masking.py). S3
    also takes the usual AWS_* variables, profiles and instance roles."""
    storage_retry_s: float = Field(60, gt=0)
    """A remote read or write that fails in passing is tried again for so many seconds."""
    seed: int = Field(0, ge=0)
    """Of every random draw: first weights, adapters, dropout, the order of rows."""
    steps: int = Field(gt=0)
    """Optimizer updates in the whole run, warm start included. Left out if `tokens` is given."""
    tokens: int | None = Field(None, gt=0)
    """Instead of steps: a budget in tokens that the model is fed, over all workers, a whole number of updates of
    global_batch_rows * data.seq_len tokens."""
    global_batch_rows: int = Field(gt=0)
    """Rows per update over all workers, at any world size."""
    model: ModelConfig
    data: DataConfig
    method: SerializeAsAny[MethodConfig]
    """How weights are trained: the section of its kind, see `relora_ray.config.method`."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    """Where its curves go besides: `[tensorboard, wandb, mlflow]`, or a mapping with options: see docs/watching.md."""

    @field_validator("method", mode="before")
    @classmethod
    def _method_of_its_kind(cls, raw: Any) -> MethodConfig:
        return read_method(raw)

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
            *_batch_problems(self),
            *problems_of(self.method, self),
            *_worker_problems(self),
            *_schedule_problems(self),
            *_best_problems(self),
            *_idle_settings(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def warm_start_steps(self) -> int:
        return self.method.warm_start_steps if isinstance(self.method, WarmStart) else 0

    @property
    def warm_start_lr_ratio(self) -> float:
        return self.method.warm_start_lr_ratio if isinstance(self.method, WarmStart) else 1.0

    @property
    def merges(self) -> tuple[int, ...]:
        """Finished updates at the end of each cycle, the last at `steps`; none without cycles."""
        return self.method.cycles(self.steps)

    @property
    def periods(self) -> tuple[int, ...]:
        """Finished updates at the ends of what the learning rate goes through between its restarts."""
        if every := self.schedule.restart_every_steps:
            return cycle_ends(self.warm_start_steps, every, self.steps, "schedule.restart_every_steps")
        return self.merges

    @property
    def restarts(self) -> tuple[int, ...]:
        """Finished updates after which the learning rate restarts, in a schedule that does so: the end of the warm
        start and of every period but the last."""
        warm = (self.warm_start_steps,) if self.warm_start_steps and self.periods else ()
        return (*warm, *self.periods[:-1])

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
    def min_workers(self) -> int:
        return self.cluster.min_workers or self.cluster.workers


STRUCTURAL = ("method.leave_out", "model.frozen")
"""Settings that decide which tensors there are. A run whose version did not have them may be given any that fit its
checkpoints."""

_OPERATIONAL = (
    "name", "storage", "data.path", "data.storage_options", "data.validation", "checkpoint.", "cluster.", "tracking.",
    "tokens",  # steps says it
    "model.init_from",  # a run that has a checkpoint never reads it again
    "train.micro_batch_rows", "train.max_nonfinite_steps", "train.log_every_steps", "train.eval_",
    "train.compile", "train.effective_weights", "train.loss_chunk_tokens", "train.recompute",
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


def _schedule_problems(cfg: RunConfig) -> list[str]:
    sched, warm = cfg.schedule, cfg.warm_start_steps
    if sched.kind not in ("jagged_cosine", "cosine_cycles"):
        given = {k: v for k in ("restart_every_steps", "restart_warmup_steps") if (v := getattr(sched, k))}
        if given:
            return [
                f"schedule.{k}={v} has no effect with schedule.kind={sched.kind}. Use jagged_cosine or cosine_cycles, "
                f"or remove it (~schedule.{k})."
                for k, v in given.items()
            ]
        if sched.warmup_steps > cfg.steps:
            return [f"schedule.warmup_steps={sched.warmup_steps} is more than steps={cfg.steps}. Shorten the warm-up."]
        return []
    ends = cfg.periods
    if not ends:
        without = " ~schedule.restart_warmup_steps" if sched.restart_warmup_steps else ""
        return [
            f"schedule.kind={sched.kind} restarts with each cycle, and method.kind={cfg.method.kind} has none. Use "
            f"schedule.kind=cosine{without}, or set schedule.restart_every_steps."
        ]
    problems = []
    first, shortest = warm or ends[0], min(end - start for start, end in zip((warm, *ends), ends, strict=False))
    if sched.kind == "jagged_cosine" and not sched.restart_warmup_steps:
        problems.append(
            "schedule.restart_warmup_steps=0 with schedule.kind=jagged_cosine: without a climb after each restart it "
            "is the plain cosine. Set it, to a tenth of a cycle or less, or use kind cosine."
        )
    if sched.restart_every_steps and (cfg.steps - warm) % sched.restart_every_steps:
        problems.append(
            f"schedule.restart_every_steps={sched.restart_every_steps} does not divide the {cfg.steps - warm} steps "
            f"that follow the warm start. Cycles must be whole: change it or steps."
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


def _best_problems(cfg: RunConfig) -> list[str]:
    if cfg.checkpoint.keep_best and not cfg.train.eval_every_steps:
        return [
            f"checkpoint.keep_best=true with train.eval_every_steps=0: held-out loss is known at the start and the end "
            f"only, whose checkpoints say nothing of those between. Set train.eval_every_steps, such as to "
            f"checkpoint.save_every_steps={cfg.checkpoint.save_every_steps}."
        ]
    return []


def _idle_settings(cfg: RunConfig) -> list[str]:
    """Settings that differ from their defaults and would be ignored."""
    schedule, save = cfg.schedule, cfg.checkpoint
    idle: list[tuple[str, object, str]] = []
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
