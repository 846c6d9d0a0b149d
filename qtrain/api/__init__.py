"""What ``import qtrain`` offers: the functions of the command line for a network and images at hand."""
