"""Networks, bundles and their runtime."""
