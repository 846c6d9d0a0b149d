"""The student outside qtrain: its ONNX form, integers that compute it, and the proof that both agree with it."""
