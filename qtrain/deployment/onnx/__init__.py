"""A student as an ONNX file with quantize and dequantize nodes."""
