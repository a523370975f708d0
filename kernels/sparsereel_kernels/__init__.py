"""Native kernels and BlockMask."""
