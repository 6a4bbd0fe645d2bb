"""Published methods, one paper per file: a docstring and a composition."""
