"""Files that are whole or absent, known by their hashes, and used by one job at a time.

Imports `ranks`."""
