"""Merging: adapters added to the frozen weights, and taken out again; what that changes. Torch only."""
