"""The engine on an NVIDIA GPU: Triton kernels, CUDA graphs, and a runner that plans a step while another runs."""
