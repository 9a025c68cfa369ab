"""Results, rows and links as the bodies that the SDK reads."""
