"""What the console's pages are made of: lists, links, labels, charts, previews, filters."""
