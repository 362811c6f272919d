"""What the data modules of several tasks share: batches, splits, downloads, tokens. Nothing here knows of adapters."""
