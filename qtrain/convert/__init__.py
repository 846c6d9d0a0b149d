"""What is done to a whole model to make it a low-bit one."""
