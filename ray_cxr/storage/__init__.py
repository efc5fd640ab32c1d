"""Files: paths and URIs, stores, archives, whole-file writes, and the folders that runs write."""
