"""The live model: the module of the experts, the bank, patching, the transformers quantizer."""
