"""Documents of any source, in order; records that are none are counted, or end the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from relora_ray.data.formats import Beside, Item, Problem, Rules, TextRead, read_items, text_of
from relora_ray.data.kinds import FILE_FORMATS
from relora_ray.data.sources import Source
from relora_ray.errors import DataError, ReloraError
from relora_ray.masking import masked

FORMATS = (*FILE_FORMATS, "saved", "hub")
_NUM_SHOWN = 5


@dataclass
class Reading:
    """What became of the records that were read."""

    skip_bad: int = 0
    """So many may be passed over."""
    num_bad: int = 0
    first_bad: list[Problem] = field(default_factory=list)
    num_empty: int = 0
    """Records without text, or with spaces only."""
    without_documents: list[str] = field(default_factory=list)
    """Sources that have none."""
    left_out: list[str] = field(default_factory=list)
    """Files in archives that are no documents: hidden, markers, checksums."""
    num_texts: int = 0
    """Files of plain text, ..."""
    num_separators: int = 0
    """... and lines in them that stand between documents."""

    def pass_over(self, problem: Problem) -> None:
        """DataError if it is one too many."""
        self.num_bad += 1
        if len(self.first_bad) < _NUM_SHOWN:
            self.first_bad.append(problem)
        if self.num_bad <= self.skip_bad:
            return
        what = f"{problem.where} {problem.reason}"
        if not self.skip_bad:
            raise DataError(f"{what} --skip-bad N passes over up to N such records.")
        before = " ".join(f"{p.where} {p.reason}" for p in self.first_bad[:-1])
        raise DataError(
            f"{what} It is bad record number {self.num_bad:,}, and --skip-bad={self.skip_bad} lets fewer pass. The "
            f"first: {before}"
        )


def read_documents(sources: Sequence[Source], rules: Rules, reading: Reading, *, split: str = "train") -> Iterator[str]:
    """The documents of all sources, in order; empty ones are left out. `split`: of a dataset. DataError."""
    for source in sources:
        num_documents = 0
        for item in _items(source, rules, split):
            if isinstance(item, Problem):
                reading.pass_over(item)
            elif isinstance(item, Beside):
                reading.left_out.append(item.name)
            elif isinstance(item, TextRead):
                reading.num_texts += 1
                reading.num_separators += item.num_separators
            elif item.strip():
                num_documents += 1
                yield item
            else:
                reading.num_empty += 1
        if not num_documents:
            reading.without_documents.append(source.label)


def _items(source: Source, rules: Rules, split: str) -> Iterator[Item]:
    if source.kind != "file":
        yield from _dataset(source, rules, split)
        return
    stream = source.open()
    try:
        yield from read_items(stream, source.label, rules)
    except Exception as error:
        if isinstance(error, ReloraError) or "://" not in source.name:
            raise
        # Every file system has errors of its own.
        raise DataError(f"{source.label}: cannot be read: {masked(f'{type(error).__name__}: {error}')}.") from None
    finally:
        stream.close()


def _dataset(source: Source, rules: Rules, split: str) -> Iterator[Item]:
    import datasets

    if source.kind == "saved":
        try:
            data = datasets.load_from_disk(source.name, storage_options=dict(source.options) or None)
        except Exception as error:  # the library raises many kinds
            raise DataError(f"{source.label}: cannot be read as a saved dataset: {masked(str(error))}") from error
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(f"{source.label} has no split {split!r}, only {', '.join(data)}. Set --split.")
            data = data[split]
    else:
        name, _, config = source.name.partition(":")
        try:
            data = datasets.load_dataset(name, config or None, split=split, streaming=True)
        except Exception as error:  # from offline to no such split
            raise DataError(f"hub dataset {source.label!r}, split {split!r}: {error}") from error
    try:
        for number, record in enumerate(data, 1):
            yield text_of(record, rules.text_field, f"{source.label}, record {number}")
    except ReloraError:
        raise
    except Exception as error:
        raise DataError(f"{source.label}: cannot be read: {masked(str(error))}") from error
