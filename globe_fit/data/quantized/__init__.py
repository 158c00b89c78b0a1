"""Read the quantised weights of a checkpoint as numbers, slice by slice."""
