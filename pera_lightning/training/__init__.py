"""The Lightning side: the callback, checkpoints, exact resume, FSDP2, the base module, optimizers and results."""
