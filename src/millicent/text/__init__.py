"""Tokenizers, chat templates and text as it streams. No torch; libraries are imported when a tokenizer is loaded."""

from millicent.text.stream import TextStream
from millicent.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]
