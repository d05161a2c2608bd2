"""The training loop: batches in, a better model and a run folder out."""

import math
import shlex
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mambakit.data import (
    Batches,
    ContinuingBatches,
    PackedBatches,
    Shard,
    load_tokenizer,
)
from mambakit.data.text import expand
from mambakit.evaluation import LanguageScore, evaluate_tokens
from mambakit.models import MambaLM, ModelState
from mambakit.ops import _backends, _native

from .compilation import Compilation, compile_blocks, resolve_compilation
from .config import RunConfig, TrainingConfig, config_tables, load_config
from .corpus import Corpus, prepare_corpus
from .gradient import add_gradients
from .interrupts import Interrupted, Interrupts
from .memory import keep_freed_memory, refuse_too_large
from .optimizer import make_optimizer
from .plot import plot_loss, why_no_plot
from .precision import Machine, resolve_machine
from .progress import Progress, count, format_seconds
from .report import check_prompt
from .resume import (
    RunState,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    load_checkpoint_model,
    save_checkpoint,
)
from .run_folder import CONFIG, PLOT, TOKENIZER, Metrics, new_run_folder, tidy, write_start
from .schedule import learning_rate

Say = Callable[[str], None]

_VALIDATIONS = 10  # over a run that does not say how often
# The text that is scored is cut into this many rows, unless they were shorter than the other.
_VALIDATION_ROWS, _SHORTEST_ROW = 8, 1024
_PLOT_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        folder: The run folder.
        steps: Updates made.
        best_step: The step of the best validation; 0 if there was none.
        best_loss: Its loss in nats for each token; infinity if there was none.
        seconds: Time spent on training, by all processes of the run together.
    """

    folder: Path
    steps: int
    best_step: int
    best_loss: float
    seconds: float


class Learner:
    """A model with its optimiser and batches, and the one step that they make together.

    Attributes:
        model: The language model.
        optimizer: AdamW over its parameters.
        batches: Where the text comes from.
        state: What the last batch left in the model, for batches that continue.
        compilation: Whether its blocks are compiled.
    """

    def __init__(
        self, model: MambaLM, batches: Batches, training: TrainingConfig, machine: Machine
    ) -> None:
        self.model, self.batches = model, batches
        self.state: ModelState | None = None
        self.optimizer = make_optimizer(model, training)
        self.compilation = resolve_compilation(training.compile, machine.device)
        if self.compilation.on:
            compile_blocks(model)
        self._parameters = list(model.parameters())
        self._training, self._machine = training, machine

    def autocast(self) -> AbstractContextManager:
        """Give the context of the run's precision."""
        dtype = self._machine.autocast
        return torch.autocast(self._machine.device.type, dtype=dtype, enabled=dtype is not None)

    def uncompiled(self) -> AbstractContextManager:
        """Give a context in which the blocks run as they are written.

        What is compiled is for a step's shapes and its gradients; validation has others.
        """
        return (
            torch.compiler.set_stance("force_eager") if self.compilation.on else nullcontext()
        )

    @refuse_too_large(
        "a step of training (a smaller model, training.batch_size or training.length may help)"
    )
    def step(self, rate: float) -> Tensor:
        """Make one update, and give its loss and gradient norm ``(2,)`` on the device.

        Nothing here waits for the device: the caller reads the numbers when it needs them.
        """
        training, device = self._training, self._machine.device
        batches = [self.batches.next() for _ in range(training.accumulate)]
        wanted = [int((batch.targets >= 0).sum()) for batch in batches]
        losses = []
        for batch, wanted_here in zip(batches, wanted, strict=True):
            # of all targets, so that the mean is over them and not over batches
            share = wanted_here / max(1, sum(wanted))
            inputs, targets = batch.inputs, batch.targets
            if device.type == "cuda":
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
            inputs = inputs.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            loss, state = add_gradients(
                self.model,
                inputs,
                targets,
                None if batch.fresh else self.state,
                starts=batch.starts,
                autocast=self.autocast,
                chunk=training.chunk,
                share=share,
                compiled=self.compilation.on,
            )
            self.state = state if training.batches == "continuing" else None
            losses.append(share * loss)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, training.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([torch.stack(losses).sum(), norm])


def make_batches(training: TrainingConfig, shard: Shard) -> Batches:
    """Make the batches that ``[training]`` asks for.

    Raises:
        ValueError: The text is too short for them.
    """
    kind = ContinuingBatches if training.batches == "continuing" else PackedBatches
    return kind(
        shard.tokens,
        batch_size=training.batch_size,
        length=training.length,
        seed=training.seed,
        name=shard.name,
        documents=shard.documents if training.reset_at_documents else None,
    )


def _make_model(config: RunConfig, corpus: Corpus, machine: Machine) -> MambaLM:
    torch.manual_seed(config.training.seed)
    sizes = config.model_config(corpus.tokenizer.vocab_size)
    with refuse_too_large(
        f"a model of d_model {sizes.d_model:,} and n_layer {sizes.n_layer:,}"
    ):
        # drawn on the CPU, so that every device starts from the same weights
        return MambaLM(sizes).to(machine.device)


def _validate(learner: Learner, shard: Shard, training: TrainingConfig) -> LanguageScore:
    count = min(training.evaluate_tokens or len(shard.tokens), len(shard.tokens) - 1)
    # Which tokens are scored depends on the text and their number alone, so that the losses of
    # runs with other batches compare; the memory is that of a training batch.
    rows = max(1, min(_VALIDATION_ROWS, count // _SHORTEST_ROW))
    with learner.autocast(), learner.uncompiled():
        return evaluate_tokens(
            learner.model,
            shard.tokens,
            tokens_per_byte=shard.tokens_per_byte,
            chunk=max(1, training.batch_size * training.length // rows),
            rows=rows,
            limit=count,
            documents=shard.documents if training.reset_at_documents else None,
        )


def _evaluate_every(training: TrainingConfig) -> int:
    assert training.steps is not None
    return training.evaluate_every or max(1, math.ceil(training.steps / _VALIDATIONS))


def _steps_in(minutes: float, config: RunConfig, corpus: Corpus, machine: Machine) -> int:
    """Time a few updates of a model that is then thrown away, and see how many fit."""
    training = config.training
    learner = Learner(
        _make_model(config, corpus, machine),
        make_batches(training, corpus.train),
        training,
        machine,
    )
    seconds: list[float] = []
    while len(seconds) < 6 or (sum(seconds) < 4 and len(seconds) < 100):
        began = time.perf_counter()
        learner.step(0.0).tolist()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[2:])  # the first two allocate and compile

    validation = 0.0
    if corpus.validation is not None:
        began = time.perf_counter()
        _validate(learner, corpus.validation, training)
        validation = time.perf_counter() - began
    if training.evaluate_every is None:
        fit = (60 * minutes - _VALIDATIONS * validation) / step
    else:
        fit = 60 * minutes / (step + validation / training.evaluate_every)
    return max(1, int(fit))


def _absolute(config: RunConfig) -> RunConfig:
    """Make paths independent of the current folder, so that a run can go on from any."""
    data, kind = config.data, config.tokenizer.kind
    files = tuple(str(expand(file).absolute()) for file in data.files)
    cache = str(expand(data.cache).absolute()) if data.cache else None
    if kind not in ("byte", "character"):
        kind = str(expand(kind).absolute())
    return replace(
        config,
        data=replace(data, files=files, cache=cache),
        tokenizer=replace(config.tokenizer, kind=kind),
    )


def _check_same(config: RunConfig, saved: RunConfig, folder: Path) -> None:
    if config.training.minutes is not None:  # the run has settled on steps when it began
        settled = replace(config.training, minutes=None, steps=saved.training.steps)
        config = replace(config, training=settled)
    now, then = config_tables(config), config_tables(saved)
    for table in then:
        for key in {**then[table], **now[table]}:
            was, asked = then[table].get(key), now[table].get(key)
            if was != asked:
                raise ValueError(
                    f"train: {table}.{key} must stay {was!r} to resume the run {folder}, "
                    f"got {asked!r}"
                )


def _resume_command(folder: Path) -> str:
    quoted = shlex.quote(str(folder))
    return f"mambakit train {shlex.quote(str(folder / CONFIG))} --out {quoted} --resume"


def _kernels(machine: Machine) -> str:
    scan, conv = (
        _backends.fused_kernels(name, machine.device)
        for name in ("selective_scan", "causal_conv1d")
    )
    if scan.kind is None:
        return f"plain PyTorch kernels ({scan.why_not})"
    if scan.kind == "triton":  # which has the scan alone
        slower = "" if scan.why_not is None else ", slower than the CUDA kernels"
        return (
            f"Triton's kernels for the scan and plain PyTorch for the rest{slower} "
            f"({conv.why_not})"
        )
    isa = f" ({_native.isa()})" if scan.kind == "cpu" else ""
    return f"fused kernels{isa}"


def _introduce(
    config: RunConfig,
    corpus: Corpus,
    model: MambaLM,
    machine: Machine,
    compilation: Compilation,
    say: Say,
) -> None:
    threads = f", {torch.get_num_threads()} threads" if machine.device.type == "cpu" else ""
    precision = "fp32" if machine.autocast is None else "bf16 autocast"
    kernels = _kernels(machine)
    say(f"running on {machine.device}{threads}: {kernels}, {precision} ({machine.why})")
    if compilation.on:
        say("compiling the blocks by torch.compile: the first step takes longer")
    elif compilation.why_not is not None:
        say(f"not compiled, and so slower: {compilation.why_not}")
    parts = [
        f"{sum(d.size for d in part):,} bytes in {count(len(part), 'file')} for {name}"
        for name, part in zip(corpus.splits._fields, corpus.splits, strict=True)
        if part
    ]
    tokenizer = corpus.tokenizer
    say(f"text: {', '.join(parts)}; {tokenizer.vocab_size:,} kinds of {tokenizer.name} tokens")
    training = config.training
    say(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; {training.steps:,} "
        f"steps of {training.batch_size * training.accumulate} x {training.length} tokens"
    )
    missing = why_no_plot()
    if missing is not None:
        say(missing)


def train(
    config: RunConfig, folder: Path, *, resume: bool = False, say: Say = print
) -> TrainingResult:
    """Train a language model and write its run folder.

    A run that is interrupted and resumed makes the same weights as one that is not, bit for
    bit on a CPU with the same number of threads: model, optimiser, place in the batches,
    carried state and random generators are all in the checkpoint. On a CPU the process keeps
    from now on the memory that it frees, as ``keep_freed_memory`` says.

    Args:
        config: The run.
        folder: The run folder: new, or with ``resume`` that of the same run.
        resume: Go on from the last checkpoint in ``folder``, or from the start if there is
            none yet.
        say: Where sentences for the reader go. The progress bar goes to stderr.

    Returns:
        How the run ended.

    Raises:
        ValueError: The config, the text or the folder is not fit for a run.
        RuntimeError: The device is missing, the folder cannot be written, or the loss is no
            longer finite; the last checkpoint stands.
        Interrupted: SIGINT or SIGTERM came. The step in hand was finished and saved, and the
            command that resumes was said. A second signal raises ``KeyboardInterrupt`` at
            once; the last checkpoint stands.
    """
    folder = Path(folder)
    config = _absolute(config)
    machine = resolve_machine(config.training.device, config.training.precision)
    if machine.device.type == "cpu":
        keep_freed_memory()
    if not resume:
        with new_run_folder(folder):
            corpus = prepare_corpus(config.data, config.tokenizer, folder)
            config.model_config(corpus.tokenizer.vocab_size)
            check_prompt(config.report, corpus.tokenizer)
            make_batches(config.training, corpus.train)
            if config.training.minutes is not None:
                say(f"timing this machine, to train for {config.training.minutes:g} min")
                steps = _steps_in(config.training.minutes, config, corpus, machine)
                settled = replace(config.training, minutes=None, steps=steps)
                config = replace(config, training=settled)
            # the model is made first: what is too large for the machine leaves no run behind
            run = _Run(config, corpus, machine, folder, say)
            write_start(folder, config, corpus.tokenizer)
            return run.finish()
    else:
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"train: {folder} must hold a run to resume, got no {CONFIG} there"
            )
        tidy(folder)
        saved = load_config(folder / CONFIG)
        _check_same(config, saved, folder)
        config = saved
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
        corpus = prepare_corpus(config.data, config.tokenizer, folder, made=tokenizer)
        check_prompt(config.report, corpus.tokenizer)
        run = _Run(config, corpus, machine, folder, say)
    return run.finish()


class _Run:
    """A run from its last checkpoint, or its start, to its end."""

    def __init__(
        self, config: RunConfig, corpus: Corpus, machine: Machine, folder: Path, say: Say
    ) -> None:
        self.training, self.corpus, self.folder = config.training, corpus, folder
        self.machine, self.say = machine, say
        assert self.training.steps is not None
        self.steps = self.training.steps
        self.tokens_per_step = (
            self.training.batch_size * self.training.length * self.training.accumulate
        )
        done = checkpoint_steps(folder)
        model = (
            load_checkpoint_model(
                checkpoint_folder(folder, done[-1]), device=machine.device
            ).train()
            if done
            else _make_model(config, corpus, machine)
        )
        self.learner = Learner(
            model, make_batches(self.training, corpus.train), self.training, machine
        )
        text = corpus.train.digest
        validation = corpus.validation.digest if corpus.validation else ""
        self.at = RunState(text=text, validation=validation)
        if done:
            self.at, self.learner.state = load_checkpoint(
                checkpoint_folder(folder, done[-1]),
                model,
                self.learner.optimizer,
                self.learner.batches,
            )
            for part, then, now in (
                ("training", self.at.text, text),
                ("validation", self.at.validation, validation),
            ):
                if then != now:
                    raise ValueError(
                        f"train: the {part} text must be the one that the run {folder} began "
                        "with, got another: its files or its tokenizer have changed"
                    )
            if self.at.step > self.steps:
                where = checkpoint_folder(folder, done[-1]) / "training.json"
                raise ValueError(
                    f"resume: {where} must have a step of at most {self.steps}, where the "
                    f"run ends, got {self.at.step}"
                )
        self.pending: list[Tensor] = []  # losses and norms not yet read from the device
        self.norm = 0.0
        self.busy = 0.0  # seconds in updates since the last line of the metrics
        self.drawn = time.monotonic()
        _introduce(config, corpus, model, machine, self.learner.compilation, say)
        if done:
            say(f"resuming after step {self.at.step:,} of {config.training.steps:,}")

    def finish(self) -> TrainingResult:
        """Make the steps that are left."""
        self.metrics = Metrics(self.folder, step=self.at.step, evaluated=self.at.evaluated)
        progress = Progress(
            steps=self.steps,
            done=self.at.step,
            tokens_per_step=self.tokens_per_step,
            say=self.say,
        )
        self.seconds_before, self.began = self.at.seconds, time.perf_counter()
        try:
            with Interrupts() as interrupts:
                stopped = self._loop(progress, interrupts)
        finally:
            progress.close()
        if stopped:
            self.say(
                f"stopped after step {self.at.step} of {self.steps}; to go on: "
                f"{_resume_command(self.folder)}"
            )
            raise Interrupted
        return TrainingResult(
            self.folder, self.at.step, self.at.best_step, self.at.best_loss, self.at.seconds
        )

    def _loop(self, progress: Progress, interrupts: Interrupts) -> bool:
        """Make steps until the last one, or until a signal asks to stop, and say which."""
        training, at = self.training, self.at
        evaluate_every = _evaluate_every(training)
        while True:
            stop = interrupts.requested  # asked once: a signal may come at any line
            last = at.step == self.steps
            log = at.step % training.log_every == 0 or last
            evaluate = at.step > at.evaluated and (at.step % evaluate_every == 0 or last)
            save = (
                evaluate
                or stop
                or bool(training.checkpoint_every and at.step % training.checkpoint_every == 0)
            ) and at.step > 0
            # on a CPU reading a number waits for nothing, on others for the device to finish
            if self.pending and (log or save or self.machine.device.type == "cpu"):
                self._read(progress)
            if log and at.recent:
                self._log()
            if save:
                began = time.perf_counter()
                if evaluate and not stop:
                    self._evaluate(progress)
                self._save(ends=last or stop)
                progress.paused(time.perf_counter() - began)
            if last or stop:
                return stop
            rate = learning_rate(
                at.step,
                steps=self.steps,
                peak=training.learning_rate,
                final=training.final_learning_rate,
                warmup=training.warmup,
            )
            began = time.perf_counter()
            self.pending.append(self.learner.step(rate))
            self.busy += time.perf_counter() - began
            at.step += 1

    def _read(self, progress: Progress) -> None:
        """Read the losses of the steps since the last time, and refuse what is not finite."""
        began = time.perf_counter()
        numbers = torch.stack(self.pending).tolist()
        self.busy += time.perf_counter() - began
        first = self.at.step - len(numbers) + 1
        self.pending.clear()
        for step, (loss, norm) in enumerate(numbers, start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what, number = ("loss", loss) if not math.isfinite(loss) else ("gradient", norm)
                kept = checkpoint_steps(self.folder)
                stands = (
                    f"checkpoint {kept[-1]} is kept" if kept else "no checkpoint was due yet"
                )
                raise RuntimeError(
                    f"train: the {what} must be finite, got {number} at step {step} "
                    f"({stands}); a lower training.learning_rate or a longer warmup may help"
                )
            self.at.recent.append(loss)
        loss, self.norm = numbers[-1]
        progress.update(self.at.step, loss, self._bits_per_byte(loss))

    def _bits_per_byte(self, loss: float) -> float:
        return loss * self.corpus.train.tokens_per_byte / math.log(2)

    def _log(self) -> None:
        loss = math.fsum(self.at.recent) / len(self.at.recent)
        tokens = len(self.at.recent) * self.tokens_per_step
        self.metrics.append(
            {
                "kind": "train",
                "step": self.at.step,
                "loss": loss,
                "bits_per_byte": self._bits_per_byte(loss),
                "gradient_norm": self.norm,
                "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
                "tokens": self.at.step * self.tokens_per_step,
                # after a resume some of these steps were timed by another process
                "tokens_per_second": round(tokens / self.busy, 1) if self.busy else None,
                "seconds": round(self._seconds(), 2),
            }
        )
        self.at.recent.clear()
        self.busy = 0.0

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _evaluate(self, progress: Progress) -> None:
        at = self.at
        at.evaluated = at.step
        if self.corpus.validation is None:
            return
        score = _validate(self.learner, self.corpus.validation, self.training)
        if score.loss < at.best_loss:
            at.best_step, at.best_loss = at.step, score.loss
        self.metrics.append(
            {
                "kind": "validation",
                "step": at.step,
                "loss": score.loss,
                "bits_per_byte": score.bits_per_byte,
                "tokens": score.tokens,
                "seconds": round(self._seconds(), 2),
            }
        )
        best = ", the best so far" if at.best_step == at.step else ""
        progress.say(
            f"step {at.step}: validation loss {score.loss:.4f}, "
            f"{score.bits_per_byte:.4f} bits/byte on {score.tokens:,} tokens{best} "
            f"({format_seconds(self._seconds())})"
        )

    def _save(self, ends: bool) -> None:
        self.at.batches = self.learner.batches.state_dict()
        self.at.seconds = self._seconds()
        learner = self.learner
        save_checkpoint(self.folder, self.at, learner.model, learner.optimizer, learner.state)
        if why_no_plot() is None and (ends or time.monotonic() - self.drawn > _PLOT_EVERY):
            plot_loss(self.folder / PLOT, self.metrics.rows)
            self.drawn = time.monotonic()
