"""``python -m benchmarks.tables``: print the committed rows as Markdown, into the pages.

A page holds pairs of comments, ``<!-- benchmarks: NAME -->`` and ``<!-- benchmarks: end -->``;
what stands between them is replaced by the table NAME. ``--check`` changes nothing and exits
with 1 if a page is out of date.
"""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .rows import RESULTS, Row, read
from .timing import paired_ratio

_ROOT = Path(__file__).parent.parent
PAGES = (_ROOT / "README.md", _ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(
    r"(?P<open><!-- benchmarks: (?P<name>[\w ]+) -->\n).*?(?P<close><!-- benchmarks: end -->)",
    re.S,
)

FLOOR, PSCAN, HUGGING = "compute floor", "mambapy pscan", "transformers"
HUGGING_PSCAN, SCAN_SHARE = "transformers, use_mambapy", "scan's share of the step"

Case = dict[str, Row]
Cases = dict[str, Case]
Table = list[tuple[str, ...]]


def scan(cases: Cases) -> Table:
    """Show the scan in milliseconds, beside its floor and its peer."""
    table: Table = [
        (
            "case",
            "fused",
            "floor / fused",
            "parallel",
            "pscan",
            "pscan / fused",
            "pscan / parallel",
        )
    ]
    for name, case in cases.items():
        peer = case.get(PSCAN)
        table.append(
            (
                name,
                _milliseconds(case["fused"]),
                _percent(case[FLOOR], case["fused"]),
                _milliseconds(case["parallel"]),
                _milliseconds(peer),
                _times(peer, case["fused"]),
                _times(peer, case["parallel"]),
            )
        )
    return table


def conv(cases: Cases) -> Table:
    """Show the convolution in milliseconds, beside PyTorch's forms of it."""
    peers = ("compiled shifts", "compiled conv1d", "eager shifts", "eager conv1d")
    table: Table = [("case", "fused", *peers, "best of them / fused")]
    for name, case in cases.items():
        best = min((case[peer] for peer in peers), key=lambda row: row.median)
        columns = [_milliseconds(case[k]) for k in ("fused", *peers)]
        table.append((name, *columns, _times(best, case["fused"])))
    return table


def prefill(cases: Cases) -> Table:
    """Show tokens a second, beside transformers."""
    return _rates(cases, HUGGING)


def training_step(cases: Cases) -> Table:
    """Show tokens a second, beside transformers with mamba.py's scan, and the scan's share."""
    table = _rates(cases, HUGGING_PSCAN)
    shares = [f"{case[SCAN_SHARE].median:.1f} %" for case in cases.values()]
    return [(*line, last) for line, last in zip(table, ("scan's share", *shares), strict=True)]


def parity(cases: Cases) -> Table:
    """Show the largest difference of each kind."""
    table: Table = [("case", "what", "largest relative difference", "")]
    for name, case in cases.items():
        table += [(name, what, f"{row.median:.1e}", row.note) for what, row in case.items()]
    return table


def memory(cases: Cases) -> Table:
    """Show peaks above what the model, its gradients and the optimizer hold."""
    table: Table = [("case", "peak", "")]
    table += [
        (name, f"{row.median:.2f} GB", row.note)
        for name, case in cases.items()
        for row in case.values()
    ]
    return table


def shakespeare(cases: Cases) -> Table:
    """Show what the character-level recipe reaches."""
    return _reached(cases)


def demo(cases: Cases) -> Table:
    """Show what the byte-level recipe reaches."""
    return _reached(cases)


TABLES: dict[str, Callable[[Cases], Table]] = {
    table.__name__: table
    for table in (scan, conv, prefill, training_step, parity, memory, shakespeare, demo)
}


def summary(results: dict[str, Cases]) -> Table:
    """Show one line for each claim of the front page that this device has rows for."""
    claims: dict[str, Callable[[Cases], Table]] = {
        "scan": _scan_claims,
        "prefill": lambda cases: _rate_claims("prefill", cases, HUGGING),
        "training_step": lambda cases: _rate_claims("training step", cases, HUGGING_PSCAN),
        "parity": _parity_claims,
        "memory": _memory_claims,
        "shakespeare": _recipe_claims,
        "demo": _recipe_claims,
    }
    present = (of(results[name]) for name, of in claims.items() if name in results)
    return [("what", "mambakit", "beside it"), *itertools.chain.from_iterable(present)]


def _scan_claims(cases: Cases) -> Table:
    table: Table = []
    for name in ("forward", "forward + backward"):
        shape = f"{name}, (b, d, l, n) = (1, 1536, 2048, 16), fp32"
        ours, floor, peer = (cases[shape][k] for k in ("fused", FLOOR, PSCAN))
        reached = f"{_milliseconds(ours)}, {_percent(floor, ours)} of the compute floor"
        beside = f"mamba.py's pscan {_milliseconds(peer)}: {_times(peer, ours)}"
        table.append((f"selective scan {shape}", reached, beside))
    return table


def _rate_claims(what: str, cases: Cases, peer: str) -> Table:
    table: Table = []
    for name, case in cases.items():
        ours, theirs = case["mambakit"], case[peer]
        beside = f"{peer} {_rate(theirs)}: {_times(theirs, ours)}"
        table.append((f"{what}, {name}", _rate(ours), beside))
    return table


def _parity_claims(cases: Cases) -> Table:
    table: Table = []
    for name, case in cases.items():
        worst = max(row.median for row in case.values())
        what = f"logits, loss and every gradient, {name}"
        table.append((what, f"within {worst:.0e}", "transformers with the same weights"))
    return table


def _memory_claims(cases: Cases) -> Table:
    (first, low), *_, (last, high) = cases.items()
    peaks = [f"{case['mambakit'].median:.2f} GB" for case in (low, high)]
    return [(f"peak memory, {last}", peaks[1], f"{first}: {peaks[0]}")]


def _recipe_claims(cases: Cases) -> Table:
    return [
        (f"{name}, {what}", f"{_number(row.median)} {row.unit}", row.note)
        for name, case in cases.items()
        for what, row in case.items()
    ]


def render(results: Path) -> dict[str, str]:
    """Return each table's Markdown, over all devices that have rows."""
    blocks: dict[str, str] = {}
    for folder in sorted(results.glob("*/")):
        rows = {file.stem: read(file) for file in sorted(folder.glob("*.jsonl"))}
        cases = {name: _by_case(measured) for name, measured in rows.items()}
        for name, table in TABLES.items():
            if name in cases:
                caption = _caption(rows[name])
                blocks[name] = blocks.get(name, "") + caption + _markdown(table(cases[name]))
        if cases:
            caption = _caption([row for measured in rows.values() for row in measured])
            blocks["summary"] = blocks.get("summary", "") + caption + _markdown(summary(cases))
    return blocks


def fill(page: str, blocks: dict[str, str]) -> str:
    """Return the text of a page with its tables replaced."""
    return _BLOCK.sub(
        lambda match: match["open"] + blocks.get(match["name"], "") + match["close"], page
    )


def _by_case(rows: Iterable[Row]) -> Cases:
    cases: Cases = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.subject] = row
    return cases


def _caption(rows: list[Row]) -> str:
    """Say on what the rows were measured; where they differ, say each value."""

    def values(key: str) -> str:
        return " and ".join(sorted({str(row.machine[key]) for row in rows}))

    kernels = " and ".join(sorted({row.machine["isa"]["mambakit"] for row in rows}))
    kept = any(row.machine.get("freed_memory_kept") for row in rows)
    has_bf16 = all(row.machine["isa"]["bf16_instructions"] for row in rows)
    return (
        f"{values('device')}, {values('threads')} threads, kernels {kernels}, "
        f"{'with' if has_bf16 else 'no'} bf16 instructions"
        f"{', freed memory kept' if kept else ''}; torch {values('torch')}, "
        f"transformers {values('transformers')}, mambapy {values('mambapy')}; "
        f"commit {values('commit')}, {values('date')}.\n\n"
    )


def _markdown(table: Table) -> str:
    head, *lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([head, "|---" * len(table[0]) + "|", *lines]) + "\n\n"


def _reached(cases: Cases) -> Table:
    table: Table = [("recipe", "what", "reached", "")]
    table += [
        (name, what, f"{_number(row.median)} {row.unit}", row.note)
        for name, case in cases.items()
        for what, row in case.items()
    ]
    return table


def _rates(cases: Cases, peer: str) -> Table:
    table: Table = [("case", "mambakit", peer, "mambakit / peer")]
    for name, case in cases.items():
        ours, theirs = case["mambakit"], case[peer]
        table.append((name, _rate(ours), _rate(theirs), _times(theirs, ours)))
    return table


def _rate(row: Row) -> str:
    if row.tokens is None:
        raise ValueError(f"tables: row must have tokens, got none in {row.case!r}")
    return f"{_number(row.tokens / row.median)} tokens/s"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _milliseconds(row: Row | None) -> str:
    return f"{row.median:.3g} ms" if row else "-"


def _times(above: Row | None, below: Row) -> str:
    return f"{paired_ratio(above.samples, below.samples):.3g}x" if above else "-"


def _percent(above: Row, below: Row) -> str:
    return f"{100 * paired_ratio(above.samples, below.samples):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    options = parser.parse_args()
    blocks = render(options.results)
    stale = False
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = fill(old, blocks)
        stale |= new != old
        if new != old and not options.check:
            temporary = page.with_name(page.name + ".partial")
            temporary.write_text(new, encoding="utf-8")
            os.replace(temporary, page)
    if options.check and stale:
        sys.exit("the tables are older than the rows: run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
