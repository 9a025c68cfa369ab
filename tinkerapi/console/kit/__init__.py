"""The building blocks of the console's pages: lists, links, labels, charts, previews, filters."""
