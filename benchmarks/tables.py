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
PAGES = tuple(_ROOT / page for page in ("README.md", "benchmarks/README.md", "docs/kernels.md"))
_BLOCK = re.compile(
    r"(?P<open><!-- benchmarks: (?P<name>[\w ]+) -->\n).*?(?P<close><!-- benchmarks: end -->)",
    re.S,
)

FLOOR, PSCAN, HUGGING = "compute floor", "mambapy pscan", "transformers"
HUGGING_PSCAN, SCAN_SHARE = "transformers, use_mambapy", "scan's share of the step"
READING, PLAIN = "reading the weights", "without a draft"

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


def forks(cases: Cases) -> Table:
    """Show what forks of one state hold."""
    table: Table = [("case", "what", "memory", "")]
    table += [
        (name, what, f"{row.median:.3g} MB", row.note)
        for name, case in cases.items()
        for what, row in case.items()
    ]
    return table


def decode(cases: Cases) -> Table:
    """Show a token beside transformers and the time to read its weights once."""
    table: Table = [("case", "mambakit", "floor / mambakit", HUGGING, "mambakit / peer")]
    for name, case in cases.items():
        ours, peer, least = case["mambakit"], case.get(HUGGING), case[READING]
        reached = _rate(peer) if peer else "-"
        table.append((name, _rate(ours), _percent(least, ours), reached, _times(peer, ours)))
    return table


def rounding(cases: Cases) -> Table:
    """Show perplexities with weights of fewer bits."""
    table: Table = [("case", "weights", "perplexity", "/ that of fp32", "")]
    for name, case in cases.items():
        whole = case["fp32"].median
        for weights, row in case.items():
            ratio = f"{row.median / whole:.5f}"
            table.append((name, weights, f"{row.median:.4f}", ratio, row.note))
    return table


def speculative(cases: Cases) -> Table:
    """Show tokens a second by tokens proposed at a time."""
    table: Table = [("case", "draft", "mambakit", "without a draft / with it", "")]
    for name, case in cases.items():
        plain = case[PLAIN]
        for what, row in case.items():
            table.append((name, what, _rate(row), _times(plain, row), row.note))
    return table


def shakespeare(cases: Cases) -> Table:
    """Show what the character-level recipe reaches."""
    return _reached(cases)


def demo(cases: Cases) -> Table:
    """Show what the byte-level recipe reaches."""
    return _reached(cases)


def gpu_scan(cases: Cases) -> Table:
    """Show the scan on a GPU beside its floor and mamba_ssm, in time and in peak memory."""
    table: Table = [("case", "fused", "fused / floor", "mamba_ssm", "mamba_ssm / fused")]
    for name, case in cases.items():
        ours, peer, least = case["fused"], case.get("mamba_ssm"), case.get("floor")
        above = _times(ours, least) if least else "-"
        table.append((name, _quantity(ours), above, _quantity(peer), _times(peer, ours)))
    return table


def gpu_conv(cases: Cases) -> Table:
    """Show the convolution on a GPU beside its floor, the compiler's form and its peer."""
    peers = ("compiled shifts", "causal_conv1d")
    table: Table = [("case", "fused", "fused / floor", *peers, "best of them / fused")]
    for name, case in cases.items():
        best = min((case[k] for k in peers if k in case), key=lambda row: row.median)
        columns = [_quantity(case.get(k)) for k in peers]
        least = case.get("floor")
        above = _times(case["fused"], least) if least else "-"
        table.append(
            (name, _quantity(case["fused"]), above, *columns, _times(best, case["fused"]))
        )
    return table


def gpu_training_step(cases: Cases) -> Table:
    """Show tokens a second and peak memory, beside a Llama and mamba_ssm."""
    peers = ("Llama, compiled", "Llama, eager", "mamba_ssm")
    table: Table = [("case", "mambakit", *(k for p in peers for k in (p, "mambakit / it")))]
    for name, case in cases.items():
        line = [name, _quantity(case["mambakit"])]
        for peer in peers:
            # of times the peer's is above ours, of memory ours above the peer's
            pair = (case.get(peer), case["mambakit"])
            above, below = pair if case["mambakit"].tokens else pair[::-1]
            line += [_quantity(case.get(peer)), _times(above, below) if below else "-"]
        table.append(tuple(line))
    return table


def gpu_decode(cases: Cases) -> Table:
    """Show a new token's time beside its floor and its peers."""
    peers = ("Llama, compiled", "mamba_ssm")
    columns = (column for peer in peers for column in (peer, "it / mambakit"))
    table: Table = [("case", "mambakit", "step alone", "mambakit / floor", *columns)]
    for name, case in cases.items():
        ours, least = case["mambakit"], case.get("floor")
        line = [name, _quantity(ours), _quantity(case.get("mambakit, step alone"))]
        line.append(_times(ours, least) if least else "-")
        for peer in peers:
            line += [_quantity(case.get(peer)), _times(case.get(peer), ours)]
        table.append(tuple(line))
    return table


def gpu_figure8(cases: Cases) -> Table:
    """Show the scan beside attention."""
    peers = ("cuDNN attention", "flash attention")
    table: Table = [("case", "scan", *peers, "cuDNN attention / scan")]
    for name, case in cases.items():
        columns = [_quantity(case.get(k)) for k in ("scan", *peers)]
        table.append((name, *columns, _times(case.get(peers[0]), case["scan"])))
    return table


def gpu_million(cases: Cases) -> Table:
    """Show what a long sequence takes."""
    table: Table = [("case", "mambakit", "")]
    table += [
        (name, f"{row.median:.3g} {row.unit}", row.note)
        for name, case in cases.items()
        for row in case.values()
    ]
    return table


def gpu_first_call(cases: Cases) -> Table:
    """Show how long a process waits for its kernels."""
    return gpu_million(cases)


TABLES: dict[str, Callable[[Cases], Table]] = {
    table.__name__: table
    for table in (
        *(scan, conv, prefill, training_step, parity, memory, shakespeare, demo),
        *(decode, rounding, speculative, forks),
        *(gpu_scan, gpu_conv, gpu_training_step, gpu_decode, gpu_figure8, gpu_million),
        gpu_first_call,
    )
}


# What the page of the GPU kernels shows: layers of the published models, one long sequence, one
# short one, other states, float32.
_SHOWN_SCANS = (
    "(8, 2048, 2048, 16), bf16",
    "(1, 2048, 65536, 16), bf16",
    "(1, 2048, 2048, 16), bf16",
    "(8, 2048, 2048, 64), bf16",
    "(8, 2048, 2048, 1), bf16",
    "(8, 2048, 2048, 16), fp32",
)


def kernels_forward(cases: Cases) -> Table:
    """Show the forward scan beside its floor."""
    return _beside_floor(_shown(cases, "forward"), "fused")


def kernels_backward(cases: Cases) -> Table:
    """Show the scan with all gradients beside its floor, and its peak memory."""
    head, *lines = _beside_floor(_shown(cases, "forward + backward"), "fused")
    table = [(*head, "peak memory")]
    for name, *columns in lines:
        peak = cases.get(name.replace("forward + backward", "peak memory"), {})
        table.append((name, *columns, _quantity(peak.get("fused"))))
    return table


def kernels_conv(cases: Cases) -> Table:
    """Show the convolution beside its floor."""
    return _beside_floor(cases, "fused")


def kernels_token(cases: Cases) -> Table:
    """Show one token of a model beside its floor: the step by itself, in a CUDA graph."""
    return _beside_floor(cases, "mambakit, step alone")


# Tables of some of a benchmark's rows, by the benchmark.
EXCERPTS: dict[str, tuple[Callable[[Cases], Table], ...]] = {
    "gpu_scan": (kernels_forward, kernels_backward),
    "gpu_conv": (kernels_conv,),
    "gpu_decode": (kernels_token,),
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
        "gpu_scan": _gpu_scan_claims,
        "gpu_training_step": _gpu_step_claims,
        "gpu_decode": _gpu_decode_claims,
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


def _gpu_scan_claims(cases: Cases) -> Table:
    table: Table = []
    for name in ("forward", "forward + backward"):
        case = cases.get(f"{name}, (b, d, l, n) = (8, 2048, 2048, 16), bf16", {})
        if "fused" in case and "mamba_ssm" in case:
            ours, peer = case["fused"], case["mamba_ssm"]
            beside = f"mamba_ssm {_milliseconds(peer)}: {_times(peer, ours)}"
            table.append(
                (f"selective scan {name}, 8 x 2048 x 2048", _milliseconds(ours), beside)
            )
    return table


def _gpu_step_claims(cases: Cases) -> Table:
    return [
        (f"training, {name}", _quantity(case["mambakit"]), _beside(case))
        for name, case in cases.items()
        if "Llama, compiled" in case
    ]


def _gpu_decode_claims(cases: Cases) -> Table:
    return [
        (name if "prefill" in name else f"a token, {name}", _quantity(ours), _beside(case))
        for name, case in cases.items()
        for ours in [case["mambakit"]]
        if name.startswith("1.4B") and "Llama, compiled" in case
    ]


def _beside(case: dict[str, Row]) -> str:
    """Say what peers reach, and how many times ours; of memory, what part of theirs ours is."""
    ours, said = case["mambakit"], []
    for subject, name in (("Llama, compiled", "compiled Llama"), ("mamba_ssm", "mamba_ssm")):
        if subject in case:
            peer = case[subject]
            ratio = _times(ours, peer) if ours.unit == "GB" else _times(peer, ours)
            said.append(f"{name} {_quantity(peer)}: {ratio}")
    return "; ".join(said)


def render(results: Path) -> dict[str, str]:
    """Return each table's Markdown, over all devices that have rows for it."""
    blocks: dict[str, str] = {}
    for folder in sorted(results.glob("*/")):
        rows = {file.stem: read(file) for file in sorted(folder.glob("*.jsonl"))}
        cases = {name: _by_case(measured) for name, measured in rows.items()}
        for name in TABLES:
            if name in rows:
                blocks[name] = blocks.get(name, "") + text(name, rows[name])
        for name, tables in EXCERPTS.items():
            for table in tables:
                lines = table(cases.get(name, {}))
                if len(lines) > 1:
                    caption = _caption(rows[name])
                    shown = blocks.get(table.__name__, "")
                    blocks[table.__name__] = shown + caption + _markdown(lines)
        if cases:
            every = [row for measured in rows.values() for row in measured]
            caption = _caption(every, commit=False)
            blocks["summary"] = blocks.get("summary", "") + caption + _markdown(summary(cases))
    return blocks


def text(name: str, rows: list[Row]) -> str:
    """Return one benchmark's rows on one device as Markdown, and what they were measured on."""
    return _caption(rows) + _markdown(TABLES[name](_by_case(rows)))


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


def _caption(rows: list[Row], *, commit: bool = True) -> str:
    """Say on what the rows were measured; where they differ, say each value.

    A summary is of many commits, which nobody can read in a row: the page says where they are.
    """

    def values(key: str) -> str:
        return " and ".join(sorted({str(row.machine[key]) for row in rows}))

    when = f"commit {values('commit')}, {values('date')}" if commit else values("date")
    if all("multiprocessors" in row.machine for row in rows):
        return (
            f"{values('device')}; torch {values('torch')}, CUDA {values('cuda')}, "
            f"transformers {values('transformers')}; {when}.\n\n"
        )
    kernels = " and ".join(sorted({row.machine["isa"]["mambakit"] for row in rows}))
    has_bf16 = all(row.machine["isa"]["bf16_instructions"] for row in rows)
    return (
        f"{values('device')}, {values('threads')} threads, kernels {kernels}, "
        f"{'with' if has_bf16 else 'no'} bf16 instructions; torch {values('torch')}, "
        f"transformers {values('transformers')}, mambapy {values('mambapy')}; {when}.\n\n"
    )


def _markdown(table: Table) -> str:
    head, *lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([head, "|---" * len(table[0]) + "|", *lines]) + "\n\n"


def _shown(cases: Cases, what: str) -> Cases:
    names = [f"{what}, (b, d, l, n) = {shape}" for shape in _SHOWN_SCANS]
    return {name: cases[name] for name in names if name in cases}


def _beside_floor(cases: Cases, subject: str) -> Table:
    """Show the times of one subject beside those that nothing could go below."""
    table: Table = [("case", "time", "floor", "time / floor")]
    for name, case in cases.items():
        if subject in case:
            ours, least = case[subject], case.get("floor")
            bound = f", {least.note}" if least and least.note else ""
            floor = f"{_quantity(least)}{bound}"
            table.append((name, _quantity(ours), floor, _times(ours, least) if least else "-"))
    return table


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


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _quantity(row: Row | None) -> str:
    if row is None:
        return "-"
    return _rate(row) if row.tokens else f"{_short(row.median)} {row.unit}"


def _milliseconds(row: Row | None) -> str:
    return f"{_short(row.median)} ms" if row else "-"


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
            print(f"{page.relative_to(_ROOT)}: its tables are those of the rows now")
    if options.check and stale:
        sys.exit("the tables are older than the rows: run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
