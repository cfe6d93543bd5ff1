"""What stands behind ``optimize``: the parts of a live module, its weights as they change, the logits it answered."""
