"""New tokens and text from a language model: rules, the loop over states, search, streaming."""

from .beam import beam_search
from .bookmark import Bookmark
from .complete import complete
from .completions import Completions
from .engine import Alternatives, LogitsProcessor
from .generate import generate, stream
from .history import StateHistory
from .sampling import SamplingRules
from .text import generate_text, stream_text, stream_texts
from .text_stream import TextStream

__all__ = [
    "Alternatives",
    "Bookmark",
    "Completions",
    "LogitsProcessor",
    "SamplingRules",
    "StateHistory",
    "TextStream",
    "beam_search",
    "complete",
    "generate",
    "generate_text",
    "stream",
    "stream_text",
    "stream_texts",
]
