"""Distillation of large language models with DeepSpeed: DistiLLM (arXiv 2402.03898) and its relatives."""
