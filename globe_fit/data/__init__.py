"""The dense model as a fit reads it: its experts, streamed, and the whole model, loaded."""
