"""How fast an exported file runs, how much of it runs in integers, and both beside the runtime's own quantization."""
