"""Distillation of large language models with DeepSpeed: DistiLLM (arXiv 2402.03898) and its relatives."""

from toolkit import aliases as _aliases  # noqa: F401 (importing it is what it does)
