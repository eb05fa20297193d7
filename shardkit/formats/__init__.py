"""File formats of weights: which tensors a file holds, and where their bytes are."""
