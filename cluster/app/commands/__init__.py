"""Further commands of `vdg`, a file for each topic."""
