"""Sweeps over seeds and config values: the plan, the folder, the processes, the outcomes and the summary."""
