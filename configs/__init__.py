"""The shipped configurations: modules, presets and jobs, as YAML."""
