"""The admin's pages, one file for each kind of object; importing one registers it."""
