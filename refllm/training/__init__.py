"""Training in NumPy: optimisers."""
