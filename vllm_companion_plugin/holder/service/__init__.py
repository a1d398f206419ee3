"""What a companion answers: RPCs, descriptors, health."""
