"""How good a model is: its perplexity, what it writes, and what it can be fine-tuned to.

relora-ray evaluate RUN|FOLDER ... [--data PATH] [--generate PROMPT] [--glue TASKS] [--lm-eval TASKS]
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from relora_ray import cli
from relora_ray.cli import at_least_0, at_least_1, command, place, printable
from relora_ray.errors import ConfigError, DivergedError, RunFailedError
from relora_ray.storage import Storage, add_options_argument, parse_options

if TYPE_CHECKING:
    from relora_ray.evaluation.fine_tuning import Job
    from relora_ray.evaluation.perplexity import Rows
    from relora_ray.evaluation.subject import Subject
    from relora_ray.runs.evaluations import Evaluation

ROWS = 256
"""Of a model that is no run's."""
SEQ_LEN = 512
HELD_OUT = "held-out"


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from relora_ray.evaluation.fine_tuning import device_of
    from relora_ray.evaluation.subject import open_subject

    options = parse_options(args.storage_option)
    args.device_used = device_of(args.device)
    places = [place("RUN|FOLDER", model, options) for model in args.models]
    failed: list[str] = []
    with ExitStack() as stack:
        # All of them first: a mistake in the last is told before hours are spent on the first.
        subjects = [stack.enter_context(open_subject(at, args.step, best=args.best)) for at in places]
        args.asked = any((args.data, args.generate, args.glue, args.lm_eval))
        _refuse_what_cannot_be(args, subjects)
        firsts: dict[str, Evaluation] = {}
        for subject in subjects:
            print(_title(subject), flush=True)
            out = _results(args, subject, options)
            _perplexities(args, subject, out, options, firsts)
            _samples(args, subject, out)
            failed += _glue(args, subject, out, options)
            _harness(args, subject, out)
    if failed:
        raise RunFailedError(f"{len(failed)} of GLUE's results are missing: {'; '.join(failed)} The others are kept.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "evaluate",
        (__doc__ or "").splitlines()[0],
        "runs/quickstart",
        "runs/quickstart --data books=data/books,data/code --rows 1000",
        "runs/a runs/b --best --data data/c4 --rows 1000",
        "runs/quickstart --step 300 --generate 'It was a truth' --temperature 0.8",
        "runs/quickstart --glue cola,rte --glue-data data/glue --seeds 1,2,3",
        "exported --glue all --out results --ray",
        "exported --lm-eval lambada_openai,arc_easy --out results",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN|FOLDER", help="a run's folder or URL, or a Hugging Face folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=at_least_0, default=None, help="a checkpoint's step; default: the newest")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss")
    add("--out", help="where results go, as a folder or URL; default: a run's own folder, and for other models nowhere")
    add("--device", default="", choices=("", "cpu", "cuda"), help="default: a GPU if there is one")
    add("--precision", choices=("fp32", "bf16"), default=None, help="default: a run's own for --data, else fp32")
    data = parser.add_argument_group(
        "perplexity (without any of --data, --generate, --glue, --lm-eval: on a run's own data)"
    )
    add = data.add_argument
    add("--data", action="append", default=[], metavar="[NAME=]PATH,...", help="prepared data; may be repeated")
    add("--split", choices=("validation", "train"), default="validation", help="default: validation")
    add(
        "--rows",
        type=at_least_0,
        default=None,
        help="the first so many; 0: all; default: a run's train.eval_rows, or 256",
    )
    add("--seq-len", type=at_least_1, default=None, help="tokens of a row; default: a run's data.seq_len, or 512")
    add = parser.add_argument_group("samples").add_argument
    add("--generate", action="append", default=[], metavar="PROMPT", help="continue this text; may be repeated")
    add("--max-new-tokens", type=at_least_1, default=64, help="default: 64")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token; default: 0.8")
    add("--seed", type=at_least_0, default=0, help="of samples; default: 0")
    _add_glue(parser)
    add = parser.add_argument_group("lm-evaluation-harness").add_argument
    add("--lm-eval", default="", metavar="TASKS", help="names of its tasks, with commas between")
    add("--num-fewshot", type=at_least_0, default=None, help="examples in front; default: the task's own")
    add("--limit", type=at_least_1, default=None, help="the first so many examples of each task only")
    add("--lm-eval-include", default=None, metavar="FOLDER", help="of tasks of your own")
    add("--lm-eval-batch-rows", type=at_least_1, default=8, help="default: 8")
    add_options_argument(parser)
    return parser


def _add_glue(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "fine-tuning on GLUE (defaults: those of transformers' run_glue, which the published ReLoRA code uses)"
    ).add_argument
    add("--glue", default="", metavar="TASKS", help="cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte or all")
    add(
        "--glue-data",
        default="hub:nyu-mll/glue",
        metavar="FOLDER",
        help="of RTE/train.tsv and so on; or hub:NAME (default)",
    )
    add("--seeds", default="1,2,3", help="one fine-tuning each; default: 1,2,3")
    add("--learning-rate", type=float, default=2e-5, help="peak, falls linearly to 0; default: 2e-5")
    add("--epochs", type=at_least_1, default=3, help="default: 3")
    add("--batch-rows", type=at_least_1, default=32, help="default: 32")
    add("--max-tokens", type=at_least_1, default=128, help="of a row; longer ones are cut and counted; default: 128")
    add("--max-train-rows", type=at_least_1, default=None, help="only so many, which is no GLUE result; default: all")
    add("--max-dev-rows", type=at_least_1, default=None, help="evaluate on so many only; default: all")
    add("--ray", action="store_true", help="as Ray tasks, on the cluster of RAY_ADDRESS or on a Ray of its own")


def _check(args: argparse.Namespace) -> None:
    if not (0 <= args.temperature < math.inf):
        raise ConfigError(f"--temperature={args.temperature} is not a number of 0 or more.")
    if not (0 < args.learning_rate < math.inf):
        raise ConfigError(f"--learning-rate={args.learning_rate} is not above 0.")
    if args.ray and not args.glue:
        raise ConfigError("--ray has no effect without --glue: the rest is done in this process. Remove it.")
    seeds = args.seeds.split(",")
    if not all(seed.strip().isascii() and seed.strip().isdigit() for seed in seeds):
        raise ConfigError(f"--seeds={args.seeds!r} is not a list of whole numbers of 0 or more, such as 1,2,3.")
    args.seed_list = sorted({int(seed) for seed in seeds})


def _refuse_what_cannot_be(args: argparse.Namespace, subjects: Sequence[Subject]) -> None:
    """What all of it needs is there, before anything is computed."""
    for subject in subjects:
        if not args.asked and subject.cfg is None:
            raise ConfigError(
                f"{subject.name} is a model without data of its own. Say what to evaluate: --data, --generate, --glue "
                f"or --lm-eval."
            )
        if args.generate or args.glue or args.lm_eval:
            subject.need_tokens("this")
    if args.lm_eval:
        from relora_ray.evaluation.harness import refuse_without_harness

        refuse_without_harness()
    if args.glue:
        from relora_ray.evaluation.glue import chosen_tasks, refuse_missing

        refuse_missing(chosen_tasks(args.glue), args.glue_data)


def _title(subject: Subject) -> str:
    step = "" if subject.step is None else f", after step {subject.step:,}"
    return f"{subject.name}{step}"


def _results(args: argparse.Namespace, subject: Subject, options: dict[str, Any]) -> Storage | None:
    out = place("--out", args.out, options) if args.out is not None else subject.results()
    if out is None:
        print("  (results are not stored: give --out FOLDER to keep them)")
    return out


def _perplexities(
    args: argparse.Namespace,
    subject: Subject,
    out: Storage | None,
    options: dict[str, Any],
    firsts: dict[str, Evaluation],
) -> None:
    from relora_ray.evaluation.perplexity import difference, evaluate_rows, why_apart
    from relora_ray.runs.evaluations import perplexity_text

    if args.asked and not args.data:
        return
    precision = args.precision or (subject.cfg.train.precision if subject.cfg is not None else "fp32")
    if subject.setting is None and subject.tokens is None:
        print("  note: there is no tokenizer beside the model; that the data are of its own is taken on trust")
    for rows in _rows(args, subject, options):
        record, why_not = evaluate_rows(subject, rows, device=args.device_used, precision=precision, out=out)
        result = record["result"]
        print(f"  {rows.name:<12} {perplexity_text(result)} in {result['rows']:,} rows", flush=True)
        if 0 < rows.num_rows > result["rows"]:
            print(f"    note: there are only {result['rows']:,} rows, not {rows.num_rows:,}")
        if result["bits_per_byte"] is None:
            print(f"    note: bits per byte are not known: {printable(str(result.get('no_bytes_because', '')))}")
        first = firsts.setdefault(rows.name, record)
        if first is not record and (found := difference(first, record)) is not None:
            print(f"    {found[0]:+.4f} +- {found[1]:.4f} to the first model, row by row")
        elif why := why_apart(first, record):
            print(
                f"    note: not compared with the first model: {why}. --rows, --seq-len and --precision say it for all"
            )
        _say_if_not_stored(why_not)


def _rows(args: argparse.Namespace, subject: Subject, options: dict[str, Any]) -> Iterator[Rows]:
    from relora_ray.evaluation.perplexity import Rows
    from relora_ray.runs.places import data_storage, validation_storage

    cfg = subject.cfg
    number = args.rows if args.rows is not None else cfg.train.eval_rows if cfg is not None else ROWS
    longest = min(SEQ_LEN, subject.positions or SEQ_LEN) if cfg is None else cfg.data.seq_len
    seq_len = args.seq_len or longest
    if args.data:
        for name, path in _named(args.data):
            yield Rows(name, place("--data", path, options), args.split, number, seq_len)
        return
    assert cfg is not None
    yield Rows(HELD_OUT, data_storage(cfg), args.split, number, seq_len)
    for name in cfg.data.validation:
        yield Rows(name, validation_storage(cfg, name), args.split, number, seq_len)


def _named(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`books=data/books,data/code` -> books and code, and their places."""
    seen: set[str] = set()
    for item in (part for text in given for part in text.split(",")):
        name, equals, path = item.partition("=")
        if not equals:
            name, path = os.path.basename(item.rstrip("/")), item
        if not path.strip() or not name.strip():
            raise ConfigError(f"--data {item!r} names no data. Give PATH or NAME=PATH, with commas between several.")
        if name in seen:
            raise ConfigError(f"--data has {name!r} twice. Give one of them a name: NAME=PATH.")
        seen.add(name)
        yield name, path


def _samples(args: argparse.Namespace, subject: Subject, out: Storage | None) -> None:
    if not args.generate:
        return
    from relora_ray.evaluation.samples import generate

    record, why_not = generate(
        subject,
        args.generate,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        device=args.device_used,
        out=out,
    )
    for sample in record["result"]["samples"]:
        end = " [end of text]" if sample["ended"] else ""
        print(f"--- {sample['num_tokens']} tokens, temperature {args.temperature:g}, seed {args.seed}")
        print(printable(f"{sample['prompt']}{sample['text']}{end}"))
    print("---", flush=True)
    _say_if_not_stored(why_not)


def _glue(args: argparse.Namespace, subject: Subject, out: Storage | None, options: dict[str, Any]) -> list[str]:
    """Returns what failed."""
    if not args.glue:
        return []
    from relora_ray.evaluation.fine_tuning import Job, Recipe
    from relora_ray.evaluation.glue import HUB, chosen_tasks

    tasks = chosen_tasks(args.glue)
    recipe = Recipe(
        learning_rate=args.learning_rate,
        epochs=args.epochs,
        batch_rows=args.batch_rows,
        max_tokens=args.max_tokens,
        max_train_rows=args.max_train_rows,
        max_dev_rows=args.max_dev_rows,
        precision=args.precision or "fp32",
    )
    data = args.glue_data if args.glue_data.startswith(HUB) else os.path.abspath(os.path.expanduser(args.glue_data))
    to = None if out is None else out.url
    # A run's folder is opened with the options that it was found with.
    jobs = [
        Job(subject.place.url, options, subject.step, to, options, data, task.name, seed, recipe, args.device)
        for task in tasks
        for seed in args.seed_list
    ]
    records: dict[str, list[Evaluation]] = {task.name: [] for task in tasks}
    failed = []
    for job, record, why in _done(jobs, subject, on_ray=args.ray):
        if record is None:
            failed.append(f"{job.task} with seed {job.seed}: {why}")
            print(f"  {job.task:<5} seed {job.seed}  failed: {printable(why)}", flush=True)
            continue
        records[job.task].append(record)
        print(f"  {job.task:<5} seed {job.seed}  {_scores(record)}, {record['seconds']:.0f} s", flush=True)
        _say_if_not_stored(why)
    _summary(records, recipe)
    return failed


def _done(jobs: Sequence[Job], subject: Subject, *, on_ray: bool) -> Iterator[tuple[Job, Evaluation | None, str]]:
    """Each job with its record and why it could not be stored, or no record and why not: first those of before."""
    from relora_ray.evaluation.fine_tuning import TASKS, do, done_before, read_task

    left = []
    data = {job.task: read_task(TASKS[job.task], job.data) for job in jobs}  # all are there and readable
    for job in jobs:
        if (known := done_before(job, subject, data[job.task])) is not None:
            yield job, known, ""
        else:
            left.append(job)
    if len(left) < len(jobs):
        print(f"  ({len(jobs) - len(left)} of {len(jobs)} were done before)")
    if on_ray and left:
        from relora_ray.runtime.evaluation import do_on_ray

        yield from do_on_ray(left)
        return
    for job in left:
        try:
            record, why = do(job, subject)
        except DivergedError as error:
            yield job, None, str(error)
        else:
            yield job, record, why


def _scores(record: Evaluation) -> str:
    from relora_ray.runs.evaluations import spread

    return ", ".join(f"{name} {spread([value])}" for name, value in record["result"]["scores"].items())


def _summary(records: dict[str, list[Evaluation]], recipe: Any) -> None:
    from statistics import fmean

    from relora_ray.runs.evaluations import glue_text, spread

    for task, found in records.items():
        if found:
            print(f"  {task:<5} {glue_text(found)}")
            for note in dict.fromkeys(note for record in found for note in _notes(record)):
                print(f"    note: {printable(note)}")
    scored = {task: [r["result"]["score"] for r in found] for task, found in records.items() if found}
    whole = [values for values in scored.values() if None not in values]
    if len(scored) > 1 and len(whole) == len(records):
        print(f"  average of {len(whole)} tasks {spread([fmean(values) for values in whole]).partition(' ')[0]}")
    if recipe.max_train_rows is not None or recipe.max_dev_rows is not None:
        print("  note: --max-train-rows or --max-dev-rows is given: these are no results of GLUE")


def _notes(record: Evaluation) -> Iterator[str]:
    result, most = record["result"], record["settings"]["max_tokens"]
    for which, count in result.get("cut", {}).items():
        if count:
            rows = result["train_rows"] if which == "train" else sum(result["dev_rows"].values())
            yield f"{count:,} of {rows:,} rows of {which} are longer than {most} tokens and are cut"
    for which, reasons in result.get("passed_over", {}).items():
        yield f"left out of {which}: " + ", ".join(f"{count:,} rows {reason}" for reason, count in reasons.items())
    if result.get("padding"):
        yield result["padding"]


def _harness(args: argparse.Namespace, subject: Subject, out: Storage | None) -> None:
    if not args.lm_eval:
        return
    from relora_ray.evaluation.harness import run_harness

    record, why_not = run_harness(
        subject,
        args.lm_eval,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        include_path=args.lm_eval_include,
        batch_rows=args.lm_eval_batch_rows,
        device=args.device_used,
        precision=args.precision or "fp32",
        out=out,
    )
    for name, value in record["result"]["scores"].items():
        if not name.endswith(" stderr"):
            error = record["result"]["scores"].get(f"{name} stderr")
            print(f"  {printable(name)} {value:.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    if args.limit is not None:
        print(f"  note: of the first {args.limit:,} examples of each task")
    _say_if_not_stored(why_not)


def _say_if_not_stored(why: str) -> None:
    if why:
        print(f"    note: this result could not be stored: {printable(why)}")


if __name__ == "__main__":
    sys.exit(main())
