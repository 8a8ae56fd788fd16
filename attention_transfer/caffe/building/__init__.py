"""Making one net of a student, a frozen teacher and the attention branches between them."""
