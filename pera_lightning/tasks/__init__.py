"""The tasks, a folder each: their modules, data modules and what belongs to them alone."""
