"""Reference models of qgraph's tests and measurements: seeded architecture shapes and one trained classifier."""
