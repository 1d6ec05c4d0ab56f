"""Training in NumPy: optimisers, and a run that goes on where it was stopped."""
