"""What a leaf of a parameter tree is: its matrix view, its box, its moments by path."""
