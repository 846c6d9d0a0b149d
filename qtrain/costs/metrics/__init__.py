"""What a layer costs at a number of bits, by one metric: a class in each file."""
