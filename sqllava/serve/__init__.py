"""Serving: a page in the browser."""

# How long a request may take, unless the command says otherwise.
REQUEST_SECONDS = 300
