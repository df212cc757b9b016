"""Contract suites: subclass one, name a component, and inherit every check."""
