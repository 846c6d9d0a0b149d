"""Turning a whole model into a low-bit one."""
