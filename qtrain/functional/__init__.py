"""Pure tensor functions, no state, nothing of qtrain but each other and :mod:`qtrain.spec`."""
