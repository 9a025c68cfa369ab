"""What a person sees in a browser: the admin, its dashboard, the manual, the login."""
