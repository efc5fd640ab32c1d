"""Manifests, the tables they come from, and prepared sets."""
