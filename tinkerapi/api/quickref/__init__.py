"""The quick reference's dialect, which is also what people with ``curl`` speak."""
