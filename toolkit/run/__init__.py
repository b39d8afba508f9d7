"""A run from its recipe to its report: stages, inputs, the engine loop, checkpoints.

Imports every other room, and only `cli` imports it."""
