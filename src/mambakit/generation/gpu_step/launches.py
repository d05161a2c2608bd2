"""The kernels of a step in their order, with everything they are launched with."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops import _cuda

from .arguments import (
    AddArguments,
    BeginArguments,
    Call,
    ConvolutionArguments,
    Norm,
    ProductArguments,
    ScanArguments,
    ScanManyArguments,
)
from .multiplication import Multiplication
from .packing import Layer, Matrix, PackedModel
from .tiling import (
    GPU,
    SCAN_CHANNELS,
    ScanTiling,
    Tiling,
    group,
    library_spans,
    overlaps,
    takes_library,
    tile,
    tile_scan,
)

FOLDER = Path(__file__).parent
STREAM, PRODUCT, SCAN, CONVOLUTION, SCAN_MANY = (
    FOLDER / f"{name}.cu" for name in ("stream", "product", "scan", "convolution", "scan_many")
)

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
_THREADS = 256
_CHANNELS = 64  # of a block of ``scan.cu``
_CONVOLVED = 128 * 8  # channels of a block of ``convolution.cu``


class Launch(NamedTuple):
    """One kernel's launch; ``name`` says what of a layer it computes."""

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    arguments: ctypes.Structure
    shared_bytes: int
    overlaps: bool

    def run(self) -> None:
        """Queue it."""
        self.kernel.launch(
            self.grid, self.threads, self.arguments, self.shared_bytes, overlaps=self.overlaps
        )


class Sizes(NamedTuple):
    """What the kernels are compiled for, of a model."""

    dtype: torch.dtype
    storage: torch.dtype
    factor: torch.dtype
    m: int
    n: int
    r: int
    w: int

    @classmethod
    def of(cls, packed: PackedModel) -> "Sizes":
        """Return those of a model."""
        return cls(*(getattr(packed, name) for name in cls._fields))

    @property
    def _types(self) -> _cuda.Defines:
        names = ("TYPE", self.dtype), ("WEIGHT", self.storage), ("FACTOR", self.factor)
        return tuple((name, _TYPES[dtype]) for name, dtype in names)

    @property
    def stream_threads(self) -> int:
        """Threads of a block of ``stream.cu``: four numbers each, or as many as they must."""
        return min(1024, 32 * -(-self.m // 128))

    def stream(self, spans: int) -> _cuda.Defines:
        """Return the defines of ``stream.cu``."""
        more = ("WIDTH", self.m), ("THREADS", self.stream_threads), ("SPANS", spans)
        return (*self._types, *((name, str(value)) for name, value in more))

    def product(self, cut: Tiling, end: str) -> _cuda.Defines:
        """Return the defines of ``product.cu``."""
        return (
            *self._types,
            ("TENSORS", str(int(self.factor != torch.float32))),
            ("ROWS", str(cut.rows)),
            ("COLUMNS", str(cut.columns)),
            ("STAGES", str(cut.stages)),
            ("END", end),
            *((("WINDOW", str(self.w)),) if end == "CONVOLVED" else ()),
        )

    def scan(self, group: int, spans: int) -> _cuda.Defines:
        """Return the defines of ``scan.cu``."""
        return (
            *self._types,
            ("STATES", str(self.n)),
            ("RANK", str(self.r)),
            ("GROUP", str(group)),
            ("ALIGNED", str(int(self.n % 4 == 0))),
            ("SPANS", str(spans)),
        )

    def convolution(self) -> _cuda.Defines:
        """Return the defines of ``convolution.cu``."""
        return (*self._types, ("WINDOW", str(self.w)))

    def scan_many(self, cut: ScanTiling, spans: int) -> _cuda.Defines:
        """Return the defines of ``scan_many.cu``."""
        return (
            *self._types,
            ("STATES", str(self.n)),
            ("RANK", str(self.r)),
            ("SPANS", str(spans)),
            ("SEQUENCES", str(cut.sequences)),
            ("TOGETHER", str(cut.together)),
            ("SLOTS", str(cut.slots)),
            ("KEPT", str(int(cut.kept))),
        )

    def takes_library(self, d: int, capacity: int) -> bool:
        """Return whether a library multiplies the large matrices."""
        short = self.storage == self.factor != torch.float32
        return short and takes_library(capacity, self.n, self.r, d, self.w)


def specialisations(
    sizes: Sizes, d: int, vocabulary: int, capacity: int, gpu: GPU
) -> Iterator[tuple[Path, _cuda.Defines]]:
    """List the builds that a step of such a model and of so many sequences asks for."""

    def cut(rows: int, columns: int, readers: int, **places: int) -> Tiling:
        bytes_of = sizes.storage.itemsize, sizes.factor.itemsize
        return tile(rows, columns, capacity, *bytes_of, gpu, readers, **places)

    low = sizes.r + 2 * sizes.n
    if sizes.takes_library(d, capacity):
        x = cut(low, d, -(-d // SCAN_CHANNELS), places=1)
        yield PRODUCT, sizes.product(x, "SUMS")
        yield CONVOLUTION, sizes.convolution()
        scan = tile_scan(capacity, d, sizes.n, sizes.r, gpu)
        yield SCAN_MANY, sizes.scan_many(scan, x.spans)
        yield STREAM, sizes.stream(library_spans(d))
    else:
        x, out = cut(low, d, -(-d // _CHANNELS)), cut(sizes.m, d, 1)
        yield PRODUCT, sizes.product(cut(2 * d, sizes.m, 0), "CONVOLVED")
        yield PRODUCT, sizes.product(x, "SUMS")
        yield PRODUCT, sizes.product(out, "SUMS")
        yield PRODUCT, sizes.product(cut(vocabulary, sizes.m, 0), "LOGITS")
        yield SCAN, sizes.scan(group(capacity, sizes.n), x.spans)
        yield STREAM, sizes.stream(out.spans)


class Launches:
    """All launches of a step for up to ``capacity`` sequences, and the memory between them.

    ``begin`` and ``end`` take what changes from token to token; ``rest``, between them, is the
    same for every token.

    Raises:
        RuntimeError: A kernel cannot be compiled here; the message says why.
    """

    # a library does not write to tensors that were made in this mode once it has been left
    @torch.inference_mode(False)
    def __init__(self, packed: PackedModel, capacity: int) -> None:
        self._packed, self._capacity = packed, capacity
        self._sizes = Sizes.of(packed)
        device = packed.embedding.device
        self._index = packed.embedding.get_device()
        self._gpu = GPU(_cuda.multiprocessors(self._index), _cuda.shared_memory(self._index)[0])
        self._library = self._sizes.takes_library(packed.d, capacity)
        self._overlaps = _can_overlap(device) and overlaps(capacity, self._library)
        first = packed.layers[0]
        # vectors are padded like the matrices, with zeros that nothing writes to
        h, u = ((capacity, p.columns) for p in (first.in_proj, first.out_proj))
        self._h = torch.zeros(h, device=device, dtype=packed.factor)
        self._u = torch.zeros(u, device=device, dtype=packed.factor)
        self._y = torch.zeros_like(self._u)
        self._x = torch.zeros(capacity, packed.m, device=device)
        # both halves, as a library leaves them, or the second, after its SiLU
        width, kind = (2, packed.factor) if self._library else (1, torch.float32)
        self._gate = torch.zeros(capacity, width * packed.d, device=device, dtype=kind)
        self._call = torch.zeros(ctypes.sizeof(Call), dtype=torch.uint8, device=device)
        self._sums: dict[str, Tensor] = {}

        self._spans = library_spans(packed.d)
        spans = self._spans if self._library else self._tile(first.out_proj, 1).spans
        self._stream = self._sizes.stream(spans)
        self._begin = self._kernel(STREAM, "begin", self._stream)
        self._beginning = BeginArguments(
            to=self._call.data_ptr(),
            embedding=packed.embedding.data_ptr(),
            vocabulary=packed.vocab_size,
            norm=self._norm(first.gain, first.eps),
        )
        self.rest: list[Launch | Multiplication] = []
        for i, layer in enumerate(packed.layers):
            append = self._append_many if self._library else self._append_few
            out = append(i, layer)
            last = i + 1 == packed.n_layer
            gain, eps = (packed.gain, packed.eps) if last else packed.layers[i + 1][:2]
            self._append_add(layer, out, gain, eps)
        if not self._library:
            self._append_product("head", packed.head, self._h, "LOGITS")

    def begin(self, call: Call, tokens: Tensor) -> None:
        """Queue the first kernel; it also leaves the call where the others find it."""
        arguments = self._beginning
        arguments.call = call
        arguments.tokens, arguments.wide = tokens.data_ptr(), tokens.itemsize == 8
        self._begin.launch((len(tokens), 1, 1), self._sizes.stream_threads, arguments)

    def end(self, logits: Tensor) -> None:
        """Queue what comes last: a library's logits, whose place in a graph would be fixed."""
        if self._library:
            h, head = self._h[: len(logits)], self._packed.head
            Multiplication("head", h, head.weights, logits).run()

    # ------------------------------------------------------------ a layer

    def _append_few(self, i: int, layer: Layer) -> Tensor:
        """Append a layer's kernels; return the sums that it adds to the stream."""
        packed = self._packed
        self._append_product(
            "in_proj",
            layer.in_proj,
            self._h,
            "CONVOLVED",
            bias=_address(layer.in_bias),
            taps=layer.conv.data_ptr(),
            tap_bias=_address(layer.conv_bias),
            u=self._u.data_ptr(),
            u_columns=self._u.shape[1],
            gate=self._gate.data_ptr(),
            channels=packed.d,
            layer=i,
        )
        blocks = -(-packed.d // _CHANNELS)
        low = self._append_sums("x_proj", layer.x_proj, self._u, blocks)
        arguments = ScanArguments(
            sums=low.data_ptr(),
            scales=_address(layer.dt_proj.scales),
            gate=self._gate.data_ptr(),
            **self._of_scan(i, layer),
        )
        rows = group(self._capacity, packed.n)
        defines = self._sizes.scan(rows, len(low))
        grid = (blocks, -(-self._capacity // rows), 1)
        self._append("scan", SCAN, "scan", defines, grid, _THREADS, arguments)
        return self._append_sums("out_proj", layer.out_proj, self._y, 1)

    def _append_many(self, i: int, layer: Layer) -> Tensor:
        """Append those of a layer whose large matrices a library multiplies; as before."""
        packed, capacity = self._packed, self._capacity
        projected, width = self._gate, 2 * packed.d
        self._append_library("in_proj", self._h, layer.in_proj, projected)
        convolution = ConvolutionArguments(
            call=self._call.data_ptr(),
            projected=projected.data_ptr(),
            width=width,
            bias=_address(layer.in_bias),
            taps=layer.conv.data_ptr(),
            tap_bias=_address(layer.conv_bias),
            u=self._u.data_ptr(),
            u_columns=self._u.shape[1],
            channels=packed.d,
            layer=i,
        )
        defines = self._sizes.convolution()
        grid = (capacity, -(-packed.d // _CONVOLVED), 1)
        self._append("convolution", CONVOLUTION, "convolve", defines, grid, 128, convolution)

        blocks = -(-packed.d // SCAN_CHANNELS)
        low = self._append_sums("x_proj", layer.x_proj, self._u, blocks)
        bias = layer.in_bias
        arguments = ScanManyArguments(
            sums=low.data_ptr(),
            gate=projected[:, packed.d :].data_ptr(),
            gate_stride=width,
            gate_bias=None if bias is None else bias[packed.d :].data_ptr(),
            **self._of_scan(i, layer),
        )
        cut = tile_scan(capacity, packed.d, packed.n, packed.r, self._gpu)
        defines = self._sizes.scan_many(cut, len(low))
        grid, shared = cut.grid(packed.d, capacity), cut.shared_bytes
        self._append("scan", SCAN_MANY, "scan", defines, grid, _THREADS, arguments, shared)

        out = self._between("out_proj", (self._spans, capacity, packed.m))
        self._append_library("out_proj", self._y, layer.out_proj, out)
        return out

    def _of_scan(self, i: int, layer: Layer) -> dict[str, Any]:
        """Return the arguments that both scans have."""
        packed = self._packed
        return {
            "call": self._call.data_ptr(),
            "capacity": self._capacity,
            "selection_eps": packed.selection_eps,
            "matrix": layer.dt_proj.weights.data_ptr(),
            "bias": layer.dt_bias.data_ptr(),
            "A": layer.A.data_ptr(),
            "D": layer.D.data_ptr(),
            "u": self._u.data_ptr(),
            "y": self._y.data_ptr(),
            "channels": packed.d,
            "stride": self._u.shape[1],
            "layer": i,
        }

    def _append_add(self, layer: Layer, out: Tensor, gain: Tensor, eps: float) -> None:
        arguments = AddArguments(
            call=self._call.data_ptr(),
            sums=out.data_ptr(),
            capacity=self._capacity,
            bias=_address(layer.out_bias),
            norm=self._norm(gain, eps),
        )
        grid, threads = (self._capacity, 1, 1), self._sizes.stream_threads
        # after a library's product there is nothing to gain from places taken early
        early = not self._library
        self._append("add", STREAM, "add", self._stream, grid, threads, arguments, early=early)

    # ------------------------------------------------------------ one launch

    def _append_sums(self, name: str, matrix: Matrix, vectors: Tensor, readers: int) -> Tensor:
        """Append a product whose sums the next kernel adds up; return them, span by span."""
        spans = self._tile(matrix, readers).spans
        sums = self._between(name, (spans, self._capacity, matrix.rows))
        self._append_product(
            name, matrix, vectors, "SUMS", readers=readers, sums=sums.data_ptr()
        )
        return sums

    def _append_product(
        self,
        name: str,
        matrix: Matrix,
        vectors: Tensor,
        end: str,
        readers: int = 0,
        **more: Any,
    ) -> None:
        cut = self._tile(matrix, readers)
        arguments = ProductArguments(
            call=self._call.data_ptr(),
            matrix=matrix.weights.data_ptr(),
            scales=_address(matrix.scales),
            rows=matrix.rows,
            columns=matrix.columns,
            vectors=vectors.data_ptr(),
            span=cut.span,
            capacity=self._capacity,
            **more,
        )
        defines, grid = self._sizes.product(cut, end), cut.grid(matrix.rows, self._capacity)
        shared = cut.shared_bytes
        self._append(name, PRODUCT, "product", defines, grid, _THREADS, arguments, shared)

    def _append_library(self, name: str, vectors: Tensor, matrix: Matrix, out: Tensor) -> None:
        self.rest.append(Multiplication(name, vectors, matrix.weights, out))

    def _append(
        self,
        name: str,
        source: Path,
        entry: str,
        defines: _cuda.Defines,
        grid: tuple[int, int, int],
        threads: int,
        arguments: ctypes.Structure,
        shared: int = 0,
        *,
        early: bool = True,
    ) -> None:
        kernel = self._kernel(source, entry, defines, shared)
        # the launch before the first is not one of these
        early = early and self._overlaps and bool(self.rest)
        self.rest.append(Launch(name, kernel, grid, threads, arguments, shared, early))

    def _kernel(self, source: Path, entry: str, defines: _cuda.Defines, shared: int = 0) -> Any:
        return _cuda.kernel(source, entry, defines, self._index, shared)

    def _between(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return memory for what passes between two kernels; all layers take turns with it."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(shape, device=self._h.device)
        return self._sums[name]

    def _tile(self, matrix: Matrix, readers: int) -> Tiling:
        packed = self._packed
        bytes_of = packed.storage.itemsize, packed.factor.itemsize
        sizes = matrix.rows, matrix.columns, self._capacity
        # x_proj leaves the scan of many sequences room to ask for states
        places = {"places": 1} if self._library else {}
        return tile(*sizes, *bytes_of, self._gpu, readers, **places)

    def _norm(self, gain: Tensor, eps: float) -> Norm:
        return Norm(
            x=self._x.data_ptr(),
            gain=gain.data_ptr(),
            eps=eps,
            h=self._h.data_ptr(),
            columns=self._h.shape[1],
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
