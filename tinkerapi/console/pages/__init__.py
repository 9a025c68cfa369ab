"""The admin's pages, one file for each thing; importing one registers it."""
