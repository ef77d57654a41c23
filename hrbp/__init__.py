"""Sparse CNN training on top of blocksparse. No public names yet: the structures and the training come next."""
