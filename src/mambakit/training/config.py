"""What a training run is: tables of a TOML file as frozen dataclasses."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite
import tomli_w

from mambakit._files import read_text
from mambakit.models import MambaConfig

# The vocabulary belongs to the tokenizer, which is read later than the config. Until then
# the model's own rules are checked with this size.
_ANY_VOCABULARY = 8


# What TOML, NumPy and torch all take.
_SEEDS = 2**63


def _require(rule: bool, name: str, must: str, value: object) -> None:
    if not rule:
        raise ValueError(f"config: {name} must {must}, got {value!r}")


def _require_finite(table: str, config: Any) -> None:
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            finite = not isinstance(number, float) or math.isfinite(number)
            _require(finite, f"{table}.{entry.name}", "be finite", value)


def _require_seed(name: str, seed: int) -> None:
    _require(0 <= seed < _SEEDS, name, "be at least 0 and below 2**63", seed)


@dataclass(frozen=True)
class DataConfig:
    """Table ``[data]``: the text and its parts.

    Attributes:
        source: ``"files"``, or ``"python-stdlib"``: the running Python's own sources.
        files: Files, folders or globs; a relative path is below the current folder.
        patterns: Which files of a folder count.
        split: ``"position"`` cuts the text into a first, a middle and a last part;
            ``"file"`` sends whole files to a part by a hash of their name.
        validation: Share of the text for validation.
        test: Share of the text for the test; 0 for none.
        separator: Text that follows every document, such as ``"<|endoftext|>"``.
        cache: Folder of token shards, to share them among runs. Absent: in the run folder.
    """

    source: Literal["files", "python-stdlib"] = "files"
    files: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ("*.txt",)
    split: Literal["position", "file"] = "position"
    validation: float = 0.05
    test: float = 0.05
    separator: str = ""
    cache: str | None = None

    def __post_init__(self) -> None:
        _require_finite("data", self)
        shares = (self.validation, self.test)
        _require(
            min(shares) >= 0 and sum(shares) < 1,
            "data.validation and data.test",
            "be at least 0 and below 1 together",
            shares,
        )
        if self.source == "files":
            _require(bool(self.files), "data.files", "name at least one file", self.files)
        else:
            _require(
                not self.files, "data.files", f"be absent with source {self.source}", self.files
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """Table ``[tokenizer]``.

    Attributes:
        kind: ``"byte"``, ``"character"`` (the alphabet is that of the text), or the path of
            a ``tokenizers`` JSON file.
    """

    kind: str = "byte"

    def __post_init__(self) -> None:
        _require(bool(self.kind), "tokenizer.kind", "be byte, character or a path", self.kind)


@dataclass(frozen=True)
class TrainingConfig:
    """Table ``[training]``: batches, optimiser, schedule, and what is written when.

    The defaults are the published language-model recipe: AdamW, betas 0.9 and 0.95, weight
    decay 0.1, clipping at 1, warm-up over a tenth of the run, then a cosine.

    Attributes:
        steps: Updates of the weights. Exactly one of ``steps`` and ``minutes`` is given.
        minutes: About how long to train, validation included: a few updates are timed on
            this machine, and the run is then one of a fixed number of steps, which is
            written to the run folder.
        batches: ``"packed"`` draws windows at random; ``"continuing"`` reads streams and
            carries the state (truncated backpropagation through time).
        reset_at_documents: Whether each document is read from no state, as if it were alone,
            and scored so too. Its first token is then no target, for nothing foretells it.
        batch_size: Rows in a batch.
        length: Tokens in a row.
        accumulate: Batches whose gradients are averaged for one update.
        chunk: Tokens of a row that are in memory at once; it divides ``length``. Absent: all.
            Loss and gradients are those of whole rows all the same: the states between chunks
            are computed first, then each chunk with its gradients, from the last one back. It
            takes a third more time, and room for one chunk whatever the length.
        learning_rate: The peak of the schedule.
        final_learning_rate: Where the cosine ends.
        warmup: Share of the steps over which the rate rises from 0 to its peak.
        weight_decay: For weight matrices; ``A_log``, ``D``, biases and norms have none.
        decay_embedding: Whether the embedding decays too. The published recipe: no.
        betas: Decay rates of AdamW's two moments.
        eps: AdamW's term against division by zero.
        clip: Largest norm of all gradients together; 0 for no limit.
        precision: ``"fp32"``; ``"bf16"``: autocast, with weights and state in fp32;
            ``"auto"``: bf16 where the device computes it in hardware, else fp32.
        device: ``"auto"`` (CUDA if there is one, else CPU), or a PyTorch device.
        compile: Whether ``torch.compile`` compiles the model's blocks. Absent: on CUDA, if
            Triton and the C compiler that it needs are there.
        seed: Fixes the initial weights and the order of the batches.
        evaluate_every: Steps between validations, each of which saves a checkpoint. Absent:
            a tenth of the run.
        evaluate_tokens: How many tokens of the validation text to score each time, the same
            ones, spread over it; 0 for all.
        checkpoint_every: Steps between further checkpoints; 0 for none.
        log_every: Steps between lines of ``metrics.jsonl``.
    """

    steps: int | None = None
    minutes: float | None = None
    batches: Literal["packed", "continuing"] = "packed"
    reset_at_documents: bool = False
    batch_size: int = 8
    length: int = 512
    accumulate: int = 1
    chunk: int | None = None
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-5
    warmup: float = 0.1
    weight_decay: float = 0.1
    decay_embedding: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    compile: bool | None = None
    seed: int = 0
    evaluate_every: int | None = None
    evaluate_tokens: int = 65536
    checkpoint_every: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        _require_finite("training", self)
        given = (self.steps, self.minutes)
        _require(
            given.count(None) == 1,
            "training",
            "give one of steps and minutes",
            f"steps {self.steps}, minutes {self.minutes}",
        )
        for name in (
            "steps",
            "batch_size",
            "length",
            "accumulate",
            "chunk",
            "evaluate_every",
            "log_every",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"training.{name}", "be at least 1", value)
        _require(
            self.chunk is None or self.length % self.chunk == 0,
            "training.chunk",
            f"divide training.length {self.length}",
            self.chunk,
        )
        for name in (
            "learning_rate",
            "final_learning_rate",
            "weight_decay",
            "clip",
            "evaluate_tokens",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            _require(value >= 0, f"training.{name}", "be at least 0", value)
        _require_seed("training.seed", self.seed)
        _require(
            self.minutes is None or self.minutes > 0,
            "training.minutes",
            "be above 0",
            self.minutes,
        )
        _require(
            self.final_learning_rate <= self.learning_rate,
            "training.final_learning_rate",
            f"be at most learning_rate {self.learning_rate}",
            self.final_learning_rate,
        )
        _require(0 <= self.warmup <= 1, "training.warmup", "lie in 0 to 1", self.warmup)
        _require(self.eps > 0, "training.eps", "be above 0", self.eps)
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            "training.betas",
            "lie in 0 to 1",
            self.betas,
        )


@dataclass(frozen=True)
class ReportConfig:
    """Table ``[report]``: the sample that closes a run.

    Attributes:
        prompt: What the sample continues.
        tokens: Length of the sample; 0 for none.
        temperature: See ``mambakit.generation.generate``.
        top_p: See there; 1 for no limit.
        seed: Fixes the sample.
    """

    prompt: str = "\n"
    tokens: int = 400
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        _require_finite("report", self)
        _require(bool(self.prompt), "report.prompt", "not be empty", self.prompt)
        for name in ("tokens", "temperature"):
            value = getattr(self, name)
            _require(value >= 0, f"report.{name}", "be at least 0", value)
        _require_seed("report.seed", self.seed)
        _require(0 < self.top_p <= 1, "report.top_p", "be above 0 and at most 1", self.top_p)


@dataclass(frozen=True)
class RunConfig:
    """A whole run: one attribute for each table of the TOML file.

    Attributes:
        data: The text.
        tokenizer: How it becomes tokens.
        model: The arguments of ``MambaConfig`` that are given; ``vocab_size`` is the
            tokenizer's unless it is among them.
        training: How to train.
        report: What to show at the end.
    """

    data: DataConfig
    training: TrainingConfig
    model: Mapping[str, Any]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        self.model_config(self.model.get("vocab_size", _ANY_VOCABULARY))

    def model_config(self, vocab_size: int) -> MambaConfig:
        """Complete ``[model]`` with the tokenizer's ``vocab_size``.

        Raises:
            ValueError: An argument is unknown or wrong, or ``[model]`` itself gives a smaller
                ``vocab_size``.
        """
        given = self.model.get("vocab_size", vocab_size)
        _require(
            given >= vocab_size,
            "model.vocab_size",
            f"be at least {vocab_size}, the tokenizer's",
            given,
        )
        return _build(MambaConfig, {**self.model, "vocab_size": given}, "model")


_TABLES: dict[str, type] = {
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "model": MambaConfig,
    "training": TrainingConfig,
    "report": ReportConfig,
}


def _number(value: Any) -> Any:
    # 1 is a fine float in TOML, as it is in Python
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        raise dacite.WrongTypeError(int, value)
    return value


def _strings(value: Any) -> Any:
    return (
        (value,)
        if isinstance(value, str)
        else tuple(value)
        if isinstance(value, list)
        else value
    )


def _pair(value: Any) -> Any:
    return tuple(map(_number, value)) if isinstance(value, list) else value


_HOOKS: dict[Any, Any] = {
    float: _number,
    int: _integer,
    tuple[str, ...]: _strings,
    tuple[float, float]: _pair,
}


def _say_type(kind: Any) -> str:
    """Name a field's type as a reader of TOML would."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_say_type(k) for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return "a list of strings" if str in typing.get_args(kind) else "a list of two numbers"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, str(kind))


def _check_keys(keys: Sequence[str], known: Sequence[str], what: str, prefix: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f": {', '.join(known)}"
            raise ValueError(f"config: {what} must exist, got {prefix}{key}{hint}")


def _build(kind: type, values: Mapping[str, Any], table: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check_keys(list(values), list(fields), "a key", f"{table}.")
    try:
        return dacite.from_dict(
            kind, dict(values), dacite.Config(strict=True, type_hooks=_HOOKS)
        )
    except dacite.MissingValueError as error:
        raise ValueError(
            f"config: {table}.{error.field_path} must be given, got nothing"
        ) from error
    except dacite.WrongTypeError as error:
        name = str(error.field_path or _first_boolean(values, fields))
        raise ValueError(
            f"config: {table}.{name} must be {_say_type(fields[name].type)}, "
            f"got {values[name]!r}"
        ) from error


def _first_boolean(values: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    # dacite does not tell which field a hook refused, and ours refuses only booleans
    return next(
        name for name, value in values.items()
        if isinstance(value, bool) and fields[name].type not in (bool, bool | None)
    )  # fmt: skip


def parse_config(tables: Mapping[str, Any]) -> RunConfig:
    """Check the tables of a run and make a ``RunConfig`` of them.

    Raises:
        ValueError: A table or key is unknown (the nearest one is named), a value has the
            wrong type or breaks a rule, or a table that is needed is missing.

    Example:
        >>> config = parse_config({
        ...     "data": {"source": "python-stdlib", "split": "file"},
        ...     "model": {"d_model": 64, "n_layer": 2},
        ...     "training": {"steps": 100, "learning_rate": 1e-3},
        ... })
        >>> config.training.betas
        (0.9, 0.95)
        >>> parse_config({"data": {"fils": "a.txt"}, "model": {}, "training": {}})
        Traceback (most recent call last):
        ...
        ValueError: config: a key must exist, got data.fils; did you mean data.files?
    """
    _check_keys(list(tables), list(_TABLES), "a table", "")
    for name, table in tables.items():
        _require(isinstance(table, Mapping), name, "be a table", table)
    for name in ("data", "model", "training"):
        _require(name in tables, f"the table [{name}]", "be given", "nothing")
    built = {
        name: _build(kind, tables[name], name)
        for name, kind in _TABLES.items()
        if name in tables and name != "model"
    }
    return RunConfig(model=dict(tables["model"]), **built)


def _override(tables: dict[str, Any], assignment: str) -> None:
    name, equals, text = assignment.partition("=")
    table, dot, key = name.strip().partition(".")
    _require(bool(equals and dot and key), "an override", "read table.key=value", assignment)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word or path is a string, as a shell user expects
    tables.setdefault(table, {})
    _require(isinstance(tables[table], dict), table, "be a table", tables[table])
    tables[table][key] = value


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a TOML file.

    Args:
        path: The file.
        overrides: Assignments ``"table.key=value"`` that win over the file. The value is
            read as TOML, or as a string if it is not TOML.

    Raises:
        ValueError: The file is missing or is not TOML, or see ``parse_config``.
    """
    text = read_text(path, "config")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {path} must be TOML, got {error}") from error
    for assignment in overrides:
        _override(tables, assignment)
    # of two ways to say how long to train, the one on the command line wins
    stated = {a.partition("=")[0].strip() for a in overrides}
    for one, other in (("steps", "minutes"), ("minutes", "steps")):
        if f"training.{one}" in stated and f"training.{other}" not in stated:
            tables["training"].pop(other, None)
    return parse_config(tables)


def config_tables(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Turn a run into tables from which ``parse_config`` makes an equal one."""
    tables = {}
    for name in _TABLES:
        part = getattr(config, name)
        values = dict(part) if isinstance(part, Mapping) else dataclasses.asdict(part)
        # TOML has no null: an absent key is how it says None
        tables[name] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None
        }
    return tables


def dump_config(config: RunConfig) -> str:
    """Write a run as TOML that ``load_config`` reads back to an equal one."""
    return tomli_w.dumps(config_tables(config))
