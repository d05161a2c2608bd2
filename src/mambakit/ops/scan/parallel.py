"""The selective scan in PyTorch alone: many steps and chunks at a time, on any device.

Time is walked in blocks of a few steps. Within a block everything that does not depend on
the state (decays, drives, outputs, gradients) is one PyTorch call for all steps; only the
recurrence itself is a call for each step. Where the state is too small to fill the device, the
sequence is cut into chunks that are walked side by side, and twice: first from zero, to learn
the state each chunk adds; then, with the states carried from chunk to chunk by exp(A sum dt),
from the right one. Only sums of negative numbers are exponentiated: nothing can overflow.

The backward pass keeps nothing but the inputs. It walks forward again, keeping the state before
every block, then walks the blocks from the last to the first with the adjoint recurrence

    g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}

from which every gradient follows (docs/maths.md). Batch and channels are cut into parts, one
after another, so that what it keeps stays within the size of ``x`` for any number of states.

A pack of sequences is walked as one. Where a sequence begins, the walk takes up its state in
the place of the one that it carries: by a copy, for a product with zero would let a NaN pass.

Blocks have the axes ``(s, b, c, g, n, p)``: steps of the block, batch, chunks, groups, states,
channels of a group. Channels are last, so that PyTorch's loops run along them. Contractions are
written as a product and a sum, for TF32 and autocast would round a matrix product.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import softplus
from .registration import Kernels, register

# Steps of a block: enough to make calls few, few enough for a block to stay in the cache.
_FEWEST_STEPS, _MOST_STEPS, _BLOCK_ELEMENTS = 16, 64, 2**19
# A shorter chunk would cost more in carrying than it gains.
_SHORTEST_CHUNK = 64


class _Part(NamedTuple):
    """A slice of the batch and of the channels that is walked by itself."""

    rows: slice
    channels: slice
    groups: slice


class _Plan(NamedTuple):
    """How the work is cut: by sizes and device alone, so that results repeat."""

    parts: list[_Part]
    chunks: int
    length: int  # of a chunk
    steps: int  # of a block

    def blocks(self) -> list[slice]:
        starts = range(0, self.length, self.steps)
        return [slice(s, min(s + self.steps, self.length)) for s in starts]


class _Meeting(NamedTuple):
    """Where sequences of a pack meet the same step of their chunks: indices of both."""

    chunks: Tensor
    sequences: Tensor


class _Pack(NamedTuple):
    """Which sequences begin and which end at a step of the chunks."""

    begins: dict[int, _Meeting]
    ends: dict[int, _Meeting]
    cut: frozenset[int]  # the chunks in which a sequence begins


_ONE_SEQUENCE = _Pack({}, {}, frozenset())


class _Problem(NamedTuple):
    """One part's tensors as the walks want them: views of (q, b, c, g, n, p) that broadcast."""

    dt: Tensor  # (q, b, c, g, 1, p)
    u: Tensor  # (q, b, c, g, 1, p), dt x
    A: Tensor  # (g, n, p)
    B: Tensor  # (q, b, c, g, n, 1), or (1, 1, 1, g, n, p) if constant
    C: Tensor
    pack: _Pack
    given: Tensor  # (s, g, n, p), the state before each sequence of a pack; or (b, g, n, p)


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    dt_softplus: bool,
    save: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the scan. Nothing is saved for the backward pass, whatever ``save`` says."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    n = A.shape[1]
    plan = _plan(b, l, d, n, _groups(B, C), x.device)
    signal, A, B, C = (t.to(wide) for t in (x, A, B, C))
    step = _step(dt, dt_bias, dt_softplus, wide)
    padded = [_pad(t, plan) for t in (step, step * signal, B, C)]
    pack = _pack(cu_seqlens, plan, x.device)

    y = signal.new_empty(b, plan.chunks * plan.length, d)
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = A.new_empty(sequences, d, n)
    for part in plan.parts:
        problem = _problem(part, plan, A, padded, pack, state, sequences)
        y_part = _fold(y, part, plan).squeeze(4)
        last_part = _by_sequence(last, part, pack)
        h = _chunk_starts(problem, plan)
        decay, states = _room(h, plan)
        for s in plan.blocks():
            count = s.stop - s.start
            h = _walk(problem, s, h, decay, states)
            y_part[s] = (states[1 : count + 1] * _at(problem.C, s)).sum(4)
            for t, ending in _meetings(pack.ends, s):
                last_part[ending.sequences] = states[t + 1][0, ending.chunks]
        if not pack.ends:
            last_part.copy_(h[:, -1])

    y = y[:, :l]
    if D is not None:
        y.addcmul_(signal, D.to(wide))
    if gate is not None:
        y.mul_(F.silu(gate.to(wide)))
    return x.new_empty(b, l, d).copy_(y), last, last.new_empty(0)


def _backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    checkpoints: Tensor,
    dt_softplus: bool,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Run the adjoint of the scan: the gradients, in the order of the inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b, l, d = x.shape
    n = A.shape[1]
    plan = _plan(b, l, d, n, _groups(B, C), x.device)
    signal, A, B, C = (t.to(wide) for t in (x, A, B, C))
    step = _step(dt, dt_bias, dt_softplus, wide)
    padded = [_pad(t, plan) for t in (step, step * signal, B, C)]
    pack = _pack(cu_seqlens, plan, x.device)

    # what reaches C . h + D x, once the gate is undone
    dpre = dy.to(wide) if gate is None else dy.to(wide) * F.silu(gate.to(wide))
    dpre_padded = _pad(dpre, plan)

    whole = (b, plan.chunks * plan.length, d)
    dstep, du = signal.new_empty(whole), signal.new_empty(whole)
    y = None if gate is None else signal.new_empty(whole)
    dA = A.new_zeros(d, n)
    dB, dC = padded[2].new_zeros(padded[2].shape), padded[3].new_zeros(padded[3].shape)
    sequences = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dstate = A.new_empty(sequences, d, n)
    for part in plan.parts:
        problem = _problem(part, plan, A, padded, pack, state, sequences)
        before = _block_starts(problem, plan, _chunk_starts(problem, plan))
        dpre_part = _fold(dpre_padded, part, plan)
        final = _given(dlast, part, problem.A, pack, sequences)
        dstate_part = _by_sequence(dstate, part, pack)
        dh = _chunk_ends(problem, plan, dpre_part, final)
        dstep_part, du_part = (_fold(t, part, plan).squeeze(4) for t in (dstep, du))
        dA_part = _by_group(dA, part)
        dB_part, dC_part = _coefficient(dB, part, plan), _coefficient(dC, part, plan)
        y_part = None if y is None else _fold(y, part, plan).squeeze(4)

        decay, states = _room(dh, plan)
        adjoint, product = torch.empty_like(decay), torch.empty_like(decay)
        for i, s in reversed(list(enumerate(plan.blocks()))):
            count = s.stop - s.start
            _walk(problem, s, before[i], decay, states)
            a, h, h_before = decay[:count], states[1 : count + 1], states[:count]
            g, scratch = adjoint[:count], product[:count]
            if y_part is not None:
                y_part[s] = torch.mul(h, _at(problem.C, s), out=scratch).sum(4)
            _accumulate(dC_part, s, torch.mul(h, dpre_part[s], out=scratch))
            dh = _walk_back(problem, s, dpre_part, dh, a, g, final, dstate_part)
            _accumulate(dB_part, s, torch.mul(g, problem.u[s], out=scratch))
            du_part[s] = torch.mul(g, _at(problem.B, s), out=scratch).sum(4)
            for t, beginning in _meetings(pack.begins, s):
                h_before[t] = _take_up(h_before[t], beginning, problem.given)
            # gradient of dt_t A, the logarithm of the decay
            dlog = a.mul_(g).mul_(h_before)
            dstep_part[s] = torch.mul(dlog, problem.A, out=scratch).sum(4)
            dA_part.add_(dlog.mul_(problem.dt[s]).sum((0, 1, 2)))
        if not pack.begins:
            dstate_part.copy_(dh[:, 0])

    dstep, du = dstep[:, :l], du[:, :l]
    dx = du * step
    ddt = dstep.addcmul_(du, signal)
    if dt_softplus:
        raw = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
        ddt.mul_(torch.sigmoid(raw))
    dD = dgate = None
    if D is not None:
        dD = (dpre * signal).sum((0, 1))
        dx.addcmul_(dpre, D.to(wide))
    if gate is not None and y is not None:
        pre = y[:, :l] if D is None else y[:, :l].addcmul_(signal, D.to(wide))
        z = gate.to(wide)
        rise = torch.sigmoid(z)
        dgate = pre.mul_(dy).mul_(rise * (1 + z * (1 - rise)))
    ddt_bias = None if dt_bias is None else ddt.sum((0, 1))
    dB, dC = (t if t.ndim == 2 else t[:, :l] for t in (dB, dC))
    return dx, ddt, dA, dB, dC, dD, dgate, ddt_bias, dstate


def _plan(b: int, l: int, d: int, n: int, g: int, device: torch.device) -> _Plan:
    # Elements of state for one call: fewer leave an accelerator idle and a processor waiting
    # for PyTorch, more would not stay in a processor's cache.
    enough, most = (2**14, 2**15) if device.type == "cpu" else (2**21, 2**22)
    # The states kept before every block then have no more elements than x.
    most = min(most, _FEWEST_STEPS * b * d)
    per_group = d // g
    channels = min(d, max(1, most // n))
    if g > 1:
        channels = max(per_group, channels - channels % per_group)
    rows = max(1, min(b, most // (d * n))) if channels == d else 1

    elements = rows * channels * n
    chunks = max(1, min(-(-enough // elements), l // _SHORTEST_CHUNK))
    length = -(-l // chunks)
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _BLOCK_ELEMENTS // (chunks * elements)))
    parts = [
        _Part(
            slice(row, min(b, row + rows)),
            slice(channel, min(d, channel + channels)),
            slice(channel // per_group, -(-min(d, channel + channels) // per_group)),
        )
        for row in range(0, b, rows)
        for channel in range(0, d, channels)
    ]
    return _Plan(parts, chunks, length, max(1, min(length, steps)))


def _pack(cu_seqlens: Tensor | None, plan: _Plan, device: torch.device) -> _Pack:
    """Find the steps of the chunks at which the sequences of a pack begin and end."""
    if cu_seqlens is None:
        return _ONE_SEQUENCE
    bounds = cu_seqlens.tolist()
    begins = _meet(bounds[:-1], plan, device)
    ends = _meet([stop - 1 for stop in bounds[1:]], plan, device)
    return _Pack(begins, ends, frozenset(start // plan.length for start in bounds[:-1]))


def _meet(places: list[int], plan: _Plan, device: torch.device) -> dict[int, _Meeting]:
    met: dict[int, list[tuple[int, int]]] = {}
    for sequence, place in enumerate(places):
        chunk, step = divmod(place, plan.length)
        met.setdefault(step, []).append((chunk, sequence))
    return {
        step: _Meeting(*torch.tensor(list(zip(*pairs, strict=True)), device=device))
        for step, pairs in met.items()
    }


def _meetings(at: dict[int, _Meeting], s: slice) -> list[tuple[int, _Meeting]]:
    """List the meetings of a block, each with its step in the block."""
    if not at:
        return []
    return [(step - s.start, at[step]) for step in range(s.start, s.stop) if step in at]


def _take_up(h: Tensor, here: _Meeting, given: Tensor) -> Tensor:
    """Put the sequences' own states in the place of (b, c, g, n, p) that a walk carries."""
    return h.index_copy(1, here.chunks, given[here.sequences][None])


def _groups(B: Tensor, C: Tensor) -> int:
    return next((M.shape[2] for M in (B, C) if M.ndim == 4), 1)


def _step(dt: Tensor, bias: Tensor | None, use_softplus: bool, wide: torch.dtype) -> Tensor:
    step = dt.to(wide)
    if bias is not None:
        step = step + bias.to(wide)
    return softplus(step) if use_softplus else step


def _pad(t: Tensor, plan: _Plan) -> Tensor:
    """Lengthen axis 1 to whole chunks by zeros: steps of no duration, which change no state."""
    if t.ndim == 2:
        return t
    missing = plan.chunks * plan.length - t.shape[1]
    if missing == 0:
        return t
    return torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)


def _problem(
    part: _Part,
    plan: _Plan,
    A: Tensor,
    padded: list[Tensor],
    pack: _Pack,
    state: Tensor | None,
    sequences: int,
) -> _Problem:
    step, u, B, C = padded
    A = _by_group(A, part).contiguous()
    return _Problem(
        _fold(step, part, plan),
        _fold(u, part, plan),
        A,
        _coefficient(B, part, plan),
        _coefficient(C, part, plan),
        pack,
        _given(state, part, A, pack, sequences),
    )


def _fold(t: Tensor, part: _Part, plan: _Plan) -> Tensor:
    """View a part of (b, l, d) as (q, b, c, g, 1, p)."""
    t = t[part.rows, :, part.channels]
    g = part.groups.stop - part.groups.start
    t = t.unflatten(2, (g, t.shape[2] // g)).unflatten(1, (plan.chunks, plan.length))
    return t.permute(2, 0, 1, 3, 4).unsqueeze(4)


def _by_group(M: Tensor, part: _Part) -> Tensor:
    """View a part of (d, n) as (g, n, p)."""
    M = M[part.channels]
    g = part.groups.stop - part.groups.start
    return M.unflatten(0, (g, M.shape[0] // g)).transpose(1, 2)


def _coefficient(M: Tensor, part: _Part, plan: _Plan) -> Tensor:
    """View a part of B, C or their gradient as (q, b, c, g, n, 1) or (1, 1, 1, g, n, p)."""
    if M.ndim == 2:
        return _by_group(M, part)[None, None, None]
    M = M[part.rows, :, None] if M.ndim == 3 else M[part.rows, :, part.groups]
    return M.unflatten(1, (plan.chunks, plan.length)).permute(2, 0, 1, 3, 4).unsqueeze(5)


def _at(M: Tensor, s: slice) -> Tensor:
    """Take a block of a coefficient; a constant is the same in every block."""
    return M if M.shape[0] == 1 else M[s]


def _accumulate(gradient: Tensor, s: slice, products: Tensor) -> None:
    """Add a block of (s, b, c, g, n, p) to a coefficient's gradient, over what it shares."""
    block = _at(gradient, s)
    block.add_(products.sum_to_size(block.shape))


def _given(state: Tensor | None, part: _Part, A: Tensor, pack: _Pack, sequences: int) -> Tensor:
    """Give the states (or gradients) at one end of a part's sequences as (b, g, n, p)."""
    if state is not None:
        return _by_sequence(state, part, pack).to(A.dtype)
    rows = sequences if pack.begins else part.rows.stop - part.rows.start
    return A.new_zeros(1, 1, 1, 1).expand(rows, *A.shape)


def _by_sequence(states: Tensor, part: _Part, pack: _Pack) -> Tensor:
    """View a part of (b, d, n) as (b, g, n, p); every sequence of a pack is in each part."""
    states = states[:, part.channels] if pack.begins else states[part.rows, part.channels]
    g = part.groups.stop - part.groups.start
    return states.unflatten(1, (g, states.shape[1] // g)).transpose(2, 3)


def _room(h: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Make room for a block's decays, and for its states with the one before them."""
    return h.new_empty(plan.steps, *h.shape), h.new_empty(plan.steps + 1, *h.shape)


def _walk(problem: _Problem, s: slice, h: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """Fill a block's decays and states from the state before it; return the last state."""
    count = s.stop - s.start
    decay, states = decay[:count], states[: count + 1]
    states[0] = h  # before the rest, for h may be the last state of the block before
    torch.mul(problem.dt[s], problem.A, out=decay).exp_()
    torch.mul(problem.u[s], _at(problem.B, s), out=states[1:])
    steps = states.unbind()
    begins = problem.pack.begins
    for t, (a, before, after) in enumerate(
        zip(decay.unbind(), steps, steps[1:], strict=False), s.start
    ):
        carried = _take_up(before, begins[t], problem.given) if t in begins else before
        after.addcmul_(a, carried)
    return steps[-1]


def _walk_back(
    problem: _Problem,
    s: slice,
    dpre: Tensor,
    dh: Tensor,
    decay: Tensor,
    adjoint: Tensor,
    final: Tensor,
    dgiven: Tensor | None = None,
) -> Tensor:
    """Fill a block's adjoint states from the gradient of its last state; return its first's.

    Where a sequence of a pack begins, what has come so far is the gradient of the state that it
    was given, for ``dgiven``; the sequence before is taken up with its own, from ``final``.
    """
    torch.mul(dpre[s], _at(problem.C, s), out=adjoint)
    steps, decays = adjoint.unbind(), decay.unbind()
    begins = problem.pack.begins
    steps[-1].add_(dh)
    for t in range(len(steps) - 1, -1, -1):
        here = begins.get(s.start + t)
        if here is None and t > 0:
            steps[t - 1].addcmul_(decays[t], steps[t])
            continue
        dh = decays[t] * steps[t]
        if here is not None:
            if dgiven is not None:
                dgiven[here.sequences] = dh[0, here.chunks]
            # before the first there is none: what is put there goes nowhere
            before = _Meeting(here.chunks, (here.sequences - 1).clamp(min=0))
            dh = _take_up(dh, before, final)
        if t > 0:
            steps[t - 1].add_(dh)
    return dh


def _block_starts(problem: _Problem, plan: _Plan, h: Tensor) -> list[Tensor]:
    """Walk forward and keep the state before every block."""
    decay, states = _room(h, plan)
    kept = [h]
    for s in plan.blocks()[:-1]:
        h = _walk(problem, s, h, decay, states)
        kept.append(h.clone())
    return kept


def _chunk_starts(problem: _Problem, plan: _Plan) -> Tensor:
    """Find the state before every chunk, (b, c, g, n, p), from the one before the first."""
    first = problem.given[:1] if problem.pack.begins else problem.given
    starts = first[:, None].repeat(1, plan.chunks, 1, 1, 1)
    if plan.chunks == 1:
        return starts
    decay, states = _room(starts, plan)
    h = torch.zeros_like(starts)
    for s in plan.blocks():
        h = _walk(problem, s, h, decay, states)
    across = torch.exp(problem.A * problem.dt.sum(0))
    for k in range(1, plan.chunks):
        if k - 1 in problem.pack.cut:
            starts[:, k] = h[:, k - 1]
        else:
            torch.addcmul(h[:, k - 1], across[:, k - 1], starts[:, k - 1], out=starts[:, k])
    return starts


def _chunk_ends(problem: _Problem, plan: _Plan, dpre: Tensor, final: Tensor) -> Tensor:
    """Find the gradient of the state after every chunk from that after the last."""
    last = final[-1:] if problem.pack.begins else final
    ends = last[:, None].repeat(1, plan.chunks, 1, 1, 1)
    if plan.chunks == 1:
        return ends
    decay, adjoint = (ends.new_empty(plan.steps, *ends.shape) for _ in range(2))
    dh = torch.zeros_like(ends)
    for s in reversed(plan.blocks()):
        a, g = decay[: s.stop - s.start], adjoint[: s.stop - s.start]
        torch.mul(problem.dt[s], problem.A, out=a).exp_()
        dh = _walk_back(problem, s, dpre, dh, a, g, final)
    across = torch.exp(problem.A * problem.dt.sum(0))
    for k in range(plan.chunks - 1, 0, -1):
        if k in problem.pack.cut:
            ends[:, k - 1] = dh[:, k]
        else:
            torch.addcmul(dh[:, k], across[:, k], ends[:, k], out=ends[:, k - 1])
    return ends


# The work is PyTorch's own on every device, so one kernel serves all of them.
scan = register(
    "parallel_scan",
    {"CompositeExplicitAutograd": Kernels(_forward, _backward, checkpoint_steps=0)},
)
