"""The ways to pair a gallery's images, and how alike the pairs are."""
