"""Reports on score tables, with or without labels: metrics, figures, pages and a worklist."""
