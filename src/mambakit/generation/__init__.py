"""New tokens and text from a language model: sampling rules, the loop, and streaming."""

from .generate import generate, stream
from .sampling import SamplingRules
from .text import TextStream, generate_text, stream_text

__all__ = [
    "SamplingRules",
    "TextStream",
    "generate",
    "generate_text",
    "stream",
    "stream_text",
]
