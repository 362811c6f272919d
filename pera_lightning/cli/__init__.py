"""The command line: LightningCLI with adapters, and this package's own commands."""
