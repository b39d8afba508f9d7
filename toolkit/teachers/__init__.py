"""What a teacher says: the live model, its stored answers, and text of its own.

Imports `rollout`, `models` and what lies below them."""
