"""Ways to run one checkpoint, a file each; their cost on a machine, and which of them a budget holds."""
