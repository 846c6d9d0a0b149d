"""How long single layers take in a runtime, by their shape and bits."""
