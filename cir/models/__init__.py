"""The model of composed retrieval: text encoders, fusions, and both together."""
