"""From a gallery of images to embeddings and related pairs. Knows images, not language."""
