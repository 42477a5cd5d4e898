"""Builders behind `models.shapes`: graphs, seeded weights and seeded inputs, without torch."""
