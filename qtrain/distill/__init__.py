"""The objective of training and its terms."""
