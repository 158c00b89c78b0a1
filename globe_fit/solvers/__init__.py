"""Lower the error of a fit: the objective, its start, supports, and two solvers behind one protocol."""
