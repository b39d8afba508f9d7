"""The elementwise work on a tile: one interface (`rows`), kernels in torch, C++ and Triton, and which one runs."""
