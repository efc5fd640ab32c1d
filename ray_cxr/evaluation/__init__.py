"""Arrays in, numbers out: metrics, their intervals, calibration. No Ray, no Keras, no files."""
