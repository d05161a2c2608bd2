"""One measurement is one row; rows of a benchmark on a device are one JSON Lines file."""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclasses.dataclass(frozen=True)
class Check:
    """A number that must stay below a limit for its row to count, such as an error."""

    what: str
    value: float
    limit: float

    def __post_init__(self) -> None:
        if not self.value <= self.limit:
            raise RuntimeError(
                f"benchmarks: {self.what} must be at most {self.limit:.3g}, "
                f"got {self.value:.3g}"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """What one implementation reached in one case.

    Rows of the same benchmark and case were measured in turn in one process: their samples of
    the same index are pairs. ``samples`` are in ``unit``; ``tokens`` turns seconds for a call
    into a rate.
    """

    benchmark: str
    case: str
    subject: str
    unit: str
    samples: list[float]
    tokens: int | None = None
    check: Check | None = None
    note: str = ""
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        """Return the median of the samples."""
        return statistics.median(self.samples)

    def text(self) -> str:
        """Return the row as a line to read."""
        low, high = min(self.samples), max(self.samples)
        spread = f" [{low:.4g} .. {high:.4g}]" if len(self.samples) > 1 else ""
        rate = f" = {self.tokens / self.median:.4g} tokens/s" if self.tokens else ""
        checked = f"  (checked: {self.check.value:.2g})" if self.check else ""
        value = f"{self.median:.4g} {self.unit}{spread}"
        return f"{self.case:<58} {self.subject:<22} {value}{rate}{checked} {self.note}".rstrip()


def write(rows: Iterable[Row], file: Path) -> None:
    """Replace ``file`` by these rows, all of them or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".partial")
    with temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            fields = dataclasses.asdict(row) | {
                "samples": [float(f"{sample:.5g}") for sample in row.samples]
            }
            stream.write(json.dumps(fields) + "\n")
    os.replace(temporary, file)


def merge(file: Path, measured: Iterable[Row]) -> list[Row]:
    """Return the rows of ``file``, if there is one, with those measured in their places.

    A case is replaced as a whole, for its rows belong to one process; a new one comes last.
    """
    cases: dict[str, list[Row]] = {}
    fresh: dict[str, list[Row]] = {}
    for row in read(file) if file.exists() else ():
        cases.setdefault(row.case, []).append(row)
    for row in measured:
        fresh.setdefault(row.case, []).append(row)
    return [row for case in (cases | fresh).values() for row in case]


def read(file: Path) -> list[Row]:
    """Return the rows of ``file``."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        check = Check(**fields["check"]) if fields["check"] else None
        rows.append(Row(**(fields | {"check": check})))
    return rows
