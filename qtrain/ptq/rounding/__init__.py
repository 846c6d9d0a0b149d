"""Which way each weight of a calibrated student is rounded."""
