"""Triton kernels. With TRITON_INTERPRET=1 in the environment they run on the processor, one operation at a time: that
is how they are tested where there is no GPU."""
