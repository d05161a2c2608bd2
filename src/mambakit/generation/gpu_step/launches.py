"""The kernels of a step in their order, with everything they are launched with."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambakit.ops import _cuda

from .packing import Layer, Matrix, PackedModel
from .tiling import group, tile

FOLDER = Path(__file__).parent
STREAM, PRODUCT, SCAN = (FOLDER / f"{name}.cu" for name in ("stream", "product", "scan"))

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
}
_THREADS = 256
_CHANNELS = 64  # of a block of the scan

# Kernels that keep memory less than busy ask for what later ones will read, as parts of it.
_OUT_WHILE_X = 1.0  # of out_proj's matrix, during x_proj
_IN_WHILE_OUT = 0.25  # of the next in_proj's, during out_proj
# Of the GPU's cache, that much may hold what was asked for ahead, with the states that pass by.
_CACHE_SHARE = 0.5

_int, _pointer, _double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class Call(ctypes.Structure):
    """What changes from token to token; see ``common.cuh``."""

    _fields_ = (
        ("b", _int),
        ("conv", _pointer),
        ("ssm", _pointer),
        ("new_conv", _pointer),
        ("new_ssm", _pointer),
        ("logits", _pointer),
    )


class _Ahead(ctypes.Structure):
    _fields_ = (("data", _pointer), ("bytes", _int))


class _Norm(ctypes.Structure):
    _fields_ = (
        ("x", _pointer),
        ("gain", _pointer),
        ("eps", _double),
        ("h", _pointer),
        ("columns", _int),
    )


class _BeginArguments(ctypes.Structure):
    _fields_ = (
        ("call", Call),
        ("to", _pointer),
        ("tokens", _pointer),
        ("wide", _int),
        ("embedding", _pointer),
        ("vocabulary", _int),
        ("norm", _Norm),
    )


class _AddArguments(ctypes.Structure):
    _fields_ = (
        ("call", _pointer),
        ("sums", _pointer),
        ("capacity", _int),
        ("bias", _pointer),
        ("norm", _Norm),
    )


class _ProductArguments(ctypes.Structure):
    _fields_ = (
        ("call", _pointer),
        ("matrix", _pointer),
        ("scales", _pointer),
        ("rows", _int),
        ("columns", _int),
        ("vectors", _pointer),
        ("span", _int),
        ("sums", _pointer),
        ("capacity", _int),
        ("bias", _pointer),
        ("taps", _pointer),
        ("tap_bias", _pointer),
        ("u", _pointer),
        ("u_columns", _int),
        ("gate", _pointer),
        ("channels", _int),
        ("layer", _int),
        ("ahead", _Ahead),
    )


class _ScanArguments(ctypes.Structure):
    _fields_ = (
        ("call", _pointer),
        ("sums", _pointer),
        ("capacity", _int),
        ("selection_eps", _double),
        ("matrix", _pointer),
        ("scales", _pointer),
        ("bias", _pointer),
        ("A", _pointer),
        ("D", _pointer),
        ("u", _pointer),
        ("gate", _pointer),
        ("y", _pointer),
        ("channels", _int),
        ("stride", _int),
        ("layer", _int),
        ("ahead", _Ahead),
    )


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

    def product(self, rows: int, columns: int, stages: int, end: str) -> _cuda.Defines:
        """Return the defines of ``product.cu``."""
        return (
            *self._types,
            ("TENSORS", str(int(self.factor != torch.float32))),
            ("ROWS", str(rows)),
            ("COLUMNS", str(columns)),
            ("STAGES", str(stages)),
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


def specialisations(
    sizes: Sizes, d: int, vocabulary: int, capacity: int, processors: int
) -> Iterator[tuple[Path, _cuda.Defines]]:
    """List the builds that a step of such a model and of so many sequences asks for."""
    for rows, columns, end, readers in (
        (2 * d, sizes.m, "CONVOLVED", 0),
        (sizes.r + 2 * sizes.n, d, "SUMS", -(-d // _CHANNELS)),
        (sizes.m, d, "SUMS", 1),
        (vocabulary, sizes.m, "LOGITS", 0),
    ):
        bytes_of = sizes.storage.itemsize, sizes.factor.itemsize
        cut = tile(rows, columns, capacity, *bytes_of, processors, readers)
        yield PRODUCT, sizes.product(cut.rows, cut.columns, cut.stages, end)
        if readers == 1:
            yield STREAM, sizes.stream(cut.spans)
        elif readers:
            yield SCAN, sizes.scan(group(capacity, sizes.n), cut.spans)


class Launches:
    """All launches of a step for up to ``capacity`` sequences, and the memory between them.

    ``begin`` takes what changes from token to token; ``rest`` is the same for every token.

    Raises:
        RuntimeError: A kernel cannot be compiled here; the message says why.
    """

    def __init__(self, packed: PackedModel, capacity: int) -> None:
        self._packed, self._capacity = packed, capacity
        self._sizes = Sizes.of(packed)
        device = packed.embedding.device
        self._index = packed.embedding.get_device()
        self._processors = _cuda.multiprocessors(self._index)
        self._overlaps = _can_overlap(device)
        first = packed.layers[0]
        # vectors are padded like the matrices, with zeros that nothing writes to
        h, u = ((capacity, p.columns) for p in (first.in_proj, first.out_proj))
        self._h = torch.zeros(h, device=device, dtype=packed.factor)
        self._u = torch.zeros(u, device=device, dtype=packed.factor)
        self._y = torch.zeros_like(self._u)
        self._x = torch.zeros(capacity, packed.m, device=device)
        self._gate = torch.zeros(capacity, packed.d, device=device)
        self._call = torch.zeros(ctypes.sizeof(Call), dtype=torch.uint8, device=device)
        self._sums: dict[str, Tensor] = {}
        traffic = 2 * capacity * packed.d * packed.n * 4
        self._room_ahead = max(0.0, _CACHE_SHARE * _cache_bytes(device) - traffic)

        spans = self._tile(first.out_proj, 1).spans
        self._stream = self._sizes.stream(spans)
        self._begin = self._kernel(STREAM, "begin", self._stream, 0)
        self._beginning = _BeginArguments(
            to=self._call.data_ptr(),
            embedding=packed.embedding.data_ptr(),
            vocabulary=packed.vocab_size,
            norm=self._norm(first.gain, first.eps),
        )
        self.rest: list[Launch] = []
        for i in range(packed.n_layer):
            self._append_layer(i)
        self._append("head", packed.head, self._h, "LOGITS")
        # the launch before it is not one of these
        self.rest[0] = self.rest[0]._replace(overlaps=False)

    def begin(self, call: Call, tokens: Tensor) -> None:
        """Queue the first kernel; it also leaves the call where the others find it."""
        arguments = self._beginning
        arguments.call = call
        arguments.tokens, arguments.wide = tokens.data_ptr(), tokens.itemsize == 8
        self._begin.launch((len(tokens), 1, 1), self._sizes.stream_threads, arguments)

    def _kernel(self, source: Path, entry: str, defines: _cuda.Defines, shared: int) -> Any:
        return _cuda.kernel(source, entry, defines, self._index, shared)

    def _append_layer(self, i: int) -> None:
        packed, layers, capacity = self._packed, self._packed.layers, self._capacity
        layer = layers[i]
        last = i + 1 == len(layers)
        next_matrix = packed.head if last else layers[i + 1].in_proj
        gain, eps = (packed.gain, packed.eps) if last else layers[i + 1][:2]

        self._append(
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
        low, low_spans = self._append_sums(
            "x_proj", layer.x_proj, self._u, blocks, self._ahead(layer.out_proj, _OUT_WHILE_X)
        )
        self._append_scan(i, layer, blocks, low, low_spans)
        sums, _ = self._append_sums(
            "out_proj", layer.out_proj, self._y, 1, self._ahead(next_matrix, _IN_WHILE_OUT)
        )
        arguments = _AddArguments(
            call=self._call.data_ptr(),
            sums=sums.data_ptr(),
            capacity=capacity,
            bias=_address(layer.out_bias),
            norm=self._norm(gain, eps),
        )
        kernel, threads = (
            self._kernel(STREAM, "add", self._stream, 0),
            self._sizes.stream_threads,
        )
        self.rest.append(
            Launch("add", kernel, (capacity, 1, 1), threads, arguments, 0, self._overlaps)
        )

    def _append_scan(self, i: int, layer: Layer, blocks: int, low: Tensor, spans: int) -> None:
        packed = self._packed
        rows = group(self._capacity, packed.n)
        arguments = _ScanArguments(
            call=self._call.data_ptr(),
            sums=low.data_ptr(),
            capacity=self._capacity,
            selection_eps=packed.selection_eps,
            matrix=layer.dt_proj.weights.data_ptr(),
            scales=_address(layer.dt_proj.scales),
            bias=layer.dt_bias.data_ptr(),
            A=layer.A.data_ptr(),
            D=layer.D.data_ptr(),
            u=self._u.data_ptr(),
            gate=self._gate.data_ptr(),
            y=self._y.data_ptr(),
            channels=packed.d,
            stride=self._u.shape[1],
            layer=i,
        )
        kernel = self._kernel(SCAN, "scan", self._sizes.scan(rows, spans), 0)
        grid = (blocks, -(-self._capacity // rows), 1)
        self.rest.append(Launch("scan", kernel, grid, _THREADS, arguments, 0, self._overlaps))

    def _append_sums(
        self, name: str, matrix: Matrix, vectors: Tensor, readers: int, ahead: _Ahead
    ) -> tuple[Tensor, int]:
        """Append a product whose sums the next kernel adds up; return them and their number."""
        spans = self._tile(matrix, readers).spans
        if name not in self._sums:  # all layers take turns with the same
            shape = (spans, self._capacity, matrix.rows)
            self._sums[name] = torch.zeros(shape, device=vectors.device)
        sums = self._sums[name]
        self._append(
            name, matrix, vectors, "SUMS", readers=readers, sums=sums.data_ptr(), ahead=ahead
        )
        return sums, spans

    def _tile(self, matrix: Matrix, readers: int) -> Any:
        packed = self._packed
        return tile(
            *(matrix.rows, matrix.columns, self._capacity),
            *(packed.storage.itemsize, packed.factor.itemsize, self._processors, readers),
        )

    def _append(
        self,
        name: str,
        matrix: Matrix,
        vectors: Tensor,
        end: str,
        readers: int = 0,
        **more: Any,
    ) -> None:
        tiling = self._tile(matrix, readers)
        arguments = _ProductArguments(
            call=self._call.data_ptr(),
            matrix=matrix.weights.data_ptr(),
            scales=_address(matrix.scales),
            rows=matrix.rows,
            columns=matrix.columns,
            vectors=vectors.data_ptr(),
            span=tiling.span,
            capacity=self._capacity,
            **more,
        )
        defines = self._sizes.product(tiling.rows, tiling.columns, tiling.stages, end)
        kernel = self._kernel(PRODUCT, "product", defines, tiling.shared_bytes)
        grid = tiling.grid(matrix.rows, self._capacity)
        self.rest.append(
            Launch(
                *(name, kernel, grid, _THREADS, arguments, tiling.shared_bytes),
                overlaps=self._overlaps,
            )
        )

    def _norm(self, gain: Tensor, eps: float) -> _Norm:
        return _Norm(
            x=self._x.data_ptr(),
            gain=gain.data_ptr(),
            eps=eps,
            h=self._h.data_ptr(),
            columns=self._h.shape[1],
        )

    def _ahead(self, matrix: Matrix, part: float) -> _Ahead:
        nbytes = int(min(part * matrix.weights.nbytes, self._room_ahead))
        return _Ahead(matrix.weights.data_ptr(), nbytes)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.L2_cache_size
