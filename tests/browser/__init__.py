"""The console in a real browser; needs Debian's chromium and chromium-driver, or Chrome's."""
