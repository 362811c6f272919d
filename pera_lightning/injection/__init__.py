"""Injection: which layers are adapted, how, what of them is saved, and of which base they are. Torch only."""
