"""The mathematics of a tile in two kernels of Triton, between torch's matrix products: a backend for GPUs."""
