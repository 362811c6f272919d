"""The commands beside the Trainer's, one a file."""
