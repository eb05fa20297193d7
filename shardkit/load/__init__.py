"""Load a model, and see beforehand what a load gets."""
