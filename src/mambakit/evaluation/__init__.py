"""How good a model is. Measures only: nothing here changes a model."""

from .language import (
    LanguageScore as LanguageScore,
    evaluate_files as evaluate_files,
    evaluate_tokens as evaluate_tokens,
    evaluate_whole as evaluate_whole,
)
