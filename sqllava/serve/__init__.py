"""Serving: a page in the browser."""
