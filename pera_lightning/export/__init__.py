"""Adapted models in the formats of other libraries: PEFT folders, and merged models."""
