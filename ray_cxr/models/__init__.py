"""Models, bundles and runtimes."""
