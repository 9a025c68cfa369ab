"""The pages for a browser: the admin, its dashboard, the manual, the login."""
