"""The stage instances of a run, a file for each part of the method; each builds on the one before."""
