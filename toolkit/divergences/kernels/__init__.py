"""The elementwise work on a tile: one interface (`rows`), kernels for it in torch, C++ and Triton, and which one runs
(`backends`). Imports `divergences.head` and `divergences.spec` alone."""
