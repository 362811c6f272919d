"""Adapted models in the formats of other libraries: PEFT folders, LoRA files of diffusers, and merged models."""
