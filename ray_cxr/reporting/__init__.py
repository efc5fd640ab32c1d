"""From a score table, with or without labels, to a report: numbers, pictures, a page and a worklist."""
