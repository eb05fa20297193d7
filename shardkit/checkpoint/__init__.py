"""What the files of a checkpoint mean: its weights, its tensors, its config, its memory."""
