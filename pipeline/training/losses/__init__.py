"""One loss a file: student logits, targets and weights of clips in, one scalar out."""
