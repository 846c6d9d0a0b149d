"""Post-training quantization: changes of weights, biases and ranges that need no training."""
