"""One SQLite file: its schema, a writer thread that commits in groups, readers, and erasing for good."""
