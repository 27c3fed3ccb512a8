"""Early exit: rows leave a transformer before its last block."""
