"""Where work runs and how it is recorded. Knows no model."""
