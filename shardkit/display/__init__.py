"""Showing what the engine found: plots, progress, widgets."""
