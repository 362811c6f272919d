"""Causal language models: fine-tuning on commonsense, maths and dialogue, and evaluation by named protocols."""
