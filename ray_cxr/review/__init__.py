"""A page on this machine to read the images of a score run and to record verdicts on them."""
