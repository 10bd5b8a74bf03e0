"""What a GPU would take for the kernels, from their machine code and their work: until a card's results are stored."""
