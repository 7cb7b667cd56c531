"""A run's models behind HTTP, and the page that asks them."""
