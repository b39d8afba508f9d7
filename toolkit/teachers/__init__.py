"""What a teacher says: its stored answers, and text of its own.

Imports `rollout`, `models` and what lies below them."""
