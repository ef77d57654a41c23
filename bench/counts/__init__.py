"""What the Triton kernels cost by count: which kernels (cases), compiled without a GPU (compiling), read (machine)."""
