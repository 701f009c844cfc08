"""Compiled CPU kernels: quantized linears, paged attention, whole decoder layers. See docs/kernels.md."""

from millicent.engine.kernels.library import Availability, available, instruction_sets, use_instruction_set, use_threads

__all__ = ["Availability", "available", "instruction_sets", "use_instruction_set", "use_threads"]
