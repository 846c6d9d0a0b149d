"""The exported student computed with whole numbers only: what an accelerator without floating point gives."""
