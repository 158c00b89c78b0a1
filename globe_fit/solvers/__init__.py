"""What lowers the error: the objective, its start, supports, and two solvers behind one protocol."""
