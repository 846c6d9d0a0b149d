"""How much the loss is expected to rise where one weight or one input is quantized."""
