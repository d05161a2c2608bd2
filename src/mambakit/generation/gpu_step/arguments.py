"""What the kernels of a step are launched with, field by field as their sources have it."""

import ctypes

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


class Norm(ctypes.Structure):
    """What ``stream.cu`` does to every vector."""

    _fields_ = (
        ("x", _pointer),
        ("gain", _pointer),
        ("eps", _double),
        ("h", _pointer),
        ("columns", _int),
    )


class BeginArguments(ctypes.Structure):
    """Of ``begin`` in ``stream.cu``."""

    _fields_ = (
        ("call", Call),
        ("to", _pointer),
        ("tokens", _pointer),
        ("wide", _int),
        ("embedding", _pointer),
        ("vocabulary", _int),
        ("norm", Norm),
    )


class AddArguments(ctypes.Structure):
    """Of ``add`` in ``stream.cu``."""

    _fields_ = (
        ("call", _pointer),
        ("sums", _pointer),
        ("capacity", _int),
        ("bias", _pointer),
        ("norm", Norm),
    )


class ProductArguments(ctypes.Structure):
    """Of ``product.cu``."""

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
    )


class ScanArguments(ctypes.Structure):
    """Of ``scan.cu``."""

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
    )


class ConvolutionArguments(ctypes.Structure):
    """Of ``convolution.cu``."""

    _fields_ = (
        ("call", _pointer),
        ("projected", _pointer),
        ("width", _int),
        ("bias", _pointer),
        ("taps", _pointer),
        ("tap_bias", _pointer),
        ("u", _pointer),
        ("u_columns", _int),
        ("channels", _int),
        ("layer", _int),
    )


class ScanManyArguments(ctypes.Structure):
    """Of ``scan_many.cu``."""

    _fields_ = (
        ("call", _pointer),
        ("sums", _pointer),
        ("capacity", _int),
        ("selection_eps", _double),
        ("matrix", _pointer),
        ("bias", _pointer),
        ("A", _pointer),
        ("D", _pointer),
        ("u", _pointer),
        ("gate", _pointer),
        ("gate_stride", _int),
        ("gate_bias", _pointer),
        ("y", _pointer),
        ("channels", _int),
        ("stride", _int),
        ("layer", _int),
    )
