"""What several kinds of tests use, and the benchmarks: places, small models, checkpoints. No test is here."""
