"""Processes that work as one: how they start, talk, stop, hang and run out of memory.

Imports nothing of the toolkit."""
