"""Pure tensor functions without state; they import only each other and :mod:`qtrain.spec`."""
