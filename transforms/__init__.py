"""The steps of a job: a pure function each, and a thin PTransform around it."""
