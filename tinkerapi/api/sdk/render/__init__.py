"""Renders results, rows and links as the SDK's bodies."""
