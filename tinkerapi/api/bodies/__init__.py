"""Request bodies before they are parsed: permission, size and nesting limits."""
