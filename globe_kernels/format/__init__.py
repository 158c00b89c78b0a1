"""Files: the GloBE checkpoint, the names of base models, writes that are whole or absent."""
