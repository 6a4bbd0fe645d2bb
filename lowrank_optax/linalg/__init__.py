"""Arrays in, arrays out: the numerics under the projectors."""
