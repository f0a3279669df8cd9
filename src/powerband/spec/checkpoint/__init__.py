"""What a checkpoint's files hold: tensors, formats and precisions of weights."""
