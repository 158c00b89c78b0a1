"""A running fit: ranks, snapshots, metrics and where they go."""
