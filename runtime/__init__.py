"""Plans, and the thin Python that drives model calls: drivers, methods, engine, ranks."""
