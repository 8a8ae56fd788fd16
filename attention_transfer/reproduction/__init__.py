"""Published tables, one recipe a number: reading them, running what is missing, and what came out."""
