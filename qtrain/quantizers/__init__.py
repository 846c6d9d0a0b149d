"""One quantizer a file."""
