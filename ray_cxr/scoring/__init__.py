"""Bulk scoring with Ray Data."""
