"""Millicent: the inference server with the meter built in."""

__version__ = "0.1.0"
