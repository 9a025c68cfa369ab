"""The quick reference's dialect, which people with ``curl`` use too."""
