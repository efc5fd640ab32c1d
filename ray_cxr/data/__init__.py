"""Tables, pictures and prepared sets."""
