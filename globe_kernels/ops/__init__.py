"""Operations on tensors, one per file: formula, shapes, reference."""
