"""The Visual Delta Generator: from pairs of images to the text that turns one into the other. Never imports `cir`."""
